// Deformable convolution on the CPU, for one instruction set: how tiles flow.
// SPDX-License-Identifier: Apache-2.0
//
// No include guard: see simd_cpu-inl.h.
//
// The convolution is a matrix product of columns (a row for every output pixel;
// an entry for every tap and channel: the sample there times its mask) and the
// kernel (rows in the same order of taps and channels; a column for every
// filter). The columns exist only as tiles, some pixels by some taps and
// channels, in a worker's scratch:
//
//   ForwardPass   A tile of columns is sampled and at once multiplied by the
//                 packed kernel into its pixels' outputs.
//   DataPass      The gradient of a tile's columns is grad_output times the
//                 transposed packed kernel. A second look at the image's
//                 corners turns it into gradients of offset and mask, which
//                 belong to the tile's own pixels. The gradient of the inputs
//                 lands anywhere in the image: each of its rows belongs to one
//                 worker, who adds what comes there pixel after pixel, so that
//                 the order of sums never depends on the number of workers.
//   KernelPass    Rows of the kernel (taps and channels) are divided among
//                 workers; each samples its part of the columns, tile after
//                 tile over all pixels, and adds the transposed tile times
//                 grad_output.
//
// Where samples lie is worked out once for every tap and offset group (Sample)
// and shared by the group's channels. See deformable_sampling_cpu-inl.h for the
// names of indices.

#include "cc/core/simd_cpu-inl.h"
// The next three build on the one before.
#include "cc/core/tasks_cpu-inl.h"
//
#include "cc/core/matrix_cpu-inl.h"
//
#include "cc/core/deformable_sampling_cpu-inl.h"

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Pixels in a tile, at most: multiples of kMicroRows.
constexpr int64_t kForwardPixels = kMicroRows == 14 ? 126 : 120;
constexpr int64_t kDataPixels = kMicroRows == 14 ? 56 : 54;
constexpr int64_t kKernelPixels = 128;  // the inner dimension there

// Filters in a product, at most.
constexpr int64_t kFilterBlock = 1024;

// Column gradients and samples that are kept for one pixel, at most.
constexpr int64_t kPixelBytes = 12 << 10;

// Multiplications below which one worker does it all.
constexpr double kSerialWork = 1 << 17;

static bool IsSerial(const Geometry& g) {
  return static_cast<double>(g.total_pixels) * static_cast<double>(g.rows) *
             static_cast<double>(g.filters) <
         kSerialWork;
}

// Operands and their types: what the three passes have in common.
template <typename T>
struct Operands {
  using E = typename AccumulatorOf<T>::Type;

  // Sums of 16-bit types need a place of their own.
  static constexpr bool kNarrow = sizeof(T) < sizeof(E);

  const T* inputs;
  const T* kernel;
  const E* offset;
  const E* mask;
  const T* grad_output;

  Operands(const DeformableConv2DInputs& from, const void* grad_output)
      : inputs(static_cast<const T*>(from.inputs)),
        kernel(static_cast<const T*>(from.kernel)),
        offset(static_cast<const E*>(from.offset)),
        mask(static_cast<const E*>(from.mask)),
        grad_output(static_cast<const T*>(grad_output)) {}
};

// What it takes to sample a tile of columns.
template <typename T>
struct ColumnScratch {
  using E = typename AccumulatorOf<T>::Type;

  E* columns;     // [pixels of the tile][kTileStride]
  Pixel* pixels;  // [pixels of the tile]
  Run* runs;      // [kInner]
  T* zeros;       // [kInner]

  ColumnScratch(int64_t num_pixels, Arena* arena)
      : columns(arena->Take<E>(num_pixels * kTileStride)),
        pixels(arena->Take<Pixel>(num_pixels)),
        runs(arena->Take<Run>(kInner)),
        zeros(arena->Take<T>(kInner)) {}

  void Clear() const {
    __builtin_memset(static_cast<void*>(zeros), 0, kInner * sizeof(T));
  }
};

// Samples rows [begin, end) of `group`, at most kInner, for the first
// `num_pixels` of s.pixels: s.columns[pixel][row - begin].
template <typename T>
static void SampleColumns(const Geometry& g, const Operands<T>& operands,
                          int64_t num_pixels, int64_t group, int64_t begin,
                          int64_t end, const ColumnScratch<T>& s) {
  using E = typename AccumulatorOf<T>::Type;
  const Sampling<E> in(g, operands.offset, operands.mask);
  const int64_t num_runs = FindRuns(g, group, begin, end, s.runs);
  // A pixel's taps read neighbouring corners, and so do the next pixel's.
  for (int64_t row = 0; row < num_pixels; ++row) {
    const Pixel& pixel = s.pixels[row];
    for (const Run* run = s.runs; run != s.runs + num_runs; ++run) {
      E* to = s.columns + row * kTileStride + (run->row - begin);
      const Sample<E> sample = Locate(in, pixel, *run);
      if (sample.flags == 0) {
        for (int64_t i = 0; i < run->count; ++i) to[i] = 0;
        continue;
      }
      const Corners<T> from(in, sample, operands.inputs + pixel.n * g.image,
                            run->channel, s.zeros);
      const Weights<E> weights(sample);
      const E mask = sample.mask;
      ForEachVector<E>(run->count, [&](auto lanes, int64_t i) {
        Store(weights.template Mix<lanes.value>(from, i) * mask, to + i);
      });
    }
  }
}

// -----------------------------------------------------------------------------
// Forward.

template <typename T>
struct ForwardScratch : ColumnScratch<T> {
  using E = typename AccumulatorOf<T>::Type;

  E* sums;  // [kForwardPixels][kFilterBlock], for 16-bit types

  explicit ForwardScratch(Arena* arena)
      : ColumnScratch<T>(kForwardPixels, arena),
        sums(arena->Take<E>(Operands<T>::kNarrow ? kForwardPixels * kFilterBlock
                                                 : 0)) {}

  static int64_t Bytes() {
    Arena arena{nullptr};
    ForwardScratch{&arena};
    return arena.used;
  }
};

// The kernel packed for the forward pass: for every group, block of filters and
// block of kInner rows a packed B.
template <typename E>
static int64_t PackedForwardGroup(const Geometry& g) {
  const int64_t whole = g.group_filters / kFilterBlock * kFilterBlock;
  return g.rows * (whole + PackedColumns<E>(g.group_filters - whole));
}

template <typename T>
static int64_t ForwardWorkspace(const DeformableConv2DParams& params,
                                int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry g(params);
  Arena arena{nullptr};
  arena.Take<E>(g.groups * PackedForwardGroup<E>(g));
  return arena.used + num_workers * ForwardScratch<T>::Bytes();
}

template <typename T>
static void ForwardPass(const DeformableConv2DParams& params,
                        const DeformableConv2DInputs& inputs, void* workspace,
                        void* output, const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry g(params);
  if (g.total_pixels == 0) return;
  const Operands<T> operands(inputs, nullptr);
  const int64_t packed_group = PackedForwardGroup<E>(g);
  const int64_t scratch_bytes = ForwardScratch<T>::Bytes();
  Arena arena{static_cast<char*>(workspace)};
  E* const packed = arena.Take<E>(g.groups * packed_group);
  char* const scratch = arena.base + arena.used;

  const int64_t row_blocks = CeilDiv(g.rows, kInner);
  RunTasks(parallel_for, g.groups * row_blocks, [&](int64_t task, int) {
    const int64_t group = task / row_blocks;
    const int64_t begin = task % row_blocks * kInner;
    const int64_t rows = Min(kInner, g.rows - begin);
    for (int64_t f = 0; f < g.group_filters; f += kFilterBlock) {
      const int64_t filters = Min(kFilterBlock, g.group_filters - f);
      PackPanels<T, E>(
          operands.kernel + begin * g.filters + group * g.group_filters + f,
          g.filters, 1, rows, filters,
          packed + group * packed_group + f * g.rows +
              begin * PackedColumns<E>(filters));
    }
  });

  // As many tiles as workers, or a multiple: all end at about the same time. A
  // pixel's sums do not depend on its tile.
  int64_t tiles = CeilDiv(g.total_pixels, kForwardPixels);
  if (!IsSerial(g)) tiles = RoundUp(tiles, parallel_for.num_workers);
  tiles = Min(tiles, g.total_pixels);
  RunTasks(parallel_for, tiles, [&](int64_t tile, int worker) {
    Arena place{scratch + worker * scratch_bytes};
    const ForwardScratch<T> s(&place);
    s.Clear();
    const int64_t first = g.total_pixels * tile / tiles;
    const int64_t count = g.total_pixels * (tile + 1) / tiles - first;
    LocatePixels(g, first, count, s.pixels);
    for (int64_t group = 0; group < g.groups; ++group) {
      for (int64_t f = 0; f < g.group_filters; f += kFilterBlock) {
        const int64_t filters = Min(kFilterBlock, g.group_filters - f);
        const E* b = packed + group * packed_group + f * g.rows;
        T* to = static_cast<T*>(output) + first * g.filters +
                group * g.group_filters + f;
        E* sums = s.sums;
        int64_t stride = kFilterBlock;
        if constexpr (!Operands<T>::kNarrow) {
          sums = to;
          stride = g.filters;
        }
        for (int64_t begin = 0; begin < g.rows; begin += kInner) {
          const int64_t end = Min(begin + kInner, g.rows);
          SampleColumns<T>(g, operands, count, group, begin, end, s);
          MatrixProduct<false>(count, filters, end - begin, s.columns,
                               b + begin * PackedColumns<E>(filters), sums,
                               stride, begin > 0);
        }
        if constexpr (Operands<T>::kNarrow) {
          for (int64_t row = 0; row < count; ++row) {
            NarrowRow(sums + row * stride, filters, to + row * g.filters);
          }
        }
      }
    }
  });
}

// -----------------------------------------------------------------------------
// Gradients of inputs, offset and mask.

// Rows of a group's kernel whose column gradients are made and used up
// together: as many as kPixelBytes lets a pixel keep.
template <typename E>
struct RowBlock {
  int64_t rows;    // a multiple of kPanel, but for a last block
  int64_t stride;  // of column gradients
  int64_t runs;    // in a block, at most

  explicit RowBlock(const Geometry& g) {
    for (int64_t blocks = 1;; ++blocks) {
      rows = RoundUp(CeilDiv(g.rows, blocks), kPanel<E>);
      stride = rows + 16;
      runs = Min(rows, (rows / g.group_channels + 2) *
                           (g.group_channels / g.offset_channels + 2));
      const int64_t bytes = stride * static_cast<int64_t>(sizeof(E)) +
                            runs * static_cast<int64_t>(sizeof(Sample<E>));
      if (bytes <= kPixelBytes || rows == kPanel<E>) return;
    }
  }
};

// The column gradients of a tile, and where their columns were sampled.
template <typename E>
struct DataTile {
  E* columns;          // [kDataPixels][block.stride]
  Sample<E>* samples;  // [kDataPixels][block.runs]
  Pixel* pixels;       // [kDataPixels]
  int64_t* extent;     // [2], first and last row of the image that it reads

  DataTile(const RowBlock<E>& block, Arena* arena)
      : columns(arena->Take<E>(kDataPixels * block.stride)),
        samples(arena->Take<Sample<E>>(kDataPixels * block.runs)),
        pixels(arena->Take<Pixel>(kDataPixels)),
        extent(arena->Take<int64_t>(2)) {}
};

// What a worker needs besides tiles.
template <typename T>
struct DataScratch {
  using E = typename AccumulatorOf<T>::Type;

  E* grad_rows;  // [kDataPixels][kTileStride], a tile of grad_output
  Run* runs;     // [block.runs]
  T* zeros;      // [block.rows]

  DataScratch(const RowBlock<E>& block, Arena* arena)
      : grad_rows(arena->Take<E>(kDataPixels * kTileStride)),
        runs(arena->Take<Run>(block.runs)),
        zeros(arena->Take<T>(block.rows)) {}
};

// How the work of one call is divided.
template <typename T>
struct DataPlan {
  using E = typename AccumulatorOf<T>::Type;

  Geometry g;
  RowBlock<E> block;
  bool scatter;           // is the gradient of the inputs wanted?
  int64_t tile_bytes;     // of a DataTile
  int64_t scratch_bytes;  // of a DataScratch
  int64_t image_bytes;    // of a float32 image, for 16-bit types
  int64_t worker_tiles;   // kept between making and scattering them
  int64_t tile_pixels;    // kDataPixels, or fewer for all to have a tile
  bool by_image;  // workers take whole images; else all share one at a time

  DataPlan(const DeformableConv2DParams& params, bool wants_inputs,
           int num_workers)
      : g(params), block(g), scatter(wants_inputs) {
    Arena tile{nullptr}, scratch{nullptr};
    DataTile<E>(block, &tile);
    DataScratch<T>(block, &scratch);
    tile_bytes = tile.used;
    scratch_bytes = scratch.used;
    image_bytes = Operands<T>::kNarrow && scatter
                      ? RoundUp(g.image * static_cast<int64_t>(sizeof(E)), 64)
                      : 0;
    worker_tiles =
        scatter ? Max(1, (kScratchBytes - scratch_bytes) / tile_bytes) : 1;
    // Whole images need no waiting for each other, if they come out even.
    const int64_t rounds = CeilDiv(g.batch, num_workers);
    by_image = num_workers == 1 ||
               (g.batch * 8 >= rounds * num_workers * 7 &&
                image_bytes + tile_bytes + scratch_bytes <= kScratchBytes);
    tile_pixels =
        by_image ? kDataPixels
                 : Max(1, Min(kDataPixels, CeilDiv(g.pixels, num_workers)));
  }

  int64_t KernelElements() const {
    return g.groups * g.group_filters * PackedColumns<E>(g.rows);
  }
  int64_t WorkerBytes() const {
    return scratch_bytes +
           (by_image ? tile_bytes + image_bytes : worker_tiles * tile_bytes);
  }
  int64_t SharedBytes() const { return by_image ? 0 : image_bytes; }
};

template <typename T>
static int64_t DataWorkspace(const DeformableConv2DParams& params,
                             bool wants_inputs, int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  const DataPlan<T> plan(params, wants_inputs, num_workers);
  Arena arena{nullptr};
  arena.Take<E>(plan.KernelElements());
  return arena.used + plan.SharedBytes() + num_workers * plan.WorkerBytes();
}

// Makes the column gradients and samples of `count` pixels of the batch's
// output from `first` on, rows [begin, end) of `group`, whose runs are s.runs.
template <typename T, typename E>
static void MakeColumnGradients(const DataPlan<T>& plan,
                                const Operands<T>& operands, const E* packed,
                                int64_t group, int64_t begin, int64_t end,
                                int64_t first, int64_t count, int64_t num_runs,
                                const DataScratch<T>& s,
                                const DataTile<E>& tile) {
  const Geometry& g = plan.g;
  for (int64_t f = 0; f < g.group_filters; f += kInner) {
    const int64_t filters = Min(kInner, g.group_filters - f);
    const int64_t filter = group * g.group_filters + f;
    for (int64_t row = 0; row < count; ++row) {
      WidenRow(operands.grad_output + (first + row) * g.filters + filter,
               filters, s.grad_rows + row * kTileStride);
    }
    MatrixProduct<false>(
        count, end - begin, filters, s.grad_rows,
        packed + filter * PackedColumns<E>(g.rows) + begin * filters,
        tile.columns, plan.block.stride, f > 0);
  }
  const Sampling<E> in(g, operands.offset, operands.mask);
  LocatePixels(g, first, count, tile.pixels);
  tile.extent[0] = g.height;
  tile.extent[1] = -1;
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t run = 0; run < num_runs; ++run) {
      const Sample<E> sample = Locate(in, tile.pixels[row], s.runs[run]);
      tile.samples[row * plan.block.runs + run] = sample;
      if (sample.flags == 0) continue;
      tile.extent[0] = Min(tile.extent[0], sample.top);
      tile.extent[1] = Max(tile.extent[1], sample.top + 1);
    }
  }
}

// Sums over a run's channels: column gradient times the sample's slopes and
// value.
template <typename E>
struct SampleGradient {
  E dy = 0, dx = 0, value = 0;

  template <typename T>
  SampleGradient(const Sample<E>& s, const Corners<T>& from, const E* columns,
                 int64_t count) {
    const Weights<E> weights(s);
    const E hy = 1 - s.ly, hx = 1 - s.lx, ly = s.ly, lx = s.lx;
    Vector<E, kLanes<E>> sums_dy = {}, sums_dx = {}, sums_value = {};
    ForEachVector<E>(count, [&](auto lanes, int64_t i) {
      constexpr int kN = lanes.value;
      using V = Vector<E, kN>;
      const V gradient = Load<kN>(columns + i);
      const V top_left = Load<kN>(from.top_left + i);
      const V top_right = Load<kN>(from.top_right + i);
      const V bottom_left = Load<kN>(from.bottom_left + i);
      const V bottom_right = Load<kN>(from.bottom_right + i);
      // Differences before products: a large common value must not drown the
      // slope.
      const V with_dy = gradient * (hx * (bottom_left - top_left) +
                                    lx * (bottom_right - top_right));
      const V with_dx = gradient * (hy * (top_right - top_left) +
                                    ly * (bottom_right - bottom_left));
      const V with_value = gradient * weights.template Mix<kN>(from, i);
      if constexpr (kN == kLanes<E>) {
        sums_dy += with_dy;
        sums_dx += with_dx;
        sums_value += with_value;
      } else {
        Add<kN>(with_dy, with_dx, with_value);
      }
    });
    Add<kLanes<E>>(sums_dy, sums_dx, sums_value);
  }

 private:
  template <int kN>
  void Add(const Vector<E, kN>& with_dy, const Vector<E, kN>& with_dx,
           const Vector<E, kN>& with_value) {
    dy += SumLanes<E, kN>(with_dy);
    dx += SumLanes<E, kN>(with_dx);
    value += SumLanes<E, kN>(with_value);
  }
};

// Adds a tile's share to the gradients of offset and mask (null: not wanted).
template <typename T, typename E>
static void ReduceToOffset(const DataPlan<T>& plan, const Operands<T>& operands,
                           int64_t begin, int64_t count, int64_t num_runs,
                           const DataScratch<T>& s, const DataTile<E>& tile,
                           E* grad_offset, E* grad_mask) {
  const Geometry& g = plan.g;
  const Sampling<E> in(g, operands.offset, operands.mask);
  __builtin_memset(static_cast<void*>(s.zeros), 0,
                   static_cast<size_t>(plan.block.rows) * sizeof(T));
  for (int64_t row = 0; row < count; ++row) {
    const Pixel& pixel = tile.pixels[row];
    const T* image = operands.inputs + pixel.n * g.image;
    for (int64_t index = 0; index < num_runs; ++index) {
      const Run& run = s.runs[index];
      const Sample<E>& sample = tile.samples[row * plan.block.runs + index];
      if (sample.flags == 0) continue;
      const SampleGradient<E> sums(
          sample, Corners<T>(in, sample, image, run.channel, s.zeros),
          tile.columns + row * plan.block.stride + (run.row - begin),
          run.count);
      const int64_t field = pixel.fields + run.field;
      if (grad_offset != nullptr && !(sample.flags & Sample<E>::kHeldY)) {
        grad_offset[2 * field] += sample.mask * sums.dy;
      }
      if (grad_offset != nullptr && !(sample.flags & Sample<E>::kHeldX)) {
        grad_offset[2 * field + 1] += sample.mask * sums.dx;
      }
      if (grad_mask != nullptr) grad_mask[field] += sums.value;
    }
  }
}

// Adds a tile's share to rows [first, last) of one image's gradient.
template <typename T, typename E>
static void ScatterToImage(const DataPlan<T>& plan, int64_t begin,
                           int64_t count, int64_t num_runs, const Run* runs,
                           const DataTile<E>& tile, int64_t first, int64_t last,
                           E* image) {
  using S = Sample<E>;
  const Geometry& g = plan.g;
  if (tile.extent[1] < first || tile.extent[0] >= last) return;
  const int64_t image_row = g.width * g.channels;
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t index = 0; index < num_runs; ++index) {
      const Run& run = runs[index];
      const S& sample = tile.samples[row * plan.block.runs + index];
      if (sample.flags == 0) continue;
      uint32_t mine = 0;  // the corners in my rows
      if (sample.top >= first && sample.top < last) {
        mine |= S::kTopLeft | S::kTopRight;
      }
      if (sample.top + 1 >= first && sample.top + 1 < last) {
        mine |= S::kBottomLeft | S::kBottomRight;
      }
      mine &= sample.flags;
      if (mine == 0) continue;
      const E* columns =
          tile.columns + row * plan.block.stride + (run.row - begin);
      const Weights<E> weights(sample);
      const E mask = sample.mask;
      const auto add = [&](uint32_t corner, int64_t distance, E weight) {
        if (!(mine & corner)) return;
        E* to = image + sample.corner + run.channel + distance;
        ForEachVector<E>(run.count, [&](auto lanes, int64_t i) {
          constexpr int kN = lanes.value;
          const Vector<E, kN> gradient = mask * Load<kN>(columns + i);
          Store(Load<kN>(to + i) + weight * gradient, to + i);
        });
      };
      add(S::kTopLeft, 0, weights.top_left);
      add(S::kTopRight, g.channels, weights.top_right);
      add(S::kBottomLeft, image_row, weights.bottom_left);
      add(S::kBottomRight, image_row + g.channels, weights.bottom_right);
    }
  }
}

template <typename T>
static void DataPass(const DeformableConv2DParams& params,
                     const DeformableConv2DInputs& inputs,
                     const void* grad_output, void* workspace,
                     const DeformableConv2DGradients& gradients,
                     const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  constexpr bool kNarrow = Operands<T>::kNarrow;
  const DataPlan<T> plan(params, gradients.inputs != nullptr,
                         parallel_for.num_workers);
  const Geometry& g = plan.g;
  const Operands<T> operands(inputs, grad_output);
  T* const grad_inputs = static_cast<T*>(gradients.inputs);
  E* const grad_offset = static_cast<E*>(gradients.offset);
  E* const grad_mask = static_cast<E*>(gradients.mask);

  const int64_t field_bytes = g.total_pixels * g.offset_groups * g.taps *
                              static_cast<int64_t>(sizeof(E));
  if (grad_inputs != nullptr && (!kNarrow || g.total_pixels == 0)) {
    Zero(parallel_for, grad_inputs,
         g.batch * g.image * static_cast<int64_t>(sizeof(T)));
  }
  if (grad_offset != nullptr) Zero(parallel_for, grad_offset, 2 * field_bytes);
  if (grad_mask != nullptr) Zero(parallel_for, grad_mask, field_bytes);
  if (g.total_pixels == 0) return;

  Arena arena{static_cast<char*>(workspace)};
  E* const packed = arena.Take<E>(plan.KernelElements());
  char* const scratch = arena.base + arena.used;

  const int64_t filter_blocks = CeilDiv(g.group_filters, kInner);
  RunTasks(parallel_for, g.groups * filter_blocks, [&](int64_t task, int) {
    const int64_t f = task % filter_blocks * kInner;
    const int64_t filter = task / filter_blocks * g.group_filters + f;
    PackPanels<T, E>(operands.kernel + filter, 1, g.filters,
                     Min(kInner, g.group_filters - f), g.rows,
                     packed + filter * PackedColumns<E>(g.rows));
  });

  // One image. Every worker of `inner` has a scratch; `pool` has room for
  // `places` tiles: one for each tile that waits to be scattered or, where
  // nothing is scattered, for each worker. `sums` is a float32 image for 16-bit
  // types.
  const auto process_image = [&](int64_t n, const ParallelFor& inner,
                                 char* scratches, char* pool, int64_t places,
                                 E* sums) {
    if constexpr (!kNarrow) {
      if (plan.scatter) sums = grad_inputs + n * g.image;
    } else if (plan.scatter) {
      Zero(inner, sums, g.image * static_cast<int64_t>(sizeof(E)));
    }
    const auto scratch_of = [&](int worker) {
      Arena place{scratches + worker * plan.scratch_bytes};
      return DataScratch<T>(plan.block, &place);
    };
    const auto tile_at = [&](int64_t index) {
      Arena place{pool + index * plan.tile_bytes};
      return DataTile<E>(plan.block, &place);
    };
    const int64_t tiles = CeilDiv(g.pixels, plan.tile_pixels);
    const int64_t tiles_at_once = plan.scatter ? places : tiles;
    const int64_t workers = inner.num_workers;
    const auto pixels_of = [&](int64_t tile) {
      return Min(plan.tile_pixels, g.pixels - tile * plan.tile_pixels);
    };
    for (int64_t group = 0; group < g.groups; ++group) {
      for (int64_t begin = 0; begin < g.rows; begin += plan.block.rows) {
        const int64_t end = Min(begin + plan.block.rows, g.rows);
        for (int64_t tile = 0; tile < tiles; tile += tiles_at_once) {
          const int64_t now = Min(tiles_at_once, tiles - tile);
          // A worker makes neighbouring tiles and then scatters to the rows
          // around them: most of what it reads is in its own cache.
          const int64_t parts = plan.scatter ? Min(now, workers) : now;
          RunTasks(inner, parts, [&](int64_t part, int worker) {
            const DataScratch<T> s = scratch_of(worker);
            const int64_t num_runs = FindRuns(g, group, begin, end, s.runs);
            for (int64_t index = now * part / parts;
                 index < now * (part + 1) / parts; ++index) {
              const DataTile<E> made = tile_at(plan.scatter ? index : worker);
              const int64_t first =
                  n * g.pixels + (tile + index) * plan.tile_pixels;
              const int64_t count = pixels_of(tile + index);
              MakeColumnGradients<T, E>(plan, operands, packed, group, begin,
                                        end, first, count, num_runs, s, made);
              if (grad_offset == nullptr && grad_mask == nullptr) continue;
              ReduceToOffset<T, E>(plan, operands, begin, count, num_runs, s,
                                   made, grad_offset, grad_mask);
            }
          });
          if (!plan.scatter) continue;
          // Rows of the image up to the middle of the kernel at pixel q.
          const auto rows_before = [&](int64_t part) {
            if (part == 0) return int64_t{0};
            if (part == workers) return g.height;
            const int64_t q = (tile + now * part / workers) * plan.tile_pixels;
            const int64_t y = q / g.out_w * g.stride_h - g.pad_top +
                              (g.kernel_h - 1) * g.dilation_h / 2;
            return Max(0, Min(y, g.height));
          };
          RunTasks(inner, workers, [&](int64_t part, int worker) {
            const DataScratch<T> s = scratch_of(worker);
            const int64_t num_runs = FindRuns(g, group, begin, end, s.runs);
            for (int64_t made = 0; made < now; ++made) {
              ScatterToImage<T, E>(plan, begin, pixels_of(tile + made),
                                   num_runs, s.runs, tile_at(made),
                                   rows_before(part), rows_before(part + 1),
                                   sums);
            }
          });
        }
      }
    }
    if constexpr (kNarrow) {
      if (!plan.scatter) return;
      RunTasks(inner, g.height, [&](int64_t y, int) {
        const int64_t row = g.width * g.channels;
        NarrowRow(sums + y * row, row, grad_inputs + n * g.image + y * row);
      });
    }
  };

  if (plan.by_image) {
    RunTasks(parallel_for, g.batch, [&](int64_t n, int worker) {
      char* mine = scratch + worker * plan.WorkerBytes();
      char* tile = mine + plan.scratch_bytes;
      process_image(n, ParallelFor(), mine, tile, 1,
                    reinterpret_cast<E*>(tile + plan.tile_bytes));
    });
    return;
  }
  const int64_t workers = parallel_for.num_workers;
  char* const scratches = scratch + plan.SharedBytes();
  for (int64_t n = 0; n < g.batch; ++n) {
    process_image(n, parallel_for, scratches,
                  scratches + workers * plan.scratch_bytes,
                  workers * plan.worker_tiles, reinterpret_cast<E*>(scratch));
  }
}

// -----------------------------------------------------------------------------
// Gradient of the kernel.

template <typename T>
struct KernelScratch : ColumnScratch<T> {
  using E = typename AccumulatorOf<T>::Type;

  E* grad_packed;  // a tile of grad_output as a packed B

  explicit KernelScratch(Arena* arena)
      : ColumnScratch<T>(kKernelPixels, arena),
        grad_packed(arena->Take<E>(kKernelPixels * kFilterBlock)) {}

  static int64_t Bytes() {
    Arena arena{nullptr};
    KernelScratch{&arena};
    return arena.used;
  }
};

template <typename T>
static int64_t KernelWorkspace(const DeformableConv2DParams& params,
                               int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry g(params);
  Arena arena{nullptr};
  arena.Take<E>(Operands<T>::kNarrow ? g.rows * g.filters : 0);
  return arena.used + num_workers * KernelScratch<T>::Bytes();
}

template <typename T>
static void KernelPass(const DeformableConv2DParams& params,
                       const DeformableConv2DInputs& inputs,
                       const void* grad_output, void* workspace,
                       void* grad_kernel, const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  constexpr bool kNarrow = Operands<T>::kNarrow;
  const Geometry g(params);
  const Operands<T> operands(inputs, grad_output);
  const int64_t size = g.rows * g.filters;
  Arena arena{static_cast<char*>(workspace)};
  E* sums = arena.Take<E>(kNarrow ? size : 0);
  if constexpr (!kNarrow) sums = static_cast<E*>(grad_kernel);
  char* const scratch = arena.base + arena.used;
  const int64_t scratch_bytes = KernelScratch<T>::Bytes();
  Zero(parallel_for, sums, size * static_cast<int64_t>(sizeof(E)));

  // The rows of all groups, one after another, in parts of whole micro rows. A
  // part packs grad_output for itself, so there are no more parts than keep the
  // workers busy to the end.
  const int64_t all_rows = g.groups * g.rows;
  int64_t parts = 1;
  if (parallel_for.num_workers > 1 && !IsSerial(g)) {
    parts = Min(2 * parallel_for.num_workers, CeilDiv(all_rows, kMicroRows));
  }
  const int64_t part_rows = RoundUp(CeilDiv(all_rows, parts), kMicroRows);
  RunTasks(parallel_for, parts, [&](int64_t part, int worker) {
    Arena place{scratch + worker * scratch_bytes};
    const KernelScratch<T> s(&place);
    s.Clear();
    const int64_t part_end = Min((part + 1) * part_rows, all_rows);
    for (int64_t first = 0; first < g.total_pixels; first += kKernelPixels) {
      const int64_t count = Min(kKernelPixels, g.total_pixels - first);
      LocatePixels(g, first, count, s.pixels);
      for (int64_t row = part * part_rows; row < part_end;) {  // by group
        const int64_t group = row / g.rows;
        const int64_t rows_begin = row - group * g.rows;
        const int64_t rows_end = Min(part_end - group * g.rows, g.rows);
        for (int64_t f = 0; f < g.group_filters; f += kFilterBlock) {
          const int64_t filters = Min(kFilterBlock, g.group_filters - f);
          const int64_t filter = group * g.group_filters + f;
          PackPanels<T, E>(operands.grad_output + first * g.filters + filter,
                           g.filters, 1, count, filters, s.grad_packed);
          for (int64_t begin = rows_begin; begin < rows_end; begin += kInner) {
            const int64_t end = Min(begin + kInner, rows_end);
            SampleColumns<T>(g, operands, count, group, begin, end, s);
            MatrixProduct<true>(
                end - begin, filters, count, s.columns, s.grad_packed,
                sums + begin * g.filters + filter, g.filters, true);
          }
        }
        row = group * g.rows + rows_end;
      }
    }
  });
  if constexpr (kNarrow) {
    RunTasks(parallel_for, g.rows, [&](int64_t row, int) {
      NarrowRow(sums + row * g.filters, g.filters,
                static_cast<T*>(grad_kernel) + row * g.filters);
    });
  }
}

// -----------------------------------------------------------------------------
// What deformable_conv2d_cpu.cc chooses from.

static bool WantsData(const DeformableConv2DGradients& wanted) {
  return wanted.inputs != nullptr || wanted.offset != nullptr ||
         wanted.mask != nullptr;
}

static int64_t WorkspaceBytes(const DeformableConv2DParams& params,
                              DataType type, int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    bytes = ForwardWorkspace<decltype(zero)>(params, num_workers);
  });
  return bytes;
}

// The passes run one after the other in the same workspace.
static int64_t BackwardWorkspaceBytes(const DeformableConv2DParams& params,
                                      DataType type,
                                      const DeformableConv2DGradients& wanted,
                                      int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    if (WantsData(wanted)) {
      bytes = DataWorkspace<T>(params, wanted.inputs != nullptr, num_workers);
    }
    if (wanted.kernel != nullptr) {
      bytes = Max(bytes, KernelWorkspace<T>(params, num_workers));
    }
  });
  return bytes;
}

static void Forward(const DeformableConv2DParams& params, DataType type,
                    const DeformableConv2DInputs& operands, void* workspace,
                    void* output, const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    ForwardPass<decltype(zero)>(params, operands, workspace, output,
                                parallel_for);
  });
}

static void Backward(const DeformableConv2DParams& params, DataType type,
                     const DeformableConv2DInputs& operands,
                     const void* grad_output, void* workspace,
                     const DeformableConv2DGradients& gradients,
                     const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    if (WantsData(gradients)) {
      DataPass<T>(params, operands, grad_output, workspace, gradients,
                  parallel_for);
    }
    if (gradients.kernel != nullptr) {
      KernelPass<T>(params, operands, grad_output, workspace, gradients.kernel,
                    parallel_for);
    }
  });
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

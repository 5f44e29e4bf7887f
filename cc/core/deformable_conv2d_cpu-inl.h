// Deformable convolution on the CPU, for one instruction set: how a tile flows.
// SPDX-License-Identifier: Apache-2.0
//
// No include guard: see simd_cpu-inl.h.
//
// The convolution is a matrix product of columns (a row for every output pixel; an entry for every tap and channel: the
// sample there times its mask) and the kernel (rows in the same order of taps and channels; a column for every filter).
// The columns exist only as tiles, some pixels by some taps and channels, in a worker's scratch:
//
//   forward          a tile of columns is sampled and at once multiplied by the packed kernel into its pixels' outputs.
//   data gradient    the gradient of a tile's columns is grad_output times the transposed packed kernel. A second look at
//                    the image's corners turns it into gradients of offset and mask, which belong to the tile's own
//                    pixels. The gradient of the inputs lands anywhere in the image: it is scattered by one worker a
//                    channel slice, pixel after pixel, so the order of sums never depends on the number of workers.
//   kernel gradient  rows of the kernel (taps and channels) are divided among workers; each samples its part of the
//                    columns, tile after tile over all pixels, and adds the transposed tile times grad_output.
//
// Where the samples lie is worked out once for every tap and offset group (Sample) and shared by the group's channels.
// Tensor indices: n image, q pixel in an image's output (row major), r row of one group's kernel = tap * group_channels +
// channel in the group. "Group" alone is a group of the convolution, not an offset group.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Bytes of scratch a worker may use besides a packed kernel (see Forward's contract).
constexpr int64_t kScratchBytes = int64_t{4} << 20;

constexpr int64_t kForwardPixels = kMicroRows == 14 ? 126 : 120;  // pixels in a tile, at most: multiples of kMicroRows
constexpr int64_t kDataPixels = kMicroRows == 14 ? 56 : 54;
constexpr int64_t kKernelPixels = 128;        // inner dimension of the kernel gradient's products
constexpr int64_t kFilterBlock = 1024;        // filters in a product, at most
constexpr int64_t kPixelBytes = 12 << 10;     // column gradients and samples kept for one pixel, at most
constexpr int64_t kSliceLanes = 16;           // channel slices are multiples of it: no cache line has two writers
constexpr int64_t kSerialWork = 1 << 17;      // multiplications below which one worker does it all

// Hands out parts of a workspace; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename E>
  E* Take(int64_t count) {
    E* part = base == nullptr ? nullptr : reinterpret_cast<E*>(base + used);
    used += RoundUp(count * static_cast<int64_t>(sizeof(E)), 64);
    return part;
  }
};

// parallel_for with denormals on in every task: pools differ in their mode from the threads that call them, and results
// must not depend on who ran what.
template <typename Body>
static void Run(const ParallelFor& parallel_for, int64_t num_tasks, const Body& body) {
  parallel_for(num_tasks, [&body](int64_t index, int worker) {
    const ScopedFloatingPointMode mode;
    body(index, worker);
  });
}

static void Zero(const ParallelFor& parallel_for, void* to, int64_t bytes) {
  constexpr int64_t kPiece = 1 << 20;
  Run(parallel_for, CeilDiv(bytes, kPiece), [=](int64_t piece, int) {
    __builtin_memset(static_cast<char*>(to) + piece * kPiece, 0,
                     static_cast<size_t>(Min(kPiece, bytes - piece * kPiece)));
  });
}

// Sizes derived from the parameters, in elements.
struct Geometry : DeformableConv2DParams {
  int64_t taps, pixels;                    // of the kernel; of one image's output
  int64_t group_channels, group_filters;   // of one convolution group
  int64_t offset_channels;                 // of one offset group
  int64_t rows;                            // of one group's kernel: taps * group_channels
  int64_t image, total_pixels;             // elements of one input image; output pixels of the batch

  explicit Geometry(const DeformableConv2DParams& params)
      : DeformableConv2DParams(params),
        taps(kernel_h * kernel_w),
        pixels(out_h * out_w),
        group_channels(channels / groups),
        group_filters(filters / groups),
        offset_channels(channels / offset_groups),
        rows(taps * group_channels),
        image(height * width * channels),
        total_pixels(batch * pixels) {}
};

// Where one tap of one output pixel reads, for all channels of an offset group.
template <typename E>
struct Sample {
  // Corners inside the image, and the axes along which the edge is held (no derivative there). 0: a sample outside.
  enum : uint32_t { kTopLeft = 1, kTopRight = 2, kBottomLeft = 4, kBottomRight = 8, kHeldY = 16, kHeldX = 32 };

  int64_t corner;  // element of the top left corner, channel 0, in its image
  uint32_t flags;
  E ly, lx;        // distance from the top left corner, in [0, 1)
  E mask;
};

// The output pixel that a row of a tile stands for.
struct Pixel {
  int64_t n, q;
  int64_t y, x;  // input coordinates of tap (0, 0) at zero offset
};

static inline void LocatePixels(const Geometry& g, int64_t first, int64_t count, Pixel* to) {
  int64_t n = first / g.pixels, q = first % g.pixels;
  for (int64_t row = 0; row < count; ++row) {
    to[row] = {n, q, q / g.out_w * g.stride_h - g.pad_top, q % g.out_w * g.stride_w - g.pad_left};
    if (++q == g.pixels) ++n, q = 0;
  }
}

// One axis of a sample: false if it lies outside, which NaN and infinity do by the form of the comparisons.
template <typename E>
static inline bool LocateAxis(Boundary boundary, E position, int64_t size, int64_t* low, E* fraction, bool* has_low,
                              bool* has_high, bool* held) {
  const E limit = static_cast<E>(size);
  *held = false;
  if (boundary == Boundary::kZeros) {
    if (!(position > E(-1) && position < limit)) return false;
  } else {
    if (!(position >= E(0) && position < limit)) return false;
  }
  *low = static_cast<int64_t>(position);
  *low -= position < static_cast<E>(*low);
  *fraction = position - static_cast<E>(*low);
  if (boundary == Boundary::kClamp && *low >= size - 1) {
    *low = size - 1;
    *fraction = 0;
    *held = true;
  }
  *has_low = *low >= 0 && *low < size;
  *has_high = *low + 1 < size && !*held;
  return true;
}

template <typename E>
static inline Sample<E> Locate(const Geometry& g, const Pixel& pixel, int64_t tap, int64_t offset_group, const E* offset,
                               const E* mask) {
  using S = Sample<E>;
  const int64_t field = ((pixel.n * g.pixels + pixel.q) * g.offset_groups + offset_group) * g.taps + tap;
  const E y = static_cast<E>(pixel.y + tap / g.kernel_w * g.dilation_h) + offset[2 * field];
  const E x = static_cast<E>(pixel.x + tap % g.kernel_w * g.dilation_w) + offset[2 * field + 1];
  S sample;
  sample.flags = 0;
  int64_t top, left;
  bool has_top, has_bottom, has_left, has_right, held_y, held_x;
  if (!LocateAxis(g.boundary, y, g.height, &top, &sample.ly, &has_top, &has_bottom, &held_y) ||
      !LocateAxis(g.boundary, x, g.width, &left, &sample.lx, &has_left, &has_right, &held_x)) {
    return sample;
  }
  sample.corner = (top * g.width + left) * g.channels;
  sample.flags = (has_top && has_left ? S::kTopLeft : 0u) | (has_top && has_right ? S::kTopRight : 0u) |
                 (has_bottom && has_left ? S::kBottomLeft : 0u) | (has_bottom && has_right ? S::kBottomRight : 0u);
  if (sample.flags != 0) sample.flags |= (held_y ? S::kHeldY : 0u) | (held_x ? S::kHeldX : 0u);
  sample.mask = mask == nullptr ? E(1) : mask[field];
  return sample;
}

// Calls body(first row, count, tap, first channel, offset group) for the runs of rows [begin, end) of `group` that share
// a tap and an offset group.
template <typename Body>
static inline __attribute__((always_inline)) void ForEachRun(const Geometry& g, int64_t group, int64_t begin,
                                                             int64_t end, const Body& body) {
  for (int64_t r = begin, count; r < end; r += count) {
    const int64_t in_group = r % g.group_channels;
    const int64_t channel = group * g.group_channels + in_group;
    count = Min(end - r, Min(g.group_channels - in_group, g.offset_channels - channel % g.offset_channels));
    body(r, count, r / g.group_channels, channel, channel / g.offset_channels);
  }
}

// The corners of a sample from `channel` on; a corner outside the image reads zeros.
template <typename T, typename E>
struct Corners {
  const T *top_left, *top_right, *bottom_left, *bottom_right;

  Corners(const Geometry& g, const Sample<E>& sample, const T* image, int64_t channel, const T* zeros) {
    using S = Sample<E>;
    const T* first = image + sample.corner + channel;
    const int64_t row = g.width * g.channels;
    top_left = sample.flags & S::kTopLeft ? first : zeros;
    top_right = sample.flags & S::kTopRight ? first + g.channels : zeros;
    bottom_left = sample.flags & S::kBottomLeft ? first + row : zeros;
    bottom_right = sample.flags & S::kBottomRight ? first + row + g.channels : zeros;
  }
};

// Weights of the four corners of a sample.
template <typename E>
struct Weights {
  E top_left, top_right, bottom_left, bottom_right;

  explicit Weights(const Sample<E>& s)
      : top_left((1 - s.ly) * (1 - s.lx)),
        top_right((1 - s.ly) * s.lx),
        bottom_left(s.ly * (1 - s.lx)),
        bottom_right(s.ly * s.lx) {}
};

// Operands and their types: what the three passes have in common.
template <typename T>
struct Operands {
  using E = typename AccumulatorOf<T>::Type;

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

// Samples rows [begin, end) of `group`, at most kInner, for the pixels of a tile: columns[row][r - begin], row stride
// kTileStride. `zeros` holds kInner zeros.
template <typename T, typename E>
static void SampleColumns(const Geometry& g, const Operands<T>& operands, const Pixel* pixels, int64_t num_pixels,
                          int64_t group, int64_t begin, int64_t end, const T* zeros, E* columns) {
  ForEachRun(g, group, begin, end,
             [&](int64_t r, int64_t count, int64_t tap, int64_t channel, int64_t offset_group) {
               for (int64_t row = 0; row < num_pixels; ++row) {
                 E* to = columns + row * kTileStride + (r - begin);
                 const Sample<E> sample =
                     Locate(g, pixels[row], tap, offset_group, operands.offset, operands.mask);
                 if (sample.flags == 0) {
                   for (int64_t i = 0; i < count; ++i) to[i] = 0;
                   continue;
                 }
                 const Corners<T, E> from(g, sample, operands.inputs + pixels[row].n * g.image, channel, zeros);
                 const Weights<E> weights(sample);
                 const E mask = sample.mask;
                 ForEachVector<E>(count, [&](auto lanes, int64_t i) {
                   constexpr int kN = lanes.value;
                   Store((weights.top_left * Load<kN>(from.top_left + i) +
                          weights.top_right * Load<kN>(from.top_right + i) +
                          weights.bottom_left * Load<kN>(from.bottom_left + i) +
                          weights.bottom_right * Load<kN>(from.bottom_right + i)) *
                             mask,
                         to + i);
                 });
               }
             });
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward.

template <typename T>
struct ForwardScratch {
  using E = typename AccumulatorOf<T>::Type;
  static constexpr bool kNarrow = sizeof(T) < sizeof(E);  // sums need a place of their own

  E* columns;  // [kForwardPixels][kTileStride]
  E* sums;     // [kForwardPixels][kFilterBlock]
  T* zeros;    // [kInner]
  Pixel* pixels;

  explicit ForwardScratch(Arena* arena)
      : columns(arena->Take<E>(kForwardPixels * kTileStride)),
        sums(arena->Take<E>(kNarrow ? kForwardPixels * kFilterBlock : 0)),
        zeros(arena->Take<T>(kInner)),
        pixels(arena->Take<Pixel>(kForwardPixels)) {}
};

// The kernel packed for the forward pass: for every group, block of filters and block of rows, a packed B.
template <typename E>
static int64_t ForwardKernelElements(const Geometry& g) {
  const int64_t whole = g.group_filters / kFilterBlock * kFilterBlock;
  return g.groups * g.rows * (whole + PackedColumns<E>(g.group_filters - whole));
}

template <typename T>
static int64_t ForwardWorkspace(const DeformableConv2DParams& params, int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  Arena arena{nullptr};
  arena.Take<E>(ForwardKernelElements<E>(Geometry(params)));
  for (int worker = 0; worker < num_workers; ++worker) ForwardScratch<T>{&arena};
  return arena.used;
}

template <typename T>
static void ForwardPass(const DeformableConv2DParams& params, const DeformableConv2DInputs& inputs, void* workspace,
                        void* output, const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry g(params);
  if (g.total_pixels == 0) return;
  const Operands<T> operands(inputs, nullptr);
  Arena arena{static_cast<char*>(workspace)};
  E* packed = arena.Take<E>(ForwardKernelElements<E>(g));
  const int64_t packed_group = ForwardKernelElements<E>(g) / g.groups;
  char* const scratch = arena.base + arena.used;
  Arena sizer{nullptr};
  ForwardScratch<T>{&sizer};
  const int64_t scratch_bytes = sizer.used;

  const int64_t row_blocks = CeilDiv(g.rows, kInner);
  Run(parallel_for, g.groups * row_blocks, [&](int64_t task, int) {
    const int64_t group = task / row_blocks, begin = task % row_blocks * kInner;
    const int64_t count = Min(kInner, g.rows - begin);
    for (int64_t f = 0; f < g.group_filters; f += kFilterBlock) {
      const int64_t filters = Min(kFilterBlock, g.group_filters - f);
      PackPanels<T, E>(operands.kernel + begin * g.filters + group * g.group_filters + f, g.filters, 1, count, filters,
                       packed + group * packed_group + f * g.rows + begin * PackedColumns<E>(filters));
    }
  });

  // As many tiles as workers, or a multiple: all end at about the same time. A pixel's sums do not depend on its tile.
  int64_t tiles = CeilDiv(g.total_pixels, kForwardPixels);
  if (g.total_pixels * g.rows * g.group_filters >= kSerialWork) tiles = RoundUp(tiles, parallel_for.num_workers);
  tiles = Min(tiles, g.total_pixels);
  Run(parallel_for, tiles, [&](int64_t tile, int worker) {
    Arena part{scratch + worker * scratch_bytes};
    const ForwardScratch<T> s(&part);
    const int64_t first = g.total_pixels * tile / tiles;
    const int64_t count = g.total_pixels * (tile + 1) / tiles - first;
    LocatePixels(g, first, count, s.pixels);
    __builtin_memset(s.zeros, 0, kInner * sizeof(T));
    for (int64_t group = 0; group < g.groups; ++group) {
      for (int64_t f = 0; f < g.group_filters; f += kFilterBlock) {
        const int64_t filters = Min(kFilterBlock, g.group_filters - f);
        const E* b = packed + group * packed_group + f * g.rows;
        T* to = static_cast<T*>(output) + first * g.filters + group * g.group_filters + f;
        E* sums = s.sums;
        int64_t stride = kFilterBlock;
        if constexpr (!ForwardScratch<T>::kNarrow) {
          sums = to;
          stride = g.filters;
        }
        for (int64_t begin = 0; begin < g.rows; begin += kInner) {
          const int64_t end = Min(begin + kInner, g.rows);
          SampleColumns<T, E>(g, operands, s.pixels, count, group, begin, end, s.zeros, s.columns);
          MatrixProduct<false>(count, filters, end - begin, s.columns, b + begin * PackedColumns<E>(filters), sums,
                               stride, begin > 0);
        }
        if constexpr (ForwardScratch<T>::kNarrow) {
          for (int64_t row = 0; row < count; ++row) {
            NarrowRow(sums + row * stride, filters, to + row * g.filters);
          }
        }
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients of inputs, offset and mask.

// Rows of a group's kernel whose column gradients are made and used up together: as many as kPixelBytes lets a pixel keep.
template <typename E>
struct RowBlock {
  int64_t rows;     // a multiple of kPanel, but for a last block
  int64_t stride;   // of column gradients
  int64_t samples;  // runs in a block, at most

  explicit RowBlock(const Geometry& g) {
    int64_t blocks = 1;
    for (;; ++blocks) {
      rows = RoundUp(CeilDiv(g.rows, blocks), kPanel<E>);
      stride = rows + 16;
      samples = Min(rows, (rows / g.group_channels + 2) * (g.group_channels / g.offset_channels + 2));
      const int64_t bytes =
          stride * static_cast<int64_t>(sizeof(E)) + samples * static_cast<int64_t>(sizeof(Sample<E>));
      if (bytes <= kPixelBytes || rows == kPanel<E>) return;
    }
  }
};

template <typename E>
struct DataTile {
  E* columns;          // [kDataPixels][block.stride], their gradients
  Sample<E>* samples;  // [kDataPixels][block.samples]
  Pixel* pixels;       // [kDataPixels]

  DataTile(const RowBlock<E>& block, Arena* arena)
      : columns(arena->Take<E>(kDataPixels * block.stride)),
        samples(arena->Take<Sample<E>>(kDataPixels * block.samples)),
        pixels(arena->Take<Pixel>(kDataPixels)) {}
};

// How the work of one call is divided.
template <typename T>
struct DataPlan {
  using E = typename AccumulatorOf<T>::Type;
  static constexpr bool kNarrow = sizeof(T) < sizeof(E);

  Geometry g;
  RowBlock<E> block;
  bool scatter;              // is the gradient of the inputs wanted?
  int64_t tile_bytes;        // of a DataTile
  int64_t row_bytes;         // of a tile's rows of grad_output, and zeros
  int64_t image_bytes;       // of a float32 image of the inputs' gradient
  int64_t tiles_per_worker;  // kept between making column gradients and scattering them
  bool by_image;             // workers take whole images; else all work on one image at a time

  DataPlan(const DeformableConv2DParams& params, bool wants_inputs, int num_workers)
      : g(params), block(g), scatter(wants_inputs) {
    Arena tile{nullptr};
    DataTile<E>(block, &tile);
    tile_bytes = tile.used;
    Arena row{nullptr};
    row.Take<E>(kDataPixels * kTileStride);
    row.Take<T>(block.rows);
    row_bytes = row.used;
    image_bytes = kNarrow && scatter ? RoundUp(g.image * static_cast<int64_t>(sizeof(E)), 64) : 0;
    tiles_per_worker = scatter ? Max(1, (kScratchBytes - row_bytes) / tile_bytes) : 1;
    const int64_t rounds = CeilDiv(g.batch, num_workers);
    by_image = num_workers == 1 || (g.batch * 8 >= rounds * num_workers * 7 &&
                                    image_bytes + tile_bytes + row_bytes <= kScratchBytes);
  }

  int64_t KernelElements() const { return g.groups * g.group_filters * PackedColumns<E>(g.rows); }
  int64_t WorkerBytes() const {
    return row_bytes + (by_image ? tile_bytes + image_bytes : tiles_per_worker * tile_bytes);
  }
  int64_t SharedBytes() const { return by_image ? 0 : image_bytes; }
};

template <typename T>
static int64_t DataWorkspace(const DeformableConv2DParams& params, bool wants_inputs, int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  const DataPlan<T> plan(params, wants_inputs, num_workers);
  Arena arena{nullptr};
  arena.Take<E>(plan.KernelElements());
  return arena.used + plan.SharedBytes() + num_workers * plan.WorkerBytes();
}

// Column gradients and samples of a tile: `count` pixels of image n from q on, rows [begin, end) of `group`.
template <typename T, typename E>
static void MakeColumnGradients(const DataPlan<T>& plan, const Operands<T>& operands, const E* packed, int64_t group,
                                int64_t begin, int64_t end, int64_t n, int64_t q, int64_t count, E* grad_rows,
                                const DataTile<E>& tile) {
  const Geometry& g = plan.g;
  const int64_t packed_columns = PackedColumns<E>(g.rows);
  for (int64_t f = 0; f < g.group_filters; f += kInner) {
    const int64_t filters = Min(kInner, g.group_filters - f);
    for (int64_t row = 0; row < count; ++row) {
      WidenRow(operands.grad_output + (n * g.pixels + q + row) * g.filters + group * g.group_filters + f, filters,
               grad_rows + row * kTileStride);
    }
    MatrixProduct<false>(count, end - begin, filters, grad_rows,
                         packed + (group * g.group_filters + f) * packed_columns + begin * filters, tile.columns,
                         plan.block.stride, f > 0);
  }
  LocatePixels(g, n * g.pixels + q, count, tile.pixels);
  int64_t run = 0;
  ForEachRun(g, group, begin, end, [&](int64_t, int64_t, int64_t tap, int64_t, int64_t offset_group) {
    for (int64_t row = 0; row < count; ++row) {
      tile.samples[row * plan.block.samples + run] =
          Locate(g, tile.pixels[row], tap, offset_group, operands.offset, operands.mask);
    }
    ++run;
  });
}

// Adds a tile's share to the gradients of offset and mask (null: not wanted): sums over the channels of each run.
template <typename T, typename E>
static void ReduceToOffset(const DataPlan<T>& plan, const Operands<T>& operands, int64_t group, int64_t begin,
                           int64_t end, int64_t count, const DataTile<E>& tile, const T* zeros, E* grad_offset,
                           E* grad_mask) {
  const Geometry& g = plan.g;
  for (int64_t row = 0; row < count; ++row) {
    const Pixel& pixel = tile.pixels[row];
    const T* image = operands.inputs + pixel.n * g.image;
    const Sample<E>* sample = tile.samples + row * plan.block.samples;
    ForEachRun(g, group, begin, end,
               [&](int64_t r, int64_t channels, int64_t tap, int64_t channel, int64_t offset_group) {
                 const Sample<E>& s = *sample++;
                 if (s.flags == 0) return;
                 const Corners<T, E> from(g, s, image, channel, zeros);
                 const Weights<E> weights(s);
                 const E* columns = tile.columns + row * plan.block.stride + (r - begin);
                 const E hy = 1 - s.ly, hx = 1 - s.lx, ly = s.ly, lx = s.lx;
                 E sum_dy = 0, sum_dx = 0, sum_value = 0;
                 Vector<E, kLanes<E>> sums_dy = {}, sums_dx = {}, sums_value = {};
                 ForEachVector<E>(channels, [&](auto lanes, int64_t i) {
                   constexpr int kN = lanes.value;
                   const auto gradient = Load<kN>(columns + i);
                   const auto top_left = Load<kN>(from.top_left + i), top_right = Load<kN>(from.top_right + i);
                   const auto bottom_left = Load<kN>(from.bottom_left + i),
                              bottom_right = Load<kN>(from.bottom_right + i);
                   // Differences before products: a large common value must not drown the slope.
                   const Vector<E, kN> dy =
                       gradient * (hx * (bottom_left - top_left) + lx * (bottom_right - top_right));
                   const Vector<E, kN> dx =
                       gradient * (hy * (top_right - top_left) + ly * (bottom_right - bottom_left));
                   const Vector<E, kN> value =
                       gradient * (weights.top_left * top_left + weights.top_right * top_right +
                                   weights.bottom_left * bottom_left + weights.bottom_right * bottom_right);
                   if constexpr (kN == kLanes<E>) {
                     sums_dy += dy, sums_dx += dx, sums_value += value;
                   } else {
                     for (int lane = 0; lane < kN; ++lane) {
                       sum_dy += dy[lane], sum_dx += dx[lane], sum_value += value[lane];
                     }
                   }
                 });
                 for (int lane = 0; lane < kLanes<E>; ++lane) {
                   sum_dy += sums_dy[lane], sum_dx += sums_dx[lane], sum_value += sums_value[lane];
                 }
                 const int64_t field =
                     ((pixel.n * g.pixels + pixel.q) * g.offset_groups + offset_group) * g.taps + tap;
                 if (grad_offset != nullptr) {
                   if (!(s.flags & Sample<E>::kHeldY)) grad_offset[2 * field] += s.mask * sum_dy;
                   if (!(s.flags & Sample<E>::kHeldX)) grad_offset[2 * field + 1] += s.mask * sum_dx;
                 }
                 if (grad_mask != nullptr) grad_mask[field] += sum_value;
               });
  }
}

// Adds a tile's share to channels [first, last) of one image's gradient.
template <typename T, typename E>
static void ScatterToImage(const DataPlan<T>& plan, int64_t group, int64_t begin, int64_t end, int64_t count,
                           const DataTile<E>& tile, int64_t first, int64_t last, E* image) {
  using S = Sample<E>;
  const Geometry& g = plan.g;
  for (int64_t row = 0; row < count; ++row) {
    const Sample<E>* sample = tile.samples + row * plan.block.samples;
    ForEachRun(g, group, begin, end, [&](int64_t r, int64_t channels, int64_t, int64_t channel, int64_t) {
      const S& s = *sample++;
      const int64_t from = Max(channel, first), to = Min(channel + channels, last);
      if (s.flags == 0 || from >= to) return;
      const E* columns = tile.columns + row * plan.block.stride + (r - begin) + (from - channel);
      const Weights<E> weights(s);
      const E mask = s.mask;
      const auto add = [&](uint32_t corner, int64_t pixels, E weight) __attribute__((always_inline)) {
        if (!(s.flags & corner)) return;
        E* target = image + s.corner + pixels * g.channels + from;
        ForEachVector<E>(to - from, [&](auto lanes, int64_t i) {
          constexpr int kN = lanes.value;
          Store(Load<kN>(target + i) + weight * (mask * Load<kN>(columns + i)), target + i);
        });
      };
      add(S::kTopLeft, 0, weights.top_left);
      add(S::kTopRight, 1, weights.top_right);
      add(S::kBottomLeft, g.width, weights.bottom_left);
      add(S::kBottomRight, g.width + 1, weights.bottom_right);
    });
  }
}

template <typename T>
static void DataPass(const DeformableConv2DParams& params, const DeformableConv2DInputs& inputs,
                     const void* grad_output, void* workspace, const DeformableConv2DGradients& gradients,
                     const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  const DataPlan<T> plan(params, gradients.inputs != nullptr, parallel_for.num_workers);
  const Geometry& g = plan.g;
  const Operands<T> operands(inputs, grad_output);
  T* const grad_inputs = static_cast<T*>(gradients.inputs);
  E* const grad_offset = static_cast<E*>(gradients.offset);
  E* const grad_mask = static_cast<E*>(gradients.mask);

  const int64_t fields = g.total_pixels * g.offset_groups * g.taps * static_cast<int64_t>(sizeof(E));
  if (grad_inputs != nullptr) Zero(parallel_for, grad_inputs, g.batch * g.image * static_cast<int64_t>(sizeof(T)));
  if (grad_offset != nullptr) Zero(parallel_for, grad_offset, 2 * fields);
  if (grad_mask != nullptr) Zero(parallel_for, grad_mask, fields);
  if (g.total_pixels == 0) return;

  Arena arena{static_cast<char*>(workspace)};
  E* packed = arena.Take<E>(plan.KernelElements());
  char* const scratch = arena.base + arena.used;

  const int64_t filter_blocks = CeilDiv(g.group_filters, kInner);
  Run(parallel_for, g.groups * filter_blocks, [&](int64_t task, int) {
    const int64_t group = task / filter_blocks, f = task % filter_blocks * kInner;
    PackPanels<T, E>(operands.kernel + group * g.group_filters + f, 1, g.filters, Min(kInner, g.group_filters - f),
                     g.rows, packed + (group * g.group_filters + f) * PackedColumns<E>(g.rows));
  });

  // One image: `rows` is the scratch for grad_output and zeros of each worker of `inner`, `pool` the place for `places`
  // tiles, `sums` a float32 image where T is narrow. Tiles whose column gradients wait to be scattered have a place each;
  // otherwise a worker has one.
  const auto process_image = [&](int64_t n, const ParallelFor& inner, char* rows, char* pool, int64_t places,
                                 E* sums) {
    if constexpr (!DataPlan<T>::kNarrow) {
      if (plan.scatter) sums = grad_inputs + n * g.image;
    } else if (plan.scatter) {
      Zero(inner, sums, g.image * static_cast<int64_t>(sizeof(E)));
    }
    const auto tile_at = [&](int64_t place) {
      Arena arena{pool + place * plan.tile_bytes};
      return DataTile<E>(plan.block, &arena);
    };
    const int64_t tiles = CeilDiv(g.pixels, kDataPixels);
    const int64_t tiles_at_once = plan.scatter ? places : tiles;
    const int64_t slices = Min(inner.num_workers, CeilDiv(g.group_channels, kSliceLanes));
    const int64_t slice = RoundUp(CeilDiv(g.group_channels, slices), kSliceLanes);
    for (int64_t group = 0; group < g.groups; ++group) {
      for (int64_t begin = 0; begin < g.rows; begin += plan.block.rows) {
        const int64_t end = Min(begin + plan.block.rows, g.rows);
        for (int64_t tile = 0; tile < tiles; tile += tiles_at_once) {
          const int64_t now = Min(tiles_at_once, tiles - tile);
          Run(inner, now, [&](int64_t index, int worker) {
            const int64_t q = (tile + index) * kDataPixels, count = Min(kDataPixels, g.pixels - q);
            Arena row{rows + worker * plan.row_bytes};
            E* grad_rows = row.Take<E>(kDataPixels * kTileStride);
            T* zeros = row.Take<T>(plan.block.rows);
            const DataTile<E> made = tile_at(plan.scatter ? index : worker);
            MakeColumnGradients<T, E>(plan, operands, packed, group, begin, end, n, q, count, grad_rows, made);
            if (grad_offset == nullptr && grad_mask == nullptr) return;
            __builtin_memset(zeros, 0, static_cast<size_t>(plan.block.rows) * sizeof(T));
            ReduceToOffset<T, E>(plan, operands, group, begin, end, count, made, zeros, grad_offset, grad_mask);
          });
          if (!plan.scatter) continue;
          Run(inner, slices, [&](int64_t index, int) {
            const int64_t first = group * g.group_channels + index * slice;
            const int64_t last = Min(first + slice, (group + 1) * g.group_channels);
            for (int64_t made = 0; made < now; ++made) {
              const int64_t count = Min(kDataPixels, g.pixels - (tile + made) * kDataPixels);
              ScatterToImage<T, E>(plan, group, begin, end, count, tile_at(made), first, last, sums);
            }
          });
        }
      }
    }
    if constexpr (DataPlan<T>::kNarrow) {
      if (!plan.scatter) return;
      Run(inner, g.height, [&](int64_t y, int) {
        const int64_t row = g.width * g.channels;
        NarrowRow(sums + y * row, row, grad_inputs + n * g.image + y * row);
      });
    }
  };

  if (plan.by_image) {
    Run(parallel_for, g.batch, [&](int64_t n, int worker) {
      char* mine = scratch + worker * plan.WorkerBytes();
      process_image(n, ParallelFor(), mine, mine + plan.row_bytes, 1,
                    reinterpret_cast<E*>(mine + plan.row_bytes + plan.tile_bytes));
    });
  } else {
    const int64_t workers = parallel_for.num_workers;
    char* rows = scratch + plan.SharedBytes();
    for (int64_t n = 0; n < g.batch; ++n) {
      process_image(n, parallel_for, rows, rows + workers * plan.row_bytes, workers * plan.tiles_per_worker,
                    reinterpret_cast<E*>(scratch));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradient of the kernel.

template <typename T>
struct KernelScratch {
  using E = typename AccumulatorOf<T>::Type;

  E* columns;      // [kKernelPixels][kTileStride]
  E* grad_packed;  // [kFilterBlock / panel][kKernelPixels][panel]
  T* zeros;        // [kInner]
  Pixel* pixels;   // [kKernelPixels]

  explicit KernelScratch(Arena* arena)
      : columns(arena->Take<E>(kKernelPixels * kTileStride)),
        grad_packed(arena->Take<E>(kKernelPixels * kFilterBlock)),
        zeros(arena->Take<T>(kInner)),
        pixels(arena->Take<Pixel>(kKernelPixels)) {}
};

template <typename T>
static int64_t KernelWorkspace(const DeformableConv2DParams& params, int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry g(params);
  Arena arena{nullptr};
  if (sizeof(T) < sizeof(E)) arena.Take<E>(g.rows * g.filters);
  for (int worker = 0; worker < num_workers; ++worker) KernelScratch<T>{&arena};
  return arena.used;
}

template <typename T>
static void KernelPass(const DeformableConv2DParams& params, const DeformableConv2DInputs& inputs,
                       const void* grad_output, void* workspace, void* grad_kernel, const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  constexpr bool kNarrow = sizeof(T) < sizeof(E);
  const Geometry g(params);
  const Operands<T> operands(inputs, grad_output);
  const int64_t size = g.rows * g.filters;
  Arena arena{static_cast<char*>(workspace)};
  E* sums;
  if constexpr (kNarrow) {
    sums = arena.Take<E>(size);
  } else {
    sums = static_cast<E*>(grad_kernel);
  }
  Zero(parallel_for, sums, size * static_cast<int64_t>(sizeof(E)));
  char* const scratch = arena.base + arena.used;
  Arena sizer{nullptr};
  KernelScratch<T>{&sizer};
  const int64_t scratch_bytes = sizer.used;

  // The kernels' rows of all groups, one after another, in parts of whole micro rows. A part packs grad_output for
  // itself, so there are no more parts than needed to keep the workers busy to the end.
  const int64_t all_rows = g.groups * g.rows;
  int64_t parts = 1;
  if (parallel_for.num_workers > 1 && g.total_pixels * g.rows * g.group_filters >= kSerialWork) {
    parts = Min(2 * parallel_for.num_workers, CeilDiv(all_rows, kMicroRows));
  }
  const int64_t part_rows = RoundUp(CeilDiv(all_rows, parts), kMicroRows);
  Run(parallel_for, parts, [&](int64_t part, int worker) {
    Arena place{scratch + worker * scratch_bytes};
    const KernelScratch<T> s(&place);
    __builtin_memset(s.zeros, 0, kInner * sizeof(T));
    const int64_t part_end = Min((part + 1) * part_rows, all_rows);
    for (int64_t first = 0; first < g.total_pixels; first += kKernelPixels) {
      const int64_t count = Min(kKernelPixels, g.total_pixels - first);
      LocatePixels(g, first, count, s.pixels);
      for (int64_t row = part * part_rows; row < part_end;) {  // one group after another
        const int64_t group = row / g.rows;
        const int64_t rows_begin = row - group * g.rows;
        const int64_t rows_end = Min(part_end - group * g.rows, g.rows);
        for (int64_t f = 0; f < g.group_filters; f += kFilterBlock) {
          const int64_t filters = Min(kFilterBlock, g.group_filters - f);
          PackPanels<T, E>(operands.grad_output + first * g.filters + group * g.group_filters + f, g.filters, 1, count,
                           filters, s.grad_packed);
          for (int64_t begin = rows_begin; begin < rows_end; begin += kInner) {
            const int64_t end = Min(begin + kInner, rows_end);
            SampleColumns<T, E>(g, operands, s.pixels, count, group, begin, end, s.zeros, s.columns);
            MatrixProduct<true>(end - begin, filters, count, s.columns, s.grad_packed,
                                sums + begin * g.filters + group * g.group_filters + f, g.filters, true);
          }
        }
        row = group * g.rows + rows_end;
      }
    }
  });
  if constexpr (kNarrow) {
    Run(parallel_for, g.rows, [&](int64_t row, int) {
      NarrowRow(sums + row * g.filters, g.filters, static_cast<T*>(grad_kernel) + row * g.filters);
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------------

// Calls body(T()) for the C++ type of `type`.
template <typename Body>
static void WithType(DataType type, const Body& body) {
  switch (type) {
    case DataType::kFloat16:
      return body(Float16());
    case DataType::kBFloat16:
      return body(BFloat16());
    case DataType::kFloat32:
      return body(float());
    case DataType::kFloat64:
      return body(double());
  }
}

static bool WantsData(const DeformableConv2DGradients& wanted) {
  return wanted.inputs != nullptr || wanted.offset != nullptr || wanted.mask != nullptr;
}

static int64_t WorkspaceBytes(const DeformableConv2DParams& params, DataType type, int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) { bytes = ForwardWorkspace<decltype(zero)>(params, num_workers); });
  return bytes;
}

// The passes run one after the other in the same workspace.
static int64_t BackwardWorkspaceBytes(const DeformableConv2DParams& params, DataType type,
                                      const DeformableConv2DGradients& wanted, int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    if (WantsData(wanted)) bytes = DataWorkspace<T>(params, wanted.inputs != nullptr, num_workers);
    if (wanted.kernel != nullptr) bytes = Max(bytes, KernelWorkspace<T>(params, num_workers));
  });
  return bytes;
}

static void Forward(const DeformableConv2DParams& params, DataType type, const DeformableConv2DInputs& operands,
                    void* workspace, void* output, const ParallelFor& parallel_for) {
  WithType(type,
           [&](auto zero) { ForwardPass<decltype(zero)>(params, operands, workspace, output, parallel_for); });
}

static void Backward(const DeformableConv2DParams& params, DataType type, const DeformableConv2DInputs& operands,
                     const void* grad_output, void* workspace, const DeformableConv2DGradients& gradients,
                     const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    if (WantsData(gradients)) DataPass<T>(params, operands, grad_output, workspace, gradients, parallel_for);
    if (gradients.kernel != nullptr) {
      KernelPass<T>(params, operands, grad_output, workspace, gradients.kernel, parallel_for);
    }
  });
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

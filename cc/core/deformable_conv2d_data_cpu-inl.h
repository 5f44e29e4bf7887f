// Deformable convolution on the CPU: gradients of inputs, offset and mask.
// SPDX-License-Identifier: Apache-2.0
//
// No include guard: see simd_cpu-inl.h.
//
// The output of each image is divided into strips of pixels. While a strip is
// worked on, some rows of the gradient of the inputs, around it, are its own.
// What belongs there is added at once; what belongs elsewhere is deferred:
// written down, and added when no strip is worked on. Even strips are worked on
// together, then odd ones, so that each owns half of its idle neighbours' rows,
// and only samples far away are deferred. The gradient at a pixel is then a sum
// in an order that strips, offsets and kDeferredBytes decide, not the workers.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Pixels in a tile, at most: a multiple of kMicroRows.
constexpr int64_t kDataPixels = kMicroRows == 14 ? 112 : 108;

// What one pixel may defer, at most, unless kPanel rows are more.
constexpr int64_t kPixelBytes = 4 << 10;

// Deferred gradients of all strips that are worked on together. A strip's
// share, 1/30 at least, has room for those of kLanes pixels.
constexpr int64_t kDeferredBytes = 3 << 20;

// Images that are worked on together, and strips of all of them, at most.
constexpr int64_t kImagesAtOnce = 64;
constexpr int64_t kStripsAtOnce = 32;

// Rows of an image's output in a strip, at least.
constexpr int64_t kStripRows = 7;

// The gradient of one sample's channels that waits to be added; elements
// follow.
template <typename E>
struct Deferred {
  int64_t
      corner;     // element of the top left corner, first channel, in its image
  int32_t flags;  // the corners that wait
  int32_t top;    // row of the first of them
  int64_t count;  // channels
  E mask;
  Weights<E> weights;

  static int64_t Bytes(int64_t count) {
    return RoundUp(static_cast<int64_t>(sizeof(Deferred)), 64) +
           RoundUp(count * static_cast<int64_t>(sizeof(E)), 64);
  }
  E* Gradient() {
    return reinterpret_cast<E*>(reinterpret_cast<char*>(this) +
                                RoundUp(sizeof(Deferred), 64));
  }
};

// A strip of an image's output, and how far it has come.
struct Strip {
  int64_t n;
  int64_t first, last;          // pixels of the batch's output
  int64_t row_first, row_last;  // its own rows of the image
  int64_t bundle, begin, next;  // to do next: bundle, its row, pixel
  int64_t used;                 // bytes of deferred gradients
  char* deferred;
};

// Rows of columns whose gradients are made together: as many as kPixelBytes
// lets a pixel defer, or kPanel.
template <typename E>
static Blocks DataBlocks(const Geometry& g) {
  const int64_t channels = Bundle(g, g.Bundles() - 1).channels;  // the least
  const int64_t runs_per_tap =
      g.Bundles() == 1 ? g.offset_groups : channels / g.offset_channels + 2;
  int64_t rows = kPixelBytes / static_cast<int64_t>(sizeof(E)) / kPanel<E>;
  for (rows *= kPanel<E>; rows > kPanel<E>; rows -= kPanel<E>) {
    // Runs end where taps, bundles, offset groups and blocks do.
    const int64_t runs = (rows / channels + 2) * runs_per_tap;
    if (rows * static_cast<int64_t>(sizeof(E)) + runs * 2 * 64 <= kPixelBytes) {
      break;
    }
  }
  return Blocks(g, rows, kPanel<E>);
}

// What a worker needs. O is as in ColumnScratch.
template <typename T, typename O>
struct DataScratch {
  using E = typename AccumulatorOf<T>::Type;

  E* columns;           // [kDataPixels][stride], gradients
  O* grad_rows;         // [kDataPixels][kTileStride], a tile of grad_output
  Pixels<E> pixels;     // of the tile
  Run* runs;            // [block rows]
  Samples<E>* samples;  // [block rows], of the runs at kLanes pixels
  T* zeros;             // [block rows]
  int64_t stride;

  DataScratch(const Blocks& blocks, Arena* arena)
      : columns(arena->Take<E>(kDataPixels * (blocks.limit + 16))),
        grad_rows(arena->Take<O>(kDataPixels * kTileStride)),
        pixels(kDataPixels, arena),
        runs(arena->Take<Run>(blocks.limit)),
        samples(arena->Take<Samples<E>>(blocks.limit)),
        zeros(arena->Take<T>(blocks.limit)),
        stride(blocks.limit + 16) {}
};

// How the work of one call is divided.
template <typename T, typename O>
struct DataPlan {
  using E = typename AccumulatorOf<T>::Type;

  Geometry g;
  Blocks blocks;
  bool scatter;            // is the gradient of the inputs wanted?
  int64_t scratch_bytes;   // of a DataScratch
  int64_t images;          // worked on together
  int64_t wide_bytes;      // of their gradients in float32, for 16-bit types
  int64_t strips;          // of an image: 1 or an even number
  int64_t deferred_bytes;  // of a strip

  DataPlan(const DeformableConv2DParams& params, bool wants_inputs)
      : g(params), blocks(DataBlocks<E>(g)), scatter(wants_inputs) {
    Arena arena{nullptr};
    DataScratch<T, O>(blocks, &arena);
    scratch_bytes = arena.used;
    const bool narrow = Operands<T>::kNarrow && scatter;
    const int64_t float_image = g.image * static_cast<int64_t>(sizeof(E));
    images = Min(g.batch, kImagesAtOnce);
    if (narrow) {
      // Small ones where strips would be, which need the room themselves.
      const int64_t fit = Max(1, kDeferredBytes / Max(1, float_image));
      images = CeilDiv(images, CeilDiv(Max(1, images), fit));
      if (images < 4 || g.out_h >= 4 * kStripRows) images = Min(g.batch, 1);
    }
    wide_bytes = narrow ? RoundUp(images * float_image, 64) : 0;
    strips = 1;
    if (g.height >= 4 && !IsSerial(g)) {
      while (strips * 2 * kStripRows <= g.out_h &&
             strips * images < kStripsAtOnce) {
        strips *= 2;
      }
      if (strips < 4) strips = images < 4 ? 4 : 1;
    }
    deferred_bytes =
        strips == 1 ? 0 : kDeferredBytes / (images * strips / 2) / 64 * 64;
  }

  int64_t KernelElements() const {
    if (g.depthwise) return g.taps * g.filters;
    return PackedInner<O>(g.group_filters) *
           (g.groups == 1
                ? PackedColumns<O>(g.rows)
                : g.taps * g.groups * PackedColumns<O>(g.group_channels));
  }
  int64_t StripBytes() const {
    if (!scatter) return 0;
    return RoundUp(images * strips * static_cast<int64_t>(sizeof(Strip)), 64) +
           CeilDiv(images * strips, 2) * deferred_bytes;
  }
};

template <typename T, typename O>
static int64_t DataWorkspace(const DeformableConv2DParams& params,
                             bool wants_inputs, int num_workers) {
  const DataPlan<T, O> plan(params, wants_inputs);
  Arena arena{nullptr};
  arena.Take<O>(plan.KernelElements());
  return arena.used + plan.wide_bytes + plan.StripBytes() +
         num_workers * plan.scratch_bytes;
}

// A depthwise kernel in the order (multiplier, tap, channel).
template <typename T, typename E>
static void PackDepthwise(const Geometry& g, const T* kernel, E* packed,
                          const ParallelFor& parallel_for) {
  RunTasks(parallel_for, g.taps, [&](int64_t tap, int) {
    for (int64_t j = 0; j < g.group_filters; ++j) {
      E* to = packed + (j * g.taps + tap) * g.channels;
      const T* from = kernel + tap * g.filters + j;
      for (int64_t c = 0; c < g.channels; ++c) {
        to[c] = Load<1>(from + c * g.group_filters)[0];
      }
    }
  });
}

// The kernel packed for the data pass: for every block of kInner filters (of
// one group) and every part of the kernel (see Piece) a packed transposed B;
// for a depthwise kernel the order (multiplier, tap, channel).
template <typename T, typename O>
static void PackTransposed(const DataPlan<T, O>& plan, const T* kernel,
                           O* packed, const ParallelFor& parallel_for) {
  const Geometry& g = plan.g;
  if constexpr (!std::is_same<O, BFloat16>::value) {
    if (g.depthwise) return PackDepthwise(g, kernel, packed, parallel_for);
  }
  const int64_t filter_blocks = CeilDiv(g.group_filters, kInner);
  const int64_t parts = g.groups == 1 ? 1 : g.taps * g.groups;
  const int64_t rows = g.groups == 1 ? g.rows : g.group_channels;
  RunTasks(parallel_for, filter_blocks * parts, [&](int64_t task, int) {
    const int64_t f = task % filter_blocks * kInner;
    const int64_t part = task / filter_blocks;
    const int64_t filters = Min(kInner, g.group_filters - f);
    PackPanels(kernel + part / g.groups * g.group_channels * g.filters +
                   part % g.groups * g.group_filters + f,
               1, g.filters, filters, rows,
               packed + (parts * f + part * PackedInner<O>(filters)) *
                            PackedColumns<O>(rows));
  });
}

// The gradients of a depthwise tile's columns, element by element.
template <typename T, typename E>
static void DepthwiseColumnGradients(const Geometry& g, const T* from,
                                     const E* packed, int64_t begin,
                                     int64_t num_runs,
                                     const DataScratch<T, E>& s) {
  for (int64_t p = 0; p < s.pixels.count; ++p) {
    for (const Run* run = s.runs; run != s.runs + num_runs; ++run) {
      const T* gradient = from + p * g.filters + run->channel * g.group_filters;
      E* to = s.columns + p * s.stride + (run->row - begin);
      const E* kernel = packed + run->tap * g.channels + run->channel;
      if (g.group_filters == 1) {
        ForEachVector<E>(run->count, [&](auto lanes, int64_t i) {
          constexpr int kN = lanes.value;
          Store(Load<kN>(gradient + i) * Load<kN>(kernel + i), to + i);
        });
        continue;
      }
      for (int64_t i = 0; i < run->count; ++i) {
        E sum = 0;
        for (int64_t j = 0; j < g.group_filters; ++j) {
          sum += Load<1>(gradient + i * g.group_filters + j)[0] *
                 kernel[j * g.rows + i];
        }
        to[i] = sum;
      }
    }
  }
}

// Makes the gradients of columns [begin, end) of `bundle` for the pixels of the
// tile: s.columns[pixel][row - begin].
template <typename T, typename O>
static void MakeColumnGradients(const DataPlan<T, O>& plan,
                                const Operands<T>& operands,
                                const Bundle& bundle, const O* packed,
                                int64_t begin, int64_t end, int64_t num_runs,
                                const DataScratch<T, O>& s) {
  const Geometry& g = plan.g;
  const int64_t count = s.pixels.count;
  const T* const from = operands.grad_output + s.pixels.first * g.filters;
  if constexpr (!std::is_same<O, BFloat16>::value) {
    if (g.depthwise) {
      return DepthwiseColumnGradients(g, from, packed, begin, num_runs, s);
    }
  }
  const int64_t parts = g.groups == 1 ? 1 : g.taps * g.groups;
  const int64_t part_columns =
      PackedColumns<O>(g.groups == 1 ? g.rows : g.group_channels);
  for (int64_t f = 0; f < g.group_filters; f += kInner) {
    const int64_t filters = Min(kInner, g.group_filters - f);
    const int64_t inner = PackedInner<O>(filters);
    int64_t loaded = -1;  // the groups whose filters grad_rows holds
    ForEachPiece(g, bundle, begin, end, [&](const Piece& piece) {
      // Filters of neighbouring groups are loaded together.
      const int64_t together =
          filters < g.group_filters ? 1 : Max(1, kInner / filters);
      if (loaded != piece.group / together) {
        loaded = piece.group / together;
        const int64_t filter = loaded * together * g.group_filters + f;
        const int64_t wide =
            Min(filters * together,
                filters < g.group_filters ? filters : g.filters - filter);
        for (int64_t p = 0; p < count; ++p) {
          O* const to = s.grad_rows + p * kTileStride;
          WidenRow(from + p * g.filters + filter, wide, to);
          for (int64_t i = wide; i < PackedInner<O>(wide); ++i) to[i] = O{};
        }
      }
      MatrixProduct<false>(
          count, piece.count, filters,
          s.grad_rows + piece.group % together * filters,
          packed + (parts * f + piece.kernel_part * inner) * part_columns +
              piece.part_row * inner,
          s.columns + (piece.row - begin), s.stride, f > 0);
    });
  }
}

// Sums over a run's channels: column gradient times the sample's slopes and
// value.
template <typename E>
struct SlopeSums {
  Vector<E, kLanes<E>> dy = {}, dx = {}, value = {};
  E rest_dy = 0, rest_dx = 0, rest_value = 0;

  template <int kN>
  void Add(const Vector<E, kN>& with_dy, const Vector<E, kN>& with_dx,
           const Vector<E, kN>& with_value) {
    if constexpr (kN == kLanes<E>) {
      dy += with_dy;
      dx += with_dx;
      value += with_value;
    } else {
      rest_dy += SumLanes<E, kN>(with_dy);
      rest_dx += SumLanes<E, kN>(with_dx);
      rest_value += SumLanes<E, kN>(with_value);
    }
  }
};

// Uses the column gradients of one sample: adds to `sums` (kSlopes), and to the
// gradient of the image at all four corners, `to` on (kScatter).
template <bool kSlopes, bool kScatter, typename T, typename E>
static inline __attribute__((always_inline)) void UseColumns(
    const Sampling<E>& in, const Corners<T>& from, const E* columns,
    int64_t count, E ly, E lx, E mask, const Weights<E>& weights, E* to,
    SlopeSums<E>* sums) {
  E* const below = to + in.row;
  ForEachVector<E>(count, [&](auto lanes, int64_t i) {
    constexpr int kN = lanes.value;
    using V = Vector<E, kN>;
    const V gradient = Load<kN>(columns + i);
    if constexpr (kSlopes) {
      // Differences first: a large common value must not drown the slope.
      const V top_left = Load<kN>(from.top_left + i);
      const V down = Load<kN>(from.bottom_left + i) - top_left;
      const V right = Load<kN>(from.top_right + i) - top_left;
      const V twist =
          (Load<kN>(from.bottom_right + i) - Load<kN>(from.bottom_left + i)) -
          right;
      const V dy = down + lx * twist;
      const V dx = right + ly * twist;
      const V value = top_left + lx * right + ly * dy;
      sums->template Add<kN>(gradient * dy, gradient * dx, gradient * value);
    }
    if constexpr (kScatter) {
      const V scaled = mask * gradient;
      const auto add = [&](E* corner, E weight) {
        Store(Load<kN>(corner + i) + weight * scaled, corner + i);
      };
      add(to, weights.top_left);
      add(to + in.pixel, weights.top_right);
      add(below, weights.bottom_left);
      add(below + in.pixel, weights.bottom_right);
    }
  });
}

// Adds a sample's gradient to those corners of the image that `flags` names.
template <typename E>
static void AddToCorners(const Sampling<E>& in, int32_t flags, const E* columns,
                         int64_t count, E mask, const Weights<E>& weights,
                         E* to) {
  const auto add = [&](int32_t corner, int64_t distance, E weight) {
    if (!(flags & corner)) return;
    E* at = to + distance;
    ForEachVector<E>(count, [&](auto lanes, int64_t i) {
      constexpr int kN = lanes.value;
      const Vector<E, kN> scaled = mask * Load<kN>(columns + i);
      Store(Load<kN>(at + i) + weight * scaled, at + i);
    });
  };
  add(kTopLeft, 0, weights.top_left);
  add(kTopRight, in.pixel, weights.top_right);
  add(kBottomLeft, in.row, weights.bottom_left);
  add(kBottomRight, in.row + in.pixel, weights.bottom_right);
}

// The corners of a sample in rows [first, last).
static inline int32_t CornersInRows(int32_t flags, int32_t top, int64_t first,
                                    int64_t last) {
  int32_t mine = 0;
  if (top >= first && top < last) mine |= kTopLeft | kTopRight;
  if (top + 1 >= first && top + 1 < last) mine |= kBottomLeft | kBottomRight;
  return flags & mine;
}

// Works on `strip` until it is done (returns true) or its room for deferred
// gradients may not hold the next pixels' (false). `grad_image` is the gradient
// of the strip's image (kScatter); grad_offset or grad_mask may be null.
template <bool kSlopes, bool kScatter, typename T, typename O, typename E>
static bool Advance(const DataPlan<T, O>& plan, const Operands<T>& operands,
                    const O* packed, DataScratch<T, O> s, Strip* strip,
                    E* grad_image, E* grad_offset, E* grad_mask) {
  const Geometry& g = plan.g;
  const Sampling<E> in(g, operands.offset, operands.mask);
  __builtin_memset(static_cast<void*>(s.zeros), 0,
                   static_cast<size_t>(plan.blocks.limit) * sizeof(T));
  for (; strip->bundle < g.Bundles(); ++strip->bundle, strip->begin = 0) {
    const Bundle bundle(g, strip->bundle);
    while (strip->begin < bundle.rows) {
      const int64_t begin = strip->begin;
      const int64_t end = plan.blocks.End(g, bundle, begin);
      const int64_t num_runs = FindRuns(g, bundle, begin, end, s.runs);
      int64_t most = 0;  // bytes that a pixel may defer
      for (int64_t run = 0; run < num_runs; ++run) {
        most += Deferred<E>::Bytes(s.runs[run].count);
      }
      while (strip->next < strip->last) {
        s.pixels.Locate(g, strip->next,
                        Min(kDataPixels, strip->last - strip->next));
        MakeColumnGradients(plan, operands, bundle, packed, begin, end,
                            num_runs, s);
        for (int64_t p = 0; p < s.pixels.count; p += kLanes<E>) {
          const int64_t lanes_used = Min(kLanes<E>, s.pixels.count - p);
          if (kScatter && plan.strips > 1 &&
              strip->used + most * lanes_used > plan.deferred_bytes) {
            return false;
          }
          for (int64_t r = 0; r < num_runs; ++r) {
            s.samples[r].Locate(in, s.pixels, p, s.runs[r]);
          }
          // A pixel's taps read neighbouring corners, and so do the next
          // pixel's.
          for (int64_t l = 0; l < lanes_used; ++l) {
            for (int64_t r = 0; r < num_runs; ++r) {
              const Run* run = s.runs + r;
              const Samples<E>& at = s.samples[r];
              const int64_t field =
                  (s.pixels.first + p + l) * g.fields + run->field;
              const E* columns =
                  s.columns + (p + l) * s.stride + (run->row - begin);
              const int32_t flags = at.flags[l];
              if (flags == 0) continue;
              const Corners<T> from(in,
                                    operands.inputs + s.pixels.image[p + l] +
                                        at.Corner(in, l) + run->channel,
                                    flags, s.zeros);
              const Weights<E> weights = at.WeightsAt(l);
              const E mask = at.mask[l];
              E* const to = kScatter
                                ? grad_image + at.Corner(in, l) + run->channel
                                : nullptr;
              const int32_t mine =
                  kScatter ? CornersInRows(flags, at.top[l], strip->row_first,
                                           strip->row_last)
                           : 0;
              SlopeSums<E> sums;
              if (kScatter && mine == kInside) {
                UseColumns<kSlopes, true>(in, from, columns, run->count,
                                          at.ly[l], at.lx[l], mask, weights, to,
                                          &sums);
              } else {
                if (kSlopes) {
                  UseColumns<true, false>(in, from, columns, run->count,
                                          at.ly[l], at.lx[l], mask, weights, to,
                                          &sums);
                }
                if (kScatter) {
                  AddToCorners(in, mine, columns, run->count, mask, weights,
                               to);
                  const int32_t others = flags & kInside & ~mine;
                  if (others != 0) {
                    auto* entry = reinterpret_cast<Deferred<E>*>(
                        strip->deferred + strip->used);
                    *entry = {at.Corner(in, l) + run->channel,
                              others,
                              at.top[l],
                              run->count,
                              mask,
                              weights};
                    __builtin_memcpy(
                        entry->Gradient(), columns,
                        static_cast<size_t>(run->count) * sizeof(E));
                    strip->used += Deferred<E>::Bytes(run->count);
                  }
                }
              }
              if (!kSlopes) continue;
              if (grad_offset != nullptr) {
                if (!(flags & kHeldY)) {
                  grad_offset[2 * field] +=
                      mask * (sums.rest_dy + SumLanes<E, kLanes<E>>(sums.dy));
                }
                if (!(flags & kHeldX)) {
                  grad_offset[2 * field + 1] +=
                      mask * (sums.rest_dx + SumLanes<E, kLanes<E>>(sums.dx));
                }
              }
              if (grad_mask != nullptr) {
                grad_mask[field] +=
                    sums.rest_value + SumLanes<E, kLanes<E>>(sums.value);
              }
            }
          }
          strip->next += lanes_used;
        }
      }
      strip->next = strip->first;
      strip->begin = end;
    }
  }
  return true;
}

// Adds what `strip` has deferred for rows [first, last) of its image.
template <typename E>
static void AddDeferred(const Sampling<E>& in, const Strip& strip,
                        int64_t first, int64_t last, E* grad_image) {
  for (int64_t at = 0; at < strip.used;) {
    auto* entry = reinterpret_cast<Deferred<E>*>(strip.deferred + at);
    at += Deferred<E>::Bytes(entry->count);
    const int32_t mine = CornersInRows(entry->flags, entry->top, first, last);
    if (mine == 0) continue;
    AddToCorners(in, mine, entry->Gradient(), entry->count, entry->mask,
                 entry->weights, grad_image + entry->corner);
  }
}

// Divides the output of `count` images from image n on into strips.
template <typename T, typename O>
static void MakeStrips(const DataPlan<T, O>& plan, int64_t n, int64_t count,
                       char* deferred, Strip* strips) {
  const Geometry& g = plan.g;
  const auto start = [&](int64_t strip) {
    return g.pixels * strip / plan.strips;
  };
  // Row of the image under the middle of the kernel where a strip starts.
  const auto row = [&](int64_t strip) {
    if (strip <= 0) return int64_t{0};
    if (strip >= plan.strips) return g.height;
    const int64_t y = start(strip) / g.out_w * g.stride_h - g.pad_top +
                      (g.kernel_h - 1) * g.dilation_h / 2;
    return Max(0, Min(y, g.height));
  };
  for (int64_t image = 0; image < count; ++image) {
    for (int64_t i = 0; i < plan.strips; ++i) {
      Strip& strip = strips[image * plan.strips + i];
      const int64_t first = (n + image) * g.pixels;
      strip = {};
      strip.n = n + image;
      strip.first = strip.next = first + start(i);
      strip.last = first + start(i + 1);
      strip.row_first = i == 0 ? 0 : (row(i - 1) + row(i)) / 2;
      strip.row_last =
          i + 1 >= plan.strips ? g.height : (row(i + 1) + row(i + 2)) / 2;
      // Even and odd strips, which never have any at the same time, share room.
      strip.deferred =
          deferred + (image * plan.strips + i) / 2 * plan.deferred_bytes;
    }
  }
}

template <typename T, typename O>
static void DataPass(const DeformableConv2DParams& params,
                     const DeformableConv2DInputs& inputs,
                     const void* grad_output, void* workspace,
                     const DeformableConv2DGradients& gradients,
                     const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  constexpr bool kNarrow = Operands<T>::kNarrow;
  const DataPlan<T, O> plan(params, gradients.inputs != nullptr);
  const Geometry& g = plan.g;
  const Operands<T> operands(inputs, grad_output);
  T* const grad_inputs = static_cast<T*>(gradients.inputs);
  E* const grad_offset = static_cast<E*>(gradients.offset);
  E* const grad_mask = static_cast<E*>(gradients.mask);

  const int64_t field_bytes =
      g.total_pixels * g.fields * static_cast<int64_t>(sizeof(E));
  if (plan.scatter && (!kNarrow || g.total_pixels == 0)) {
    Zero(parallel_for, grad_inputs,
         g.batch * g.image * static_cast<int64_t>(sizeof(T)));
  }
  if (grad_offset != nullptr) Zero(parallel_for, grad_offset, 2 * field_bytes);
  if (grad_mask != nullptr) Zero(parallel_for, grad_mask, field_bytes);
  if (g.total_pixels == 0) return;

  Arena arena{static_cast<char*>(workspace)};
  O* const packed = arena.Take<O>(plan.KernelElements());
  E* const wide =
      arena.Take<E>(plan.wide_bytes / static_cast<int64_t>(sizeof(E)));
  char* const strip_room = arena.Take<char>(plan.StripBytes());
  char* const scratch = arena.base + arena.used;
  PackTransposed(plan, operands.kernel, packed, parallel_for);
  const auto scratch_of = [&](int worker) {
    Arena place{scratch + worker * plan.scratch_bytes};
    return DataScratch<T, O>(plan.blocks, &place);
  };

  if (!plan.scatter) {
    int64_t tiles = CeilDiv(g.total_pixels, kDataPixels);
    if (!IsSerial(g)) tiles = RoundUp(tiles, parallel_for.num_workers);
    tiles = Min(tiles, g.total_pixels);
    RunTasks(parallel_for, tiles, [&](int64_t tile, int worker) {
      Strip strip = {};
      strip.first = strip.next = g.total_pixels * tile / tiles;
      strip.last = g.total_pixels * (tile + 1) / tiles;
      Advance<true, false, T, O, E>(plan, operands, packed, scratch_of(worker),
                                    &strip, nullptr, grad_offset, grad_mask);
    });
    return;
  }

  Strip* const strips = reinterpret_cast<Strip*>(strip_room);
  const Sampling<E> in(g, operands.offset, operands.mask);
  const bool slopes = grad_offset != nullptr || grad_mask != nullptr;
  for (int64_t n = 0; n < g.batch; n += plan.images) {
    const int64_t images = Min(plan.images, g.batch - n);
    MakeStrips(plan, n, images,
               strip_room + RoundUp(plan.images * plan.strips *
                                        static_cast<int64_t>(sizeof(Strip)),
                                    64),
               strips);
    E* sums = wide;
    if constexpr (kNarrow) {
      Zero(parallel_for, sums,
           images * g.image * static_cast<int64_t>(sizeof(E)));
    } else {
      sums = grad_inputs + n * g.image;
    }
    const auto image_of = [&](const Strip& strip) {
      return sums + (strip.n - n) * g.image;
    };
    const int64_t phases = plan.strips > 1 ? 2 : 1;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t active = images * plan.strips / phases;
      for (bool done = false; !done;) {
        RunTasks(parallel_for, active, [&](int64_t index, int worker) {
          Strip* strip = strips + index * phases + phase;
          (slopes ? Advance<true, true, T, O, E>
                  : Advance<false, true, T, O, E>)(plan, operands, packed,
                                                   scratch_of(worker), strip,
                                                   image_of(*strip),
                                                   grad_offset, grad_mask);
        });
        done = true;
        bool any = false;
        for (int64_t index = 0; index < active; ++index) {
          const Strip& strip = strips[index * phases + phase];
          done = done && strip.bundle == g.Bundles();
          any = any || strip.used > 0;
        }
        if (!any) continue;
        // By image and some of its rows.
        RunTasks(parallel_for, images * plan.strips, [&](int64_t index, int) {
          const int64_t part = index % plan.strips;
          const int64_t image = index / plan.strips * plan.strips;
          for (int64_t i = phase; i < plan.strips; i += phases) {
            AddDeferred(in, strips[image + i], g.height * part / plan.strips,
                        g.height * (part + 1) / plan.strips,
                        image_of(strips[image + i]));
          }
        });
        for (int64_t index = 0; index < active; ++index) {
          strips[index * phases + phase].used = 0;
        }
      }
    }
    if constexpr (kNarrow) {
      RunTasks(parallel_for, images * g.height, [&](int64_t y, int) {
        const int64_t row = g.width * g.channels;
        NarrowRow(sums + y * row, row, grad_inputs + n * g.image + y * row);
      });
    }
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

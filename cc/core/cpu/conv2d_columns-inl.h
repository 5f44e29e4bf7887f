// SPDX-License-Identifier: Apache-2.0
// Samples tiles of columns of a deformable convolution, for one instruction
// set.
//
// The file has no include guard: see simd-inl.h.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Multiplications below which one worker does all the work.
constexpr double kSerialWork = 1 << 17;

static bool IsSerial(const Geometry& g) {
  return static_cast<double>(g.total_pixels) * static_cast<double>(g.rows) *
             static_cast<double>(g.group_filters) <
         kSerialWork;
}

// Operands of the three passes, and their types.
template <typename T>
struct Operands {
  using E = typename AccumulatorOf<T>::Type;

  // Sums of 16-bit types need memory of their own, of type E.
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

// Scratch in which a tile of columns is sampled. Products are of elements O:
// the accumulator's type, or BFloat16 on AMX.
template <typename T, typename O>
struct ColumnScratch {
  using E = typename AccumulatorOf<T>::Type;

  O* columns;           // [pixels of the tile][kTileStride]
  Pixels<E> pixels;     // of the tile
  Run* runs;            // [kInner]
  Samples<E>* samples;  // [kInner], of the runs at kLanes pixels
  T* zeros;             // [kInner]

  ColumnScratch(int64_t num_pixels, Arena* arena)
      : columns(arena->Take<O>(num_pixels * kTileStride)),
        pixels(num_pixels, arena),
        runs(arena->Take<Run>(kInner)),
        samples(arena->Take<Samples<E>>(kInner)),
        zeros(arena->Take<T>(kInner)) {}

  void Clear() const {
    __builtin_memset(static_cast<void*>(zeros), 0, kInner * sizeof(T));
  }
};

// Samples rows [begin, end) of `bundle`, at most kInner, for the pixels of the
// tile: s.columns[pixel][row - begin], with zeros up to PackedInner<O>. Returns
// the number of s.runs.
template <typename T, typename O>
static int64_t SampleColumns(const Geometry& g, const Operands<T>& operands,
                             const Bundle& bundle, int64_t begin, int64_t end,
                             const ColumnScratch<T, O>& s) {
  using E = typename AccumulatorOf<T>::Type;
  const Sampling<E> in(g, operands.offset, operands.mask);
  const int64_t num_runs = FindRuns(g, bundle, begin, end, s.runs);
  for (int64_t p = 0; p < s.pixels.count; p += kLanes<E>) {
    const int64_t lanes_used = Min(kLanes<E>, s.pixels.count - p);
    for (int64_t r = 0; r < num_runs; ++r) {
      s.samples[r].Locate(in, s.pixels, p, s.runs[r]);
    }
    // A pixel's taps read neighbouring corners, and so do the next pixel's.
    for (int64_t l = 0; l < lanes_used; ++l) {
      const T* image = operands.inputs + s.pixels.image[p + l];
      for (int64_t r = 0; r < num_runs; ++r) {
        const Run& run = s.runs[r];
        const Samples<E>& samples = s.samples[r];
        O* to = s.columns + (p + l) * kTileStride + (run.row - begin);
        const int32_t flags = samples.flags[l];
        if (flags == 0) {
          for (int64_t i = 0; i < run.count; ++i) to[i] = O{};
          continue;
        }
        const Corners<T> from(in, image + samples.Corner(in, l) + run.channel,
                              flags, s.zeros);
        const Weights<E> weights = samples.WeightsAt(l);
        const E mask = samples.mask[l];
        ForEachVector<E>(run.count, [&](auto lanes, int64_t i) {
          constexpr int kN = lanes.value;
          const Vector<E, kN> value =
              weights.top_left * Load<kN>(from.top_left + i) +
              weights.top_right * Load<kN>(from.top_right + i) +
              weights.bottom_left * Load<kN>(from.bottom_left + i) +
              weights.bottom_right * Load<kN>(from.bottom_right + i);
          StoreColumns(value * mask, to + i);
        });
      }
      O* const row = s.columns + (p + l) * kTileStride;
      for (int64_t i = end - begin; i < PackedInner<O>(end - begin); ++i) {
        row[i] = O{};
      }
    }
  }
  return num_runs;
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Computes forward and the gradients of both pooling operators on the CPU.
//
// The file has no include guard: see simd-inl.h.
//
//   PoolPass        Tasks are ROIs. A bin is the weighted sum of its pixels.
//   DisplacePass    Tasks are ROIs. The gradient of a displacement is the same
//                   sum with the derivative of the weights along one axis.
//   ScatterPass     The gradient of the inputs lands anywhere in the image, so
//                   each task owns a piece of it: an image, a cell of the
//                   position-sensitive maps, and a block of channels. Each
//                   walks through all ROIs in order: no two tasks write to the
//                   same place, and the order of sums never depends on the
//                   number of workers.
//
// Each pass divides its work into tasks, and has one function for a ROI
// (PoolRoi, ...) and one for a bin (PoolBin, PoolLanes, ...).

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// The least number of element operations for which a task is handed out.
constexpr int64_t kTaskWork = 1 << 15;

// Estimates the element operations of one ROI: four pixels a bin are read, and
// the bin's weights found.
static int64_t RoiWork(const RoiGeometry& g) {
  return g.Bins() *
         (4 * g.Depth() + g.classes * 8 * (g.samples_h + g.samples_w));
}

// Calls body(roi_row, worker) for every ROI that lies in one of the images
// [first_image, first_image + images); if first_image is 0, also for ROIs that
// lie in no image.
template <typename E, typename Body>
static void ForEachRoi(const RoiGeometry& g, const E* rois, int64_t first_image,
                       int64_t images, const ParallelFor& parallel_for,
                       const Body& body) {
  const int64_t block = Max(1, kTaskWork / Max(1, RoiWork(g)));
  RunTasks(
      parallel_for, CeilDiv(g.num_rois, block), [&](int64_t task, int worker) {
        const int64_t end = Min(g.num_rois, (task + 1) * block);
        for (int64_t r = task * block; r < end; ++r) {
          const auto roi_row = RoiRow<E>::Read(g, rois, r);
          const bool is_here = roi_row.image < 0
                                   ? first_image == 0
                                   : roi_row.image >= first_image &&
                                         roi_row.image < first_image + images;
          if (is_here) body(roi_row, worker);
        }
      });
}

// kN elements, widened, to be summed in a loop. If kN is 1, the type is a plain
// number: compilers keep vectors of one lane in memory.
template <int kN, typename T>
static inline auto LoadSum(const T* from) {
  if constexpr (kN == 1) {
    return Load<1>(from)[0];
  } else {
    return Load<kN>(from);
  }
}

template <int kN, typename T>
using Sum = decltype(LoadSum<kN>(static_cast<const T*>(nullptr)));

// Writes the first of kN sums, `count` if that is less, as elements of T.
template <int kN, typename V, typename T>
static inline void StoreSum(const V& sum, int64_t count, T* to) {
  typename AccumulatorOf<T>::Type sums[kN];
  Store(sum, sums);
  if (count >= kN) {
    NarrowRow(sums, kN, to);
  } else {
    NarrowRow(sums, count, to);
  }
}

// Bytes for PoolPass and DisplacePass: repacked images, then scratch.
template <typename T>
static int64_t PoolWorkspace(const RoiGeometry& g, int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  return PackedBytes<T>(g, num_workers) + num_workers * RoiScratch<E>::Bytes(g);
}

// Calls body(roi_row, the ROI's image on the map or null, worker's scratch) for
// every ROI, images being repacked where they have to be.
template <typename T, typename Rule, typename E, typename Body>
static void ForEachPooledRoi(const Rule& rule, const T* inputs, const E* rois,
                             void* workspace, const ParallelFor& parallel_for,
                             const Body& body) {
  if (rule.num_rois == 0) return;
  char* const scratch = static_cast<char*>(workspace) +
                        PackedBytes<T>(rule, parallel_for.num_workers);
  const int64_t scratch_bytes = RoiScratch<E>::Bytes(rule);
  ForEachPackedChunk(
      rule, inputs, workspace, parallel_for,
      [&](int64_t first_image, int64_t images, const T* maps) {
        ForEachRoi(
            rule, rois, first_image, images, parallel_for,
            [&](const RoiRow<E>& roi_row, int worker) {
              Arena arena{scratch + worker * scratch_bytes};
              RoiScratch<E> s(rule, &arena);
              const int64_t image = roi_row.image - first_image;
              body(roi_row,
                   roi_row.image < 0 ? nullptr : maps + image * rule.Image(),
                   &s);
            });
      });
}

// -----------------------------------------------------------------------------
// Forward.

// Writes the output of a bin: sums of `channels` channels from `map` on, at
// least class_channels.
template <typename T, typename E>
static inline void PoolBin(const RoiGeometry& g, const RoiScratch<E>& s,
                           const T* map, int64_t channels, E share, T* to) {
  const AxisWeights<E> y = s.y, x = s.x;  // kept in registers
  ForEachVector<E>(channels, [&](auto lanes, int64_t i) {
    constexpr int kN = lanes.value;
    Sum<kN, T> sum = {};
    for (int64_t a = 0; a < y.count; ++a) {
      const T* row = map + y.at[a] + i;
      Sum<kN, T> in_row = {};
      for (int64_t b = 0; b < x.count; ++b) {
        in_row += x.weight[b] * LoadSum<kN>(row + x.at[b]);
      }
      sum += y.weight[a] * in_row;
    }
    StoreSum<kN>(sum * share, g.class_channels - i, to + i);
  });
}

// Writes the output and, if not null, the count of a ROI on `map`. Never
// inlined: its loops need all registers.
template <typename T, typename Rule, typename E>
static __attribute__((noinline)) void PoolRoi(const Rule& rule,
                                              const Roi<E>& roi,
                                              const E* displacements,
                                              const T* map, RoiScratch<E>* s,
                                              T* output, float* count) {
  const BinRange all = AllBins(rule);
  if (UsesLanes(rule, roi, displacements)) {
    ForEachLaneBin<false>(
        rule, roi, displacements, all, 0, rule.Depth(),
        [&](const LaneBin<E>& bin, const LaneWeights<E>& y,
            const LaneWeights<E>& x) {
          PoolLanes<T>(bin, y, x, map + bin.map, output + bin.output,
                       count == nullptr ? nullptr : count + bin.output);
        });
    return;
  }
  const int64_t channels = rule.Cells() == 1
                               ? rule.class_channels
                               : RoundUp(rule.class_channels, kLanes<E> / 2);
  ForEachBin<false>(rule, roi, displacements, all, s, [&](const Bin<E>& bin) {
    PoolBin(rule, *s, map + bin.map, channels, bin.share, output + bin.output);
    if (count == nullptr) return;
    const float samples = static_cast<float>(s->y.samples * s->x.samples);
    for (int64_t i = 0; i < rule.class_channels; ++i) {
      count[bin.output + i] = samples;
    }
  });
}

// Writes output and, if not null, count.
template <typename T, typename Rule, typename E>
static void PoolPass(const Rule& rule, const T* inputs, const E* rois,
                     const E* displacements, void* workspace, T* output,
                     float* count, const ParallelFor& parallel_for) {
  const int64_t roi_outputs = rule.Bins() * rule.Depth();
  ForEachPooledRoi(
      rule, inputs, rois, workspace, parallel_for,
      [&](const RoiRow<E>& roi_row, const T* map, RoiScratch<E>* s) {
        if (map != nullptr) {
          PoolRoi(rule, Roi<E>(rule, roi_row), displacements, map, s, output,
                  count);
          return;
        }
        const int64_t first = roi_row.index * roi_outputs;
        __builtin_memset(static_cast<void*>(output + first), 0,
                         roi_outputs * sizeof(T));
        if (count == nullptr) return;
        for (int64_t i = 0; i < roi_outputs; ++i) {
          count[first + i] = 0;
        }
      });
}

// -----------------------------------------------------------------------------
// The gradient of the displacements.

// Returns the elements of a bin's gradient, widened into `row` if need be.
template <typename T, typename E>
static inline const E* WideRow(const T* from, int64_t n, E* row) {
  if constexpr (sizeof(T) == sizeof(E)) {
    return from;
  } else {
    WidenRow(from, n, row);
    return row;
  }
}

// Adds a bin's share to the gradient of its displacement, `to` (dy, dx).
template <typename Rule, typename T, typename E>
static inline void DisplaceBin(const Rule& rule, const Roi<E>& roi,
                               const RoiScratch<E>& s, const T* map,
                               const T* grad_output, E share, E* to) {
  const AxisWeights<E> y = s.y, x = s.x;  // kept in registers
  // Without samples no gradient, even where it is infinite.
  if (y.count == 0 || x.count == 0) return;
  const E* gradient = WideRow(grad_output, rule.class_channels, s.row);
  E along_y = 0, along_x = 0;
  ForEachVector<E>(rule.class_channels, [&](auto lanes, int64_t i) {
    constexpr int kN = lanes.value;
    Sum<kN, T> by_y = {}, by_x = {};
    for (int64_t a = 0; a < y.count; ++a) {
      const T* row = map + y.at[a] + i;
      Sum<kN, T> value = {}, change = {};
      for (int64_t b = 0; b < x.count; ++b) {
        const Sum<kN, T> pixel = LoadSum<kN>(row + x.at[b]);
        value += x.weight[b] * pixel;
        change += x.slope[b] * pixel;
      }
      by_y += y.slope[a] * value;
      by_x += y.weight[a] * change;
    }
    const Vector<E, kN> g = Load<kN>(gradient + i);
    along_y += SumLanes<E, kN>(by_y * g);
    along_x += SumLanes<E, kN>(by_x * g);
  });
  to[0] += along_y * share * rule.DisplacementSlope(roi.y.size);
  to[1] += along_x * share * rule.DisplacementSlope(roi.x.size);
}

// Adds the share of a ROI on `map` to the gradient of its displacements. Never
// inlined, like PoolRoi.
template <typename T, typename Rule, typename E>
static __attribute__((noinline)) void DisplaceRoi(
    const Rule& rule, const Roi<E>& roi, const E* displacements, const T* map,
    const T* grad_output, RoiScratch<E>* s, E* grad_displacements) {
  const BinRange all = AllBins(rule);
  if (UsesLanes(rule, roi, displacements)) {
    ForEachLaneBin<true>(rule, roi, displacements, all, 0, rule.Depth(),
                         [&](const LaneBin<E>& bin, const LaneWeights<E>& y,
                             const LaneWeights<E>& x) {
                           DisplaceLanes<Rule, T>(
                               rule, roi, bin, y, x, map + bin.map,
                               grad_output + bin.output, grad_displacements);
                         });
    return;
  }
  ForEachBin<true>(rule, roi, displacements, all, s, [&](const Bin<E>& bin) {
    DisplaceBin(rule, roi, *s, map + bin.map, grad_output + bin.output,
                bin.share, grad_displacements + bin.displacement);
  });
}

// Writes the gradient of the displacements.
template <typename T, typename Rule, typename E>
static void DisplacePass(const Rule& rule, const T* inputs, const E* rois,
                         const E* displacements, const T* grad_output,
                         void* workspace, E* grad_displacements,
                         const ParallelFor& parallel_for) {
  const int64_t roi_displacements =
      rule.part_h * rule.part_w * rule.classes * 2;
  ForEachPooledRoi(
      rule, inputs, rois, workspace, parallel_for,
      [&](const RoiRow<E>& roi_row, const T* map, RoiScratch<E>* s) {
        __builtin_memset(grad_displacements + roi_row.index * roi_displacements,
                         0, roi_displacements * sizeof(E));
        if (map == nullptr) return;
        DisplaceRoi(rule, Roi<E>(rule, roi_row), displacements, map,
                    grad_output, s, grad_displacements);
      });
}

// -----------------------------------------------------------------------------
// The gradient of the inputs.

// Returns whether the gradient is summed in scratch: if its type is narrow, or
// if images are repacked.
template <typename T>
static bool HasSums(const RoiGeometry& g) {
  return g.Cells() > 1 || sizeof(T) < sizeof(typename AccumulatorOf<T>::Type);
}

template <typename T>
static int64_t SumsBytes(const RoiGeometry& g, int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  if (!HasSums<T>(g)) return 0;
  return RoundUp(ImagesAtOnce(g, sizeof(E), num_workers) * g.Image() *
                     static_cast<int64_t>(sizeof(E)),
                 64);
}

// Bytes for ScatterPass: sums, then scratch.
template <typename T>
static int64_t ScatterWorkspace(const RoiGeometry& g, int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  return SumsBytes<T>(g, num_workers) + num_workers * RoiScratch<E>::Bytes(g);
}

// The piece of the gradient that a task owns.
struct Owned {
  int64_t image, cell;
  int64_t begin, end;  // channels of the cell

  // Bins [FirstBin(i), FirstBin(i + 1)) of `pooled` read group i of `groups`.
  static int64_t FirstBin(int64_t i, int64_t pooled, int64_t groups) {
    return CeilDiv(i * pooled, groups);
  }

  // Returns the bins that read the piece.
  BinRange Bins(const RoiGeometry& g) const {
    const int64_t gh = cell / g.group_w, gw = cell % g.group_w;
    return {FirstBin(gh, g.pooled_h, g.group_h),
            FirstBin(gh + 1, g.pooled_h, g.group_h),
            FirstBin(gw, g.pooled_w, g.group_w),
            FirstBin(gw + 1, g.pooled_w, g.group_w),
            begin / g.class_channels,
            CeilDiv(end, g.class_channels)};
  }
};

// Adds the gradient of `count` channels of a bin to the pixels that the bin
// reads, from `map` on.
template <typename T, typename E>
static inline void ScatterBin(const RoiScratch<E>& s, const T* grad_output,
                              int64_t count, E share, E* map) {
  const AxisWeights<E> y = s.y, x = s.x;  // kept in registers
  const E* gradient = WideRow(grad_output, count, s.row);
  for (int64_t a = 0; a < y.count; ++a) {
    E* row = map + y.at[a];
    for (int64_t b = 0; b < x.count; ++b) {
      E* to = row + x.at[b];
      const E weight = y.weight[a] * x.weight[b] * share;
      ForEachVector<E>(count, [&](auto lanes, int64_t i) {
        constexpr int kN = lanes.value;
        Store(Load<kN>(to + i) + weight * Load<kN>(gradient + i), to + i);
      });
    }
  }
}

// Adds a ROI's share to `owned`. `sums` is its image, repacked.
template <typename T, typename Rule, typename E>
static void ScatterRoi(const Rule& rule, const Roi<E>& roi, const Owned& owned,
                       const E* displacements, const T* grad_output,
                       RoiScratch<E>* s, E* sums) {
  const BinRange mine = owned.Bins(rule);
  if (UsesLanes(rule, roi, displacements)) {
    ForEachLaneBin<false>(
        rule, roi, displacements, mine, owned.begin, owned.end,
        [&](const LaneBin<E>& bin, const LaneWeights<E>& y,
            const LaneWeights<E>& x) {
          ScatterLanes<T>(bin, y, x, grad_output + bin.output, sums + bin.map);
        });
    return;
  }
  ForEachBin<false>(rule, roi, displacements, mine, s, [&](const Bin<E>& bin) {
    const int64_t channel = bin.output % rule.Depth();  // the class' first
    const int64_t from = Max(owned.begin - channel, 0);
    const int64_t count = Min(owned.end - channel, rule.class_channels) - from;
    ScatterBin(*s, grad_output + bin.output + from, count, bin.share,
               sums + bin.map + from);
  });
}

// Writes the gradient of the inputs.
template <typename T, typename Rule, typename E>
static void ScatterPass(const Rule& rule, const E* rois, const E* displacements,
                        const T* grad_output, void* workspace, T* grad_inputs,
                        const ParallelFor& parallel_for) {
  const int workers = parallel_for.num_workers;
  const bool has_sums = HasSums<T>(rule);
  char* const scratch =
      static_cast<char*>(workspace) + SumsBytes<T>(rule, workers);
  const int64_t scratch_bytes = RoiScratch<E>::Bytes(rule);
  const int64_t image_elements = rule.Image();
  const int64_t step =
      has_sums ? ImagesAtOnce(rule, sizeof(E), workers) : rule.batch;
  const bool serial = rule.num_rois * RoiWork(rule) < kTaskWork;
  for (int64_t first = 0; first < rule.batch; first += step) {
    const int64_t images = Min(step, rule.batch - first);
    T* const target = grad_inputs + first * image_elements;
    E* sums = static_cast<E*>(workspace);
    if constexpr (sizeof(T) == sizeof(E)) {
      if (!has_sums) sums = target;
    }
    Zero(parallel_for, sums,
         images * image_elements * static_cast<int64_t>(sizeof(E)));
    // Divides channels into blocks if there are too few cells to keep all
    // workers busy; into no more, because each block finds all weights for
    // itself.
    const int64_t owners = images * rule.Cells();
    const int64_t depth = rule.Depth();
    const int64_t wanted = serial ? 1 : CeilDiv(workers, owners);
    const int64_t width = RoundUp(CeilDiv(depth, wanted), kLanes<E>);
    const int64_t blocks = CeilDiv(depth, width);
    RunTasks(serial ? ParallelFor() : parallel_for, owners * blocks,
             [&](int64_t task, int worker) {
               const int64_t begin = task % blocks * width;
               const int64_t image = task / blocks / rule.Cells();
               const Owned owned = {first + image, task / blocks % rule.Cells(),
                                    begin, Min(depth, begin + width)};
               Arena arena{scratch + worker * scratch_bytes};
               RoiScratch<E> s(rule, &arena);
               for (int64_t r = 0; r < rule.num_rois; ++r) {
                 const auto roi_row = RoiRow<E>::Read(rule, rois, r);
                 if (roi_row.image != owned.image) continue;
                 ScatterRoi(rule, Roi<E>(rule, roi_row), owned, displacements,
                            grad_output, &s, sums + image * image_elements);
               }
             });
    if (has_sums) UnpackImages(rule, sums, images, target, parallel_for);
  }
}

// -----------------------------------------------------------------------------
// The functions that the .cc of an op chooses from. The operands of the op are
// inputs, ROIs and displacements; `Rule` places its samples.

template <typename Op>
constexpr auto kDisplacements = Op::kOperands[2];

// Calls body(T(), the rule of the call).
template <template <typename> class Rule, typename Params, typename Body>
static void WithRule(const Params& params, DataType type, const Body& body) {
  WithType(type, [&](auto zero) {
    body(zero, Rule<typename AccumulatorOf<decltype(zero)>::Type>(params));
  });
}

template <typename Op, template <typename> class Rule>
static int64_t OpWorkspaceBytes(const typename Op::Params& params,
                                DataType type, int num_workers) {
  int64_t bytes = 0;
  WithRule<Rule>(params, type, [&](auto zero, const auto& rule) {
    bytes = PoolWorkspace<decltype(zero)>(rule, num_workers);
  });
  return bytes;
}

// The passes run one after the other in the same workspace.
template <typename Op, template <typename> class Rule>
static int64_t OpBackwardWorkspaceBytes(const typename Op::Params& params,
                                        DataType type,
                                        const typename Op::Gradients& wanted,
                                        int num_workers) {
  int64_t bytes = 0;
  WithRule<Rule>(params, type, [&](auto zero, const auto& rule) {
    using T = decltype(zero);
    if (wanted.inputs != nullptr) {
      bytes = ScatterWorkspace<T>(rule, num_workers);
    }
    if (wanted.*kDisplacements<Op>.gradient != nullptr) {
      bytes = Max(bytes, PoolWorkspace<T>(rule, num_workers));
    }
  });
  return bytes;
}

// `Count` is float* if the op has the output `count`, and empty otherwise.
template <typename Op, template <typename> class Rule, typename... Count>
static void OpForward(const typename Op::Params& params, DataType type,
                      const typename Op::Inputs& operands, void* workspace,
                      void* output, Count... count,
                      const ParallelFor& parallel_for) {
  float* const counts[] = {count..., nullptr};
  WithRule<Rule>(params, type, [&](auto zero, const auto& rule) {
    using T = decltype(zero);
    using E = typename AccumulatorOf<T>::Type;
    PoolPass(rule, static_cast<const T*>(operands.inputs),
             static_cast<const E*>(operands.rois),
             static_cast<const E*>(operands.*kDisplacements<Op>.data),
             workspace, static_cast<T*>(output), counts[0], parallel_for);
  });
}

template <typename Op, template <typename> class Rule>
static void OpBackward(const typename Op::Params& params, DataType type,
                       const typename Op::Inputs& operands,
                       const void* grad_output, void* workspace,
                       const typename Op::Gradients& gradients,
                       const ParallelFor& parallel_for) {
  WithRule<Rule>(params, type, [&](auto zero, const auto& rule) {
    using T = decltype(zero);
    using E = typename AccumulatorOf<T>::Type;
    constexpr auto displacements = kDisplacements<Op>;
    const E* rois = static_cast<const E*>(operands.rois);
    const E* from = static_cast<const E*>(operands.*displacements.data);
    E* to = static_cast<E*>(gradients.*displacements.gradient);
    const T* gradient = static_cast<const T*>(grad_output);
    if (gradients.inputs != nullptr) {
      ScatterPass(rule, rois, from, gradient, workspace,
                  static_cast<T*>(gradients.inputs), parallel_for);
    }
    if (to != nullptr) {
      DisplacePass(rule, static_cast<const T*>(operands.inputs), rois, from,
                   gradient, workspace, to, parallel_for);
    }
  });
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Finds the bins of a ROI, and the pixels that the bins read, on a GPU.
//
// The sums are those of cpu/roi_bins-inl.h: a bin is the weighted sum of the
// rows and columns that its samples read. A pooling operator flows through
// these files:
//
//   roi_bins      A Rule places a ROI's bins. Two threads of each bin find the
//                 rows and the columns that it reads, with their weights, and
//                 leave them in shared memory (Planner).
//   roi_lanes     The threads of a block, divided among bins and their
//                 channels.
//   roi_packing   Position-sensitive maps, reordered so that a bin reads
//                 channels that lie side by side.
//   roi_passes    Forward and the two gradients.
//
// If a bin reads more than kWindow rows or columns, they are found window after
// window; ForEachWindow leads all threads of a block through the windows.
//
// The passes are written for a Rule: how one operator divides a ROI. A Rule
// has the fields of RoiGeometry and
//   RoiAxis<E> Axis(E from, E to, bool along_x) const   of these corners
//   E Displacement(E value, E size) const   map pixels, of an axis of that size
//   E DisplacementSlope(E size) const       its derivative
//   static constexpr double kMargin     a sample may lie this far outside of
//                                       [0, size - 1]
//   static constexpr double kPhase      of a bin's first sample, in steps
//   static constexpr bool kMeanOfAll    samples outside count, as zeros
// (deformable_*_rule-inl.h, which the CPU uses too).

#ifndef TF_DEFORM_CC_CORE_CUDA_ROI_BINS_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_ROI_BINS_INL_H_

#include "cc/core/cuda/device-inl.h"

// For the rules, which are compiled here and for the CPU.
#define TF_DEFORM_RULE_NAMESPACE cuda
#define TF_DEFORM_RULE_FUNCTION __device__ __forceinline__

namespace tf_deform {
namespace cuda {

constexpr int kThreads = 128;  // of a block, at most
constexpr int kBlocks = 4;     // at once; without it, the compiler spills
constexpr int kMaxBins = 32;   // of a block
constexpr int kWindow = 16;    // rows or columns of a window

// Sizes of a call.
struct RoiGeometry {
  int64_t batch, height, width;
  int64_t num_rois;
  Divider pooled_h, pooled_w;
  Divider group_h, group_w;         // cells of the position-sensitive maps
  Divider part_h, part_w;           // displacements of a ROI
  Divider classes, class_channels;  // with a displacement of their own
  int64_t samples_h, samples_w;     // of a bin along an axis, at most

  __host__ __device__ int64_t Depth() const {
    return classes.value * class_channels.value;
  }
  __host__ __device__ int64_t Cells() const {
    return group_h.value * group_w.value;
  }
  __host__ __device__ int64_t Pixels() const { return height * width; }
  __host__ __device__ int64_t Image() const {
    return Pixels() * Cells() * Depth();
  }
  __host__ __device__ int64_t Bins() const {
    return pooled_h.value * pooled_w.value;
  }
  __host__ __device__ int64_t Pooled(bool along_x) const {
    return along_x ? pooled_w.value : pooled_h.value;
  }
};

// Images that kernels read or add to, and where elements lie in them.
struct Maps {
  int64_t first, images;                // first image; how many
  int64_t image, cell, pixel, channel;  // from one to the next, in elements
};

// The type in which a bin's samples along one axis are counted; at most
// 2^32 - 2.
using SampleCount = uint32_t;

// One axis of a ROI, in map pixels.
template <typename E>
struct RoiAxis {
  E start;              // of its first bin
  E size;               // of the ROI
  E bin;                // from one bin to the next
  E step;               // from one sample to the next
  SampleCount samples;  // of a bin
};

// A product that no fused multiply-add takes: whether a sample on the edge
// counts has to be the same as on the CPU.
__device__ __forceinline__ float Product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ double Product(double a, double b) {
  return __dmul_rn(a, b);
}

template <typename E>
__device__ __forceinline__ bool IsFinite(E value) {
  return value - value == 0;
}

// A row of `rois`.
template <typename E>
struct RoiRow {
  E batch_index, x1, y1, x2, y2;

  // Row `index` of `rois`.
  __device__ __forceinline__ static RoiRow Read(const E* rois, int64_t index) {
    const E* roi = rois + 5 * index;
    return {roi[0], roi[1], roi[2], roi[3], roi[4]};
  }

  // Returns the image that the ROI lies in; -1 for padding, for batch indices
  // that are no image's, for corners that are not finite, and if images have no
  // pixels.
  __device__ __forceinline__ int64_t Image(const RoiGeometry& g) const {
    const bool counts = (batch_index >= 0) &
                        (batch_index < static_cast<E>(g.batch)) & IsFinite(x1) &
                        IsFinite(y1) & IsFinite(x2) & IsFinite(y2) &
                        (g.Pixels() > 0);
    if (!counts) return -1;
    const int64_t image = static_cast<int64_t>(batch_index);
    return image < g.batch && static_cast<E>(image) == batch_index ? image : -1;
  }
};

// The rows (or the columns) that the samples of a bin read, and their weights,
// for one window at a time. The other fields are the state from which the next
// window is found.
template <typename E>
struct AxisWeights {
  E weight[kWindow];      // sums of the samples' bilinear weights
  E slope[kWindow];       // derivatives of the weights by the displacement
  int at[kWindow];        // rows or columns
  int count;              // of this window
  SampleCount samples;    // that are not skipped, in all windows
  SampleCount next, all;  // the first sample of the next window; past the last
  E start, step;  // of the first sample, less its phase; between samples
  E reach;        // pixels that a displacement of 1 is
};

// The number of pixels along an axis, and the range of pixels whose weights are
// wanted: [low, high).
struct Span {
  int pixels, low, high;
};

// Finds the weights of the next window, and slopes only if kSlopes.
template <bool kSlopes, typename Rule, typename E>
__device__ __forceinline__ void FindWeights(const Rule&, const Span& span,
                                            AxisWeights<E>* weights) {
  const E last = static_cast<E>(span.pixels - 1);
  const E least = -static_cast<E>(Rule::kMargin);
  const E most = last + static_cast<E>(Rule::kMargin);
  const E start = weights->start, step = weights->step;
  const SampleCount all = weights->all;
  const bool is_first = weights->next == 0;  // then all samples are counted
  SampleCount samples = is_first ? 0 : weights->samples, next = all;
  int count = 0;
  int top = -2;               // first row of the sample before
  int here_at = -1, up = -1;  // places of its two rows, -1: not wanted
  const auto append = [&](int pixel) {
    if (pixel < span.low || pixel >= span.high) return -1;
    weights->at[count] = pixel;
    weights->weight[count] = 0;
    if constexpr (kSlopes) weights->slope[count] = 0;
    return count++;
  };
  for (SampleCount k = weights->next; k < all; ++k) {
    // In ascending order, so that a sample reads two new rows, or one new row
    // and the last one, or the last two.
    const SampleCount i = step < 0 ? all - 1 - k : k;
    const E raw =
        start + Product(static_cast<E>(i) + static_cast<E>(Rule::kPhase), step);
    // Written so that NaN lies outside.
    if (!(raw >= least && raw <= most)) continue;
    if (is_first) ++samples;
    if (next != all) continue;
    const E place = raw < 0 ? E(0) : raw > last ? last : raw;
    const int here = static_cast<int>(
        Min(static_cast<int64_t>(place), int64_t{span.pixels} - 1));
    if (here != top) {
      if (count + 2 > kWindow) {
        next = k;
        if (!is_first || Rule::kMeanOfAll) break;
        continue;  // the other samples are only counted
      }
      here_at = here == top + 1 ? up : append(here);
      // The last pixel's value holds beyond the edge.
      up = here + 1 < span.pixels ? append(here + 1) : here_at;
      top = here;
    }
    const E distance = place - static_cast<E>(here);
    const E change = raw < 0 || raw >= last ? E(0) : E(1);
    if (here_at >= 0) {
      weights->weight[here_at] += 1 - distance;
      if constexpr (kSlopes) weights->slope[here_at] -= change;
    }
    if (up >= 0) {
      weights->weight[up] += distance;
      if constexpr (kSlopes) weights->slope[up] += change;
    }
  }
  weights->count = count;
  weights->samples = samples;
  weights->next = next;
}

// A bin of one class, in shared memory.
template <typename E>
struct Bin {
  AxisWeights<E> y, x;
  E samples;       // that its mean is made of
  E share;         // 1 / samples, 0 if there is none
  int64_t output;  // its first element in output and count; -1: leave it alone
  int64_t map;     // its first element in the maps

  __device__ __forceinline__ bool IsEmpty() const {
    return y.count == 0 || x.count == 0;
  }
};

// Finds the weights of one of the block's bins along one axis; each bin takes
// two threads, and threads without a bin do nothing.
template <typename E>
struct Planner {
  Bin<E>* bin;  // null: nothing
  AxisWeights<E>* weights;
  bool along_x;
  Span span;

  __device__ __forceinline__ Planner(const RoiGeometry& g, Bin<E>* bins,
                                     int count)
      : bin(nullptr), weights(nullptr), along_x(threadIdx.x % 2 != 0) {
    const int i = static_cast<int>(threadIdx.x) / 2;
    if (i < count) {
      bin = bins + i;
      weights = along_x ? &bin->x : &bin->y;
    }
    span.pixels = static_cast<int>(along_x ? g.width : g.height);
    span.low = 0;
    span.high = span.pixels;
  }

  // Begins bin (r, ph, pw) of class k; no bin if not `exists`. A bin reads
  // nothing if its ROI lies in none of the images of `maps`. Its output is then
  // left alone, unless the ROI lies in no image at all and `maps` has the
  // first.
  template <typename Rule>
  __device__ __forceinline__ void Plan(const Rule& rule, const Maps& maps,
                                       const E* rois, const E* displacements,
                                       bool exists, int64_t r, int64_t ph,
                                       int64_t pw, int64_t k) const {
    if (bin == nullptr) return;
    if (!exists) {
      weights->next = weights->all = 0;
      if (!along_x) bin->output = -1;
      return;
    }
    const int64_t part =
        (r * rule.part_h + ph * rule.part_h / rule.pooled_h) * rule.part_w +
        pw * rule.part_w / rule.pooled_w;
    const int64_t pair = (part * rule.classes + k) * 2;
    // Starts all reads before it uses any of them.
    const auto roi = RoiRow<E>::Read(rois, r);
    E moved = 0;
    if (displacements != nullptr) moved = displacements[pair + along_x];
    const int64_t image = roi.Image(rule);
    const bool is_here =
        image >= maps.first && image < maps.first + maps.images;
    const RoiAxis<E> axis = rule.Axis(along_x ? roi.x1 : roi.y1,
                                      along_x ? roi.x2 : roi.y2, along_x);
    E start = Product(static_cast<E>(along_x ? pw : ph), axis.bin) + axis.start;
    if (displacements != nullptr) start += rule.Displacement(moved, axis.size);
    weights->start = start;
    weights->step = axis.step;
    weights->reach = rule.DisplacementSlope(axis.size);
    weights->next = 0;
    weights->all = is_here ? axis.samples : 0;
    if (along_x) return;
    const int64_t cell = ph * rule.group_h / rule.pooled_h * rule.group_w +
                         pw * rule.group_w / rule.pooled_w;
    const bool is_mine = is_here || (image < 0 && maps.first == 0);
    bin->output = is_mine ? ((r * rule.pooled_h + ph) * rule.pooled_w + pw) *
                                    rule.Depth() +
                                k * rule.class_channels
                          : -1;
    bin->map = (image - maps.first) * maps.image + cell * maps.cell +
               k * rule.class_channels * maps.channel;
  }

  // Calls body() for every window of the bins' weights. All threads of the
  // block call this together; when it returns, all of them have left the last
  // body.
  template <bool kSlopes, typename Rule, typename Body>
  __device__ __forceinline__ void ForEachWindow(const Rule& rule,
                                                const Body& body) const {
    bool next_rows = true;
    for (;;) {
      if (bin != nullptr && (along_x || next_rows)) {
        FindWeights<kSlopes>(rule, span, weights);
      }
      // The neighbouring lane has the other axis.
      const uint32_t mine = bin == nullptr     ? 0
                            : Rule::kMeanOfAll ? weights->all
                                               : weights->samples;
      const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, 1);
      if (bin != nullptr && !along_x) {
        const E samples = static_cast<E>(static_cast<uint64_t>(mine) * other);
        bin->samples = samples;
        bin->share = samples > 0 ? 1 / samples : E(0);
      }
      const bool has_more = bin != nullptr && weights->next < weights->all;
      const bool more_columns = __syncthreads_or(has_more && along_x);
      body();
      const bool more_rows = __syncthreads_or(has_more && !along_x);
      next_rows = !more_columns;
      if (!next_rows) continue;
      if (!more_rows) return;
      if (bin != nullptr && along_x) weights->next = 0;
    }
  }
};

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_ROI_BINS_INL_H_

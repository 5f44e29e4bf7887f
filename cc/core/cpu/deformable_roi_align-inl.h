// SPDX-License-Identifier: Apache-2.0
// Deformable ROIAlign on the CPU, for one instruction set.
//
// No include guard: see simd-inl.h.

#include "cc/core/cpu/simd-inl.h"
// The next two build on the one before.
#include "cc/core/cpu/tasks-inl.h"
//
#include "cc/core/cpu/roi_pooling-inl.h"

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Samples that a bin has along an axis, at most, where their number follows
// from the size of the ROI.
static inline int64_t MaxAdaptiveSamples(int64_t pixels, int64_t pooled) {
  return CeilDiv(2 * pixels, pooled);
}

// What the operator makes of a ROI, see roi_pooling-inl.h.
template <typename E>
struct ROIAlignRule : RoiGeometry {
  static constexpr double kMargin = 1;
  static constexpr bool kMeanOfAll = true;

  E spatial_scale, gamma;
  int64_t sampling_ratio;

  explicit ROIAlignRule(const DeformableROIAlignParams& p)
      : RoiGeometry{
            p.batch,
            p.height,
            p.width,
            p.num_rois,
            p.pooled_h,
            p.pooled_w,
            /*group_h=*/1,
            /*group_w=*/1,
            /*part_h=*/p.pooled_h,
            /*part_w=*/p.pooled_w,
            /*classes=*/1,
            /*class_channels=*/p.channels,
            p.sampling_ratio > 0 ? p.sampling_ratio
                                 : MaxAdaptiveSamples(p.height, p.pooled_h),
            p.sampling_ratio > 0 ? p.sampling_ratio
                                 : MaxAdaptiveSamples(p.width, p.pooled_w)},
        spatial_scale(static_cast<E>(p.spatial_scale)),
        gamma(static_cast<E>(p.gamma)),
        sampling_ratio(p.sampling_ratio) {}

  Roi<E> Locate(const E* roi) const {
    return {Axis(roi[2], roi[4], pooled_h, samples_h),
            Axis(roi[1], roi[3], pooled_w, samples_w)};
  }

  E Displacement(E value, E size) const { return gamma * size * value; }

  E DisplacementSlope(E size) const { return gamma * size; }

 private:
  RoiAxis<E> Axis(E from, E to, int64_t pooled, int64_t most) const {
    const E start = Rounded(from * spatial_scale) - E(0.5);
    const E size = (to - from) * spatial_scale;
    const E bin = size / static_cast<E>(pooled);
    int64_t samples = sampling_ratio;
    if (samples <= 0) {
      // Written so that NaN gives none.
      samples = bin < static_cast<E>(most) ? static_cast<int64_t>(bin) : most;
      if (!(bin > 0)) samples = 0;
      if (samples < most && static_cast<E>(samples) < bin) ++samples;
    }
    const E step = bin / static_cast<E>(Max(samples, 1));
    return {start, size, bin, step, E(0.5), samples};
  }
};

static int64_t WorkspaceBytes(const DeformableROIAlignParams& params,
                              DataType type, int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    const ROIAlignRule<typename AccumulatorOf<T>::Type> rule(params);
    bytes = PoolWorkspace<T>(rule, num_workers);
  });
  return bytes;
}

// The passes run one after the other in the same workspace.
static int64_t BackwardWorkspaceBytes(const DeformableROIAlignParams& params,
                                      DataType type,
                                      const DeformableROIAlignGradients& wanted,
                                      int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    const ROIAlignRule<typename AccumulatorOf<T>::Type> rule(params);
    if (wanted.inputs != nullptr) {
      bytes = ScatterWorkspace<T>(rule, num_workers);
    }
    if (wanted.offset != nullptr) {
      bytes = Max(bytes, PoolWorkspace<T>(rule, num_workers));
    }
  });
  return bytes;
}

static void Forward(const DeformableROIAlignParams& params, DataType type,
                    const DeformableROIAlignInputs& operands, void* workspace,
                    void* output, const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    using E = typename AccumulatorOf<T>::Type;
    PoolPass<T>(ROIAlignRule<E>(params), static_cast<const T*>(operands.inputs),
                static_cast<const E*>(operands.rois),
                static_cast<const E*>(operands.offset), workspace,
                static_cast<T*>(output), nullptr, parallel_for);
  });
}

static void Backward(const DeformableROIAlignParams& params, DataType type,
                     const DeformableROIAlignInputs& operands,
                     const void* grad_output, void* workspace,
                     const DeformableROIAlignGradients& gradients,
                     const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    using E = typename AccumulatorOf<T>::Type;
    const ROIAlignRule<E> rule(params);
    const E* rois = static_cast<const E*>(operands.rois);
    const E* offset = static_cast<const E*>(operands.offset);
    const T* gradient = static_cast<const T*>(grad_output);
    if (gradients.inputs != nullptr) {
      ScatterPass<T>(rule, rois, offset, gradient, workspace,
                     static_cast<T*>(gradients.inputs), parallel_for);
    }
    if (gradients.offset != nullptr) {
      DisplacePass<T>(rule, static_cast<const T*>(operands.inputs), rois,
                      offset, gradient, workspace,
                      static_cast<E*>(gradients.offset), parallel_for);
    }
  });
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

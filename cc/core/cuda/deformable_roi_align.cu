// SPDX-License-Identifier: Apache-2.0
// Deformable ROIAlign on a GPU.

#include "cc/core/checks.h"
#include "cc/core/cuda/roi_pooling-inl.h"
#include "cc/core/deformable_roi_align.h"

namespace tf_deform {
namespace cuda {

// What the operator makes of a ROI, see roi_pooling-inl.h.
template <typename E>
struct ROIAlignRule : RoiGeometry {
  static constexpr double kMargin = 1;
  static constexpr double kPhase = 0.5;
  static constexpr bool kMeanOfAll = true;

  E spatial_scale, gamma;
  int64_t sampling_ratio;
  int64_t most_h, most_w;  // samples where they follow from the ROI's size

  explicit ROIAlignRule(const DeformableROIAlignParams& p)
      : RoiGeometry{p.batch,
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
                    /*class_channels=*/p.channels},
        spatial_scale(static_cast<E>(p.spatial_scale)),
        gamma(static_cast<E>(p.gamma)),
        sampling_ratio(p.sampling_ratio),
        most_h(CeilDiv(2 * p.height, p.pooled_h)),
        most_w(CeilDiv(2 * p.width, p.pooled_w)) {}

  __device__ __forceinline__ RoiAxis<E> Axis(E from, E to, bool along_x) const {
    const E start = Product(from, spatial_scale) - E(0.5);
    const E size = (to - from) * spatial_scale;
    const E bin =
        size / static_cast<E>(along_x ? pooled_w.value : pooled_h.value);
    int64_t samples = sampling_ratio;
    if (samples <= 0) {
      const int64_t most = along_x ? most_w : most_h;
      // Written so that NaN gives none.
      samples = bin < static_cast<E>(most) ? static_cast<int64_t>(bin) : most;
      if (!(bin > 0)) samples = 0;
      if (samples < most && static_cast<E>(samples) < bin) ++samples;
    }
    const E step = bin / static_cast<E>(Max(samples, 1));
    return {start, size, bin, step, static_cast<uint32_t>(samples)};
  }

  __device__ __forceinline__ E Displacement(E value, E size) const {
    return Product(gamma * size, value);
  }

  __device__ __forceinline__ E DisplacementSlope(E size) const {
    return gamma * size;
  }
};

namespace {

Status CheckParams(const DeformableROIAlignParams& params, DataType type) {
  return CheckCall(type, {params.batch, params.height, params.width,
                          params.channels, params.num_rois});
}

}  // namespace

int64_t WorkspaceBytes(const DeformableROIAlignParams& params, DataType type) {
  int64_t bytes = 0;
  (void)WithType(type, [&](auto zero) {
    using T = decltype(zero);
    bytes = PoolWorkspace<T>(ROIAlignRule<Accumulator<T>>(params));
    return Status();
  });
  return bytes;
}

// The passes run one after the other in the same workspace.
int64_t BackwardWorkspaceBytes(const DeformableROIAlignParams& params,
                               DataType type,
                               const DeformableROIAlignGradients& wanted,
                               const CudaStream& stream) {
  int64_t bytes = 0;
  (void)WithType(type, [&](auto zero) {
    using T = decltype(zero);
    const ROIAlignRule<Accumulator<T>> rule(params);
    if (wanted.inputs != nullptr) bytes = ScatterWorkspace<T>(rule, stream);
    if (wanted.offset != nullptr) bytes = Max(bytes, PoolWorkspace<T>(rule));
    return Status();
  });
  return bytes;
}

Status Forward(const DeformableROIAlignParams& params, DataType type,
               const DeformableROIAlignInputs& operands, void* workspace,
               void* output, const CudaStream& stream) {
  TF_DEFORM_RETURN_IF_ERROR(CheckDriver());
  TF_DEFORM_RETURN_IF_ERROR(CheckParams(params, type));
  return WithType(type, [&](auto zero) {
    using T = decltype(zero);
    using E = Accumulator<T>;
    return PoolPass(ROIAlignRule<E>(params),
                    static_cast<const T*>(operands.inputs),
                    static_cast<const E*>(operands.rois),
                    static_cast<const E*>(operands.offset), workspace,
                    static_cast<T*>(output), nullptr, stream);
  });
}

Status Backward(const DeformableROIAlignParams& params, DataType type,
                const DeformableROIAlignInputs& operands,
                const void* grad_output, void* workspace,
                const DeformableROIAlignGradients& gradients,
                const CudaStream& stream) {
  TF_DEFORM_RETURN_IF_ERROR(CheckDriver());
  TF_DEFORM_RETURN_IF_ERROR(CheckParams(params, type));
  return WithType(type, [&](auto zero) {
    using T = decltype(zero);
    using E = Accumulator<T>;
    const ROIAlignRule<E> rule(params);
    const E* rois = static_cast<const E*>(operands.rois);
    const E* offset = static_cast<const E*>(operands.offset);
    const T* gradient = static_cast<const T*>(grad_output);
    if (gradients.inputs != nullptr) {
      TF_DEFORM_RETURN_IF_ERROR(
          ScatterPass(rule, rois, offset, gradient, workspace,
                      static_cast<T*>(gradients.inputs), stream));
    }
    if (gradients.offset == nullptr) return Status();
    return DisplacePass(rule, static_cast<const T*>(operands.inputs), rois,
                        offset, gradient, workspace,
                        static_cast<E*>(gradients.offset), stream);
  });
}

}  // namespace cuda
}  // namespace tf_deform

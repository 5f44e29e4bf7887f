// SPDX-License-Identifier: Apache-2.0
// Deformable position-sensitive ROI pooling on a GPU.

#include "cc/core/checks.h"
#include "cc/core/cuda/roi_pooling-inl.h"
#include "cc/core/deformable_psroi_pool.h"

namespace tf_deform {
namespace cuda {

// To the nearest integer, halves away from zero.
template <typename E>
__device__ __forceinline__ E RoundHalfAway(E value) {
  // From 2^62 on there are no fractions, and no int64_t either.
  if (!(value > E(-4e18) && value < E(4e18))) return value;
  const E whole = static_cast<E>(static_cast<int64_t>(value));
  const E rest = value - whole;
  return rest >= E(0.5) ? whole + 1 : rest <= E(-0.5) ? whole - 1 : whole;
}

// What the operator makes of a ROI, see roi_pooling-inl.h.
template <typename E>
struct PSROIPoolRule : RoiGeometry {
  static constexpr double kMargin = 0.5;
  static constexpr double kPhase = 0;
  static constexpr bool kMeanOfAll = false;

  E spatial_scale, trans_std;
  int64_t sample_per_part;

  explicit PSROIPoolRule(const DeformablePSROIPoolParams& p)
      : RoiGeometry{p.batch,    p.height,      p.width,
                    p.num_rois, p.pooled_h,    p.pooled_w,
                    p.group_h,  p.group_w,     p.part_h,
                    p.part_w,   p.num_classes, p.output_dim / p.num_classes},
        spatial_scale(static_cast<E>(p.spatial_scale)),
        trans_std(static_cast<E>(p.trans_std)),
        sample_per_part(p.sample_per_part) {}

  __device__ __forceinline__ RoiAxis<E> Axis(E from, E to, bool along_x) const {
    const E start = Product(RoundHalfAway(from), spatial_scale) - E(0.5);
    const E end = Product(RoundHalfAway(to) + 1, spatial_scale) - E(0.5);
    const E size = end - start > E(0.1) ? end - start : E(0.1);
    const E bin =
        size / static_cast<E>(along_x ? pooled_w.value : pooled_h.value);
    const E step = bin / static_cast<E>(sample_per_part);
    return {start, size, bin, step, static_cast<uint32_t>(sample_per_part)};
  }

  __device__ __forceinline__ E Displacement(E value, E size) const {
    return Product(value * trans_std, size);
  }

  __device__ __forceinline__ E DisplacementSlope(E size) const {
    return trans_std * size;
  }
};

namespace {

Status CheckParams(const DeformablePSROIPoolParams& params, DataType type) {
  return CheckCall(type,
                   {params.batch, params.height, params.width, params.channels,
                    params.num_rois, params.num_classes});
}

}  // namespace

int64_t WorkspaceBytes(const DeformablePSROIPoolParams& params, DataType type) {
  int64_t bytes = 0;
  (void)WithType(type, [&](auto zero) {
    using T = decltype(zero);
    bytes = PoolWorkspace<T>(PSROIPoolRule<Accumulator<T>>(params));
    return Status();
  });
  return bytes;
}

// The passes run one after the other in the same workspace.
int64_t BackwardWorkspaceBytes(const DeformablePSROIPoolParams& params,
                               DataType type,
                               const DeformablePSROIPoolGradients& wanted,
                               const CudaStream& stream) {
  int64_t bytes = 0;
  (void)WithType(type, [&](auto zero) {
    using T = decltype(zero);
    const PSROIPoolRule<Accumulator<T>> rule(params);
    if (wanted.inputs != nullptr) bytes = ScatterWorkspace<T>(rule, stream);
    if (wanted.trans != nullptr) bytes = Max(bytes, PoolWorkspace<T>(rule));
    return Status();
  });
  return bytes;
}

Status Forward(const DeformablePSROIPoolParams& params, DataType type,
               const DeformablePSROIPoolInputs& operands, void* workspace,
               void* output, float* count, const CudaStream& stream) {
  TF_DEFORM_RETURN_IF_ERROR(CheckDriver());
  TF_DEFORM_RETURN_IF_ERROR(CheckParams(params, type));
  return WithType(type, [&](auto zero) {
    using T = decltype(zero);
    using E = Accumulator<T>;
    return PoolPass(PSROIPoolRule<E>(params),
                    static_cast<const T*>(operands.inputs),
                    static_cast<const E*>(operands.rois),
                    static_cast<const E*>(operands.trans), workspace,
                    static_cast<T*>(output), count, stream);
  });
}

Status Backward(const DeformablePSROIPoolParams& params, DataType type,
                const DeformablePSROIPoolInputs& operands,
                const void* grad_output, void* workspace,
                const DeformablePSROIPoolGradients& gradients,
                const CudaStream& stream) {
  TF_DEFORM_RETURN_IF_ERROR(CheckDriver());
  TF_DEFORM_RETURN_IF_ERROR(CheckParams(params, type));
  return WithType(type, [&](auto zero) {
    using T = decltype(zero);
    using E = Accumulator<T>;
    const PSROIPoolRule<E> rule(params);
    const E* rois = static_cast<const E*>(operands.rois);
    const E* trans = static_cast<const E*>(operands.trans);
    const T* gradient = static_cast<const T*>(grad_output);
    if (gradients.inputs != nullptr) {
      TF_DEFORM_RETURN_IF_ERROR(
          ScatterPass(rule, rois, trans, gradient, workspace,
                      static_cast<T*>(gradients.inputs), stream));
    }
    if (gradients.trans == nullptr) return Status();
    return DisplacePass(rule, static_cast<const T*>(operands.inputs), rois,
                        trans, gradient, workspace,
                        static_cast<E*>(gradients.trans), stream);
  });
}

}  // namespace cuda
}  // namespace tf_deform

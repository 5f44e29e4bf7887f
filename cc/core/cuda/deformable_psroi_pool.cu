// SPDX-License-Identifier: Apache-2.0
// Runs deformable position-sensitive ROI pooling on a GPU.

#include "cc/core/checks.h"
#include "cc/core/cuda/roi_passes-inl.h"
#include "cc/core/deformable_psroi_pool.h"
// The rule builds on the files before.
#include "cc/core/deformable_psroi_pool_rule-inl.h"

namespace tf_deform {
namespace cuda {
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

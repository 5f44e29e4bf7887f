// SPDX-License-Identifier: Apache-2.0
// Runs deformable ROIAlign on a GPU.

#include "cc/core/checks.h"
#include "cc/core/cuda/roi_passes-inl.h"
#include "cc/core/deformable_roi_align.h"
// The rule builds on the files before.
#include "cc/core/deformable_roi_align_rule-inl.h"

namespace tf_deform {
namespace cuda {
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

// SPDX-License-Identifier: Apache-2.0
// Deformable position-sensitive ROI pooling on the CPU: one source for every
// instruction set, and the choice among them at run time.

#include "cc/core/deformable_psroi_pool.h"

#include "cc/core/checks.h"
#include "cc/core/rois.h"

#define TF_DEFORM_SOURCE "cc/core/cpu/deformable_psroi_pool-inl.h"
#include "cc/core/cpu/every_isa-inl.h"

namespace tf_deform {
namespace cpu {
namespace {

Status CheckOperands(const DeformablePSROIPoolParams& params, DataType type,
                     const DeformablePSROIPoolInputs& operands) {
  TF_DEFORM_RETURN_IF_ERROR(
      CheckCall(type, {params.batch, params.height, params.width,
                       params.channels, params.num_rois, params.num_classes}));
  if (operands.bad_rois_are_padding) return Status();
  return CheckBatchIndices(operands.rois, type, params.num_rois, params.batch);
}

}  // namespace

int64_t WorkspaceBytes(const DeformablePSROIPoolParams& params, DataType type,
                       int num_workers) {
  return TF_DEFORM_BEST(WorkspaceBytes)(params, type, num_workers);
}

int64_t BackwardWorkspaceBytes(const DeformablePSROIPoolParams& params,
                               DataType type,
                               const DeformablePSROIPoolGradients& wanted,
                               int num_workers) {
  return TF_DEFORM_BEST(BackwardWorkspaceBytes)(params, type, wanted,
                                                num_workers);
}

Status Forward(const DeformablePSROIPoolParams& params, DataType type,
               const DeformablePSROIPoolInputs& operands, void* workspace,
               void* output, float* count, const ParallelFor& parallel_for) {
  TF_DEFORM_RETURN_IF_ERROR(CheckOperands(params, type, operands));
  TF_DEFORM_BEST(Forward)
  (params, type, operands, workspace, output, count, parallel_for);
  return Status();
}

Status Backward(const DeformablePSROIPoolParams& params, DataType type,
                const DeformablePSROIPoolInputs& operands,
                const void* grad_output, void* workspace,
                const DeformablePSROIPoolGradients& gradients,
                const ParallelFor& parallel_for) {
  TF_DEFORM_RETURN_IF_ERROR(CheckOperands(params, type, operands));
  TF_DEFORM_BEST(Backward)
  (params, type, operands, grad_output, workspace, gradients, parallel_for);
  return Status();
}

}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Deformable ROIAlign on the CPU: one source for every
// instruction set, and the choice among them at run time.

#include "cc/core/deformable_roi_align.h"

#include "cc/core/checks.h"
#include "cc/core/rois.h"

#define TF_DEFORM_SOURCE "cc/core/cpu/deformable_roi_align-inl.h"
#include "cc/core/cpu/every_isa-inl.h"

namespace tf_deform {
namespace cpu {
namespace {

Status CheckOperands(const DeformableROIAlignParams& params, DataType type,
                     const DeformableROIAlignInputs& operands) {
  TF_DEFORM_RETURN_IF_ERROR(
      CheckCall(type, {params.batch, params.height, params.width,
                       params.channels, params.num_rois}));
  if (operands.bad_rois_are_padding) return Status();
  return CheckBatchIndices(operands.rois, type, params.num_rois, params.batch);
}

}  // namespace

int64_t WorkspaceBytes(const DeformableROIAlignParams& params, DataType type,
                       int num_workers) {
  return TF_DEFORM_BEST(WorkspaceBytes)(params, type, num_workers);
}

int64_t BackwardWorkspaceBytes(const DeformableROIAlignParams& params,
                               DataType type,
                               const DeformableROIAlignGradients& wanted,
                               int num_workers) {
  return TF_DEFORM_BEST(BackwardWorkspaceBytes)(params, type, wanted,
                                                num_workers);
}

Status Forward(const DeformableROIAlignParams& params, DataType type,
               const DeformableROIAlignInputs& operands, void* workspace,
               void* output, const ParallelFor& parallel_for) {
  TF_DEFORM_RETURN_IF_ERROR(CheckOperands(params, type, operands));
  TF_DEFORM_BEST(Forward)
  (params, type, operands, workspace, output, parallel_for);
  return Status();
}

Status Backward(const DeformableROIAlignParams& params, DataType type,
                const DeformableROIAlignInputs& operands,
                const void* grad_output, void* workspace,
                const DeformableROIAlignGradients& gradients,
                const ParallelFor& parallel_for) {
  TF_DEFORM_RETURN_IF_ERROR(CheckOperands(params, type, operands));
  TF_DEFORM_BEST(Backward)
  (params, type, operands, grad_output, workspace, gradients, parallel_for);
  return Status();
}

}  // namespace cpu
}  // namespace tf_deform

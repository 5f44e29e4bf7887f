// SPDX-License-Identifier: Apache-2.0
// Deformable convolution on the CPU: one source for every instruction set, and
// the choice among them at run time.

#include "cc/core/deformable_conv2d.h"

#include "cc/core/checks.h"

#define TF_DEFORM_SOURCE "cc/core/cpu/deformable_conv2d-inl.h"
#include "cc/core/cpu/every_isa-inl.h"

namespace tf_deform {
namespace cpu {
namespace {

Status CheckParams(const DeformableConv2DParams& params, DataType type) {
  return CheckCall(
      type, {params.batch, params.height, params.width, params.channels,
             params.kernel_h, params.kernel_w, params.filters, params.groups,
             params.out_h, params.out_w});
}

}  // namespace

int64_t WorkspaceBytes(const DeformableConv2DParams& params, DataType type,
                       int num_workers) {
  return TF_DEFORM_BEST(WorkspaceBytes)(params, type, num_workers);
}

int64_t BackwardWorkspaceBytes(const DeformableConv2DParams& params,
                               DataType type,
                               const DeformableConv2DGradients& wanted,
                               int num_workers) {
  return TF_DEFORM_BEST(BackwardWorkspaceBytes)(params, type, wanted,
                                                num_workers);
}

Status Forward(const DeformableConv2DParams& params, DataType type,
               const DeformableConv2DInputs& operands, void* workspace,
               void* output, const ParallelFor& parallel_for) {
  TF_DEFORM_RETURN_IF_ERROR(CheckParams(params, type));
  TF_DEFORM_BEST(Forward)(params, type, operands, workspace, output,
                          parallel_for);
  return Status();
}

Status Backward(const DeformableConv2DParams& params, DataType type,
                const DeformableConv2DInputs& operands, const void* grad_output,
                void* workspace, const DeformableConv2DGradients& gradients,
                const ParallelFor& parallel_for) {
  TF_DEFORM_RETURN_IF_ERROR(CheckParams(params, type));
  TF_DEFORM_BEST(Backward)(params, type, operands, grad_output, workspace,
                           gradients, parallel_for);
  return Status();
}

}  // namespace cpu
}  // namespace tf_deform

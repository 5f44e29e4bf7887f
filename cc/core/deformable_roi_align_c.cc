// SPDX-License-Identifier: Apache-2.0
// Deformable ROIAlign: C entry points, for callers
// without a framework.

#include "cc/core/c_api.h"
#include "cc/core/deformable_roi_align.h"
#include "cc/core/threads.h"

using tf_deform::Report;

// Judges the shapes and completes `params`. `offset` and `grad_output` may be
// null.
TF_DEFORM_C_API int TfDeformDeformableROIAlignValidate(
    tf_deform::DeformableROIAlignParams* params, const tf_deform::Shape* inputs,
    const tf_deform::Shape* rois, const tf_deform::Shape* offset,
    const tf_deform::Shape* grad_output, char* message, int64_t message_size) {
  tf_deform::DeformableROIAlignShapes shapes;
  shapes.inputs = *inputs;
  shapes.rois = *rois;
  shapes.offset = offset;
  shapes.grad_output = grad_output;
  return Report(tf_deform::Validate(shapes, params), message, message_size);
}

TF_DEFORM_C_API int64_t TfDeformDeformableROIAlignCpuWorkspaceBytes(
    const tf_deform::DeformableROIAlignParams* params, int data_type,
    int num_threads) {
  return tf_deform::cpu::WorkspaceBytes(
      *params, static_cast<tf_deform::DataType>(data_type), num_threads);
}

TF_DEFORM_C_API int64_t TfDeformDeformableROIAlignCpuBackwardWorkspaceBytes(
    const tf_deform::DeformableROIAlignParams* params, int data_type,
    const tf_deform::DeformableROIAlignGradients* wanted, int num_threads) {
  return tf_deform::cpu::BackwardWorkspaceBytes(
      *params, static_cast<tf_deform::DataType>(data_type), *wanted,
      num_threads);
}

TF_DEFORM_C_API int TfDeformDeformableROIAlignCpuForward(
    const tf_deform::DeformableROIAlignParams* params, int data_type,
    const tf_deform::DeformableROIAlignInputs* operands, void* workspace,
    void* output, int num_threads, char* message, int64_t message_size) {
  return Report(
      tf_deform::cpu::Forward(
          *params, static_cast<tf_deform::DataType>(data_type), *operands,
          workspace, output, tf_deform::Threads(num_threads)),
      message, message_size);
}

TF_DEFORM_C_API int TfDeformDeformableROIAlignCpuBackward(
    const tf_deform::DeformableROIAlignParams* params, int data_type,
    const tf_deform::DeformableROIAlignInputs* operands,
    const void* grad_output, void* workspace,
    const tf_deform::DeformableROIAlignGradients* gradients, int num_threads,
    char* message, int64_t message_size) {
  return Report(
      tf_deform::cpu::Backward(
          *params, static_cast<tf_deform::DataType>(data_type), *operands,
          grad_output, workspace, *gradients, tf_deform::Threads(num_threads)),
      message, message_size);
}

#ifdef TF_DEFORM_CUDA

TF_DEFORM_C_API int64_t TfDeformDeformableROIAlignCudaWorkspaceBytes(
    const tf_deform::DeformableROIAlignParams* params, int data_type) {
  return tf_deform::cuda::WorkspaceBytes(
      *params, static_cast<tf_deform::DataType>(data_type));
}

TF_DEFORM_C_API int64_t TfDeformDeformableROIAlignCudaBackwardWorkspaceBytes(
    const tf_deform::DeformableROIAlignParams* params, int data_type,
    const tf_deform::DeformableROIAlignGradients* wanted,
    const tf_deform::CudaStream* stream) {
  return tf_deform::cuda::BackwardWorkspaceBytes(
      *params, static_cast<tf_deform::DataType>(data_type), *wanted, *stream);
}

TF_DEFORM_C_API int TfDeformDeformableROIAlignCudaForward(
    const tf_deform::DeformableROIAlignParams* params, int data_type,
    const tf_deform::DeformableROIAlignInputs* operands, void* workspace,
    void* output, const tf_deform::CudaStream* stream, char* message,
    int64_t message_size) {
  return Report(tf_deform::cuda::Forward(
                    *params, static_cast<tf_deform::DataType>(data_type),
                    *operands, workspace, output, *stream),
                message, message_size);
}

TF_DEFORM_C_API int TfDeformDeformableROIAlignCudaBackward(
    const tf_deform::DeformableROIAlignParams* params, int data_type,
    const tf_deform::DeformableROIAlignInputs* operands,
    const void* grad_output, void* workspace,
    const tf_deform::DeformableROIAlignGradients* gradients,
    const tf_deform::CudaStream* stream, char* message, int64_t message_size) {
  return Report(tf_deform::cuda::Backward(
                    *params, static_cast<tf_deform::DataType>(data_type),
                    *operands, grad_output, workspace, *gradients, *stream),
                message, message_size);
}

#endif  // TF_DEFORM_CUDA

// SPDX-License-Identifier: Apache-2.0
// Deformable position-sensitive ROI pooling: C entry points, for callers
// without a framework.

#include "cc/core/c_api.h"
#include "cc/core/deformable_psroi_pool.h"
#include "cc/core/threads.h"

using tf_deform::Report;

// Judges the shapes and completes `params`. `trans` and `grad_output` may be
// null.
TF_DEFORM_C_API int TfDeformDeformablePSROIPoolValidate(
    tf_deform::DeformablePSROIPoolParams* params,
    const tf_deform::Shape* inputs, const tf_deform::Shape* rois,
    const tf_deform::Shape* trans, const tf_deform::Shape* grad_output,
    char* message, int64_t message_size) {
  tf_deform::DeformablePSROIPoolShapes shapes;
  shapes.inputs = *inputs;
  shapes.rois = *rois;
  shapes.trans = trans;
  shapes.grad_output = grad_output;
  return Report(tf_deform::Validate(shapes, params), message, message_size);
}

TF_DEFORM_C_API int64_t TfDeformDeformablePSROIPoolCpuWorkspaceBytes(
    const tf_deform::DeformablePSROIPoolParams* params, int data_type,
    int num_threads) {
  return tf_deform::cpu::WorkspaceBytes(
      *params, static_cast<tf_deform::DataType>(data_type), num_threads);
}

TF_DEFORM_C_API int64_t TfDeformDeformablePSROIPoolCpuBackwardWorkspaceBytes(
    const tf_deform::DeformablePSROIPoolParams* params, int data_type,
    const tf_deform::DeformablePSROIPoolGradients* wanted, int num_threads) {
  return tf_deform::cpu::BackwardWorkspaceBytes(
      *params, static_cast<tf_deform::DataType>(data_type), *wanted,
      num_threads);
}

TF_DEFORM_C_API int TfDeformDeformablePSROIPoolCpuForward(
    const tf_deform::DeformablePSROIPoolParams* params, int data_type,
    const tf_deform::DeformablePSROIPoolInputs* operands, void* workspace,
    void* output, float* count, int num_threads, char* message,
    int64_t message_size) {
  return Report(
      tf_deform::cpu::Forward(
          *params, static_cast<tf_deform::DataType>(data_type), *operands,
          workspace, output, count, tf_deform::Threads(num_threads)),
      message, message_size);
}

TF_DEFORM_C_API int TfDeformDeformablePSROIPoolCpuBackward(
    const tf_deform::DeformablePSROIPoolParams* params, int data_type,
    const tf_deform::DeformablePSROIPoolInputs* operands,
    const void* grad_output, void* workspace,
    const tf_deform::DeformablePSROIPoolGradients* gradients, int num_threads,
    char* message, int64_t message_size) {
  return Report(
      tf_deform::cpu::Backward(
          *params, static_cast<tf_deform::DataType>(data_type), *operands,
          grad_output, workspace, *gradients, tf_deform::Threads(num_threads)),
      message, message_size);
}

#ifdef TF_DEFORM_CUDA

TF_DEFORM_C_API int64_t TfDeformDeformablePSROIPoolCudaWorkspaceBytes(
    const tf_deform::DeformablePSROIPoolParams* params, int data_type) {
  return tf_deform::cuda::WorkspaceBytes(
      *params, static_cast<tf_deform::DataType>(data_type));
}

TF_DEFORM_C_API int64_t TfDeformDeformablePSROIPoolCudaBackwardWorkspaceBytes(
    const tf_deform::DeformablePSROIPoolParams* params, int data_type,
    const tf_deform::DeformablePSROIPoolGradients* wanted,
    const tf_deform::CudaStream* stream) {
  return tf_deform::cuda::BackwardWorkspaceBytes(
      *params, static_cast<tf_deform::DataType>(data_type), *wanted, *stream);
}

TF_DEFORM_C_API int TfDeformDeformablePSROIPoolCudaForward(
    const tf_deform::DeformablePSROIPoolParams* params, int data_type,
    const tf_deform::DeformablePSROIPoolInputs* operands, void* workspace,
    void* output, float* count, const tf_deform::CudaStream* stream,
    char* message, int64_t message_size) {
  return Report(tf_deform::cuda::Forward(
                    *params, static_cast<tf_deform::DataType>(data_type),
                    *operands, workspace, output, count, *stream),
                message, message_size);
}

TF_DEFORM_C_API int TfDeformDeformablePSROIPoolCudaBackward(
    const tf_deform::DeformablePSROIPoolParams* params, int data_type,
    const tf_deform::DeformablePSROIPoolInputs* operands,
    const void* grad_output, void* workspace,
    const tf_deform::DeformablePSROIPoolGradients* gradients,
    const tf_deform::CudaStream* stream, char* message, int64_t message_size) {
  return Report(tf_deform::cuda::Backward(
                    *params, static_cast<tf_deform::DataType>(data_type),
                    *operands, grad_output, workspace, *gradients, *stream),
                message, message_size);
}

#endif  // TF_DEFORM_CUDA

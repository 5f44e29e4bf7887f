// SPDX-License-Identifier: Apache-2.0
// Defines C entry points about the GPU's driver, for callers without a
// framework.

#ifdef TF_DEFORM_CUDA

#include "cc/core/c_api.h"
#include "cc/core/cuda.h"

using tf_deform::Report;

TF_DEFORM_C_API int TfDeformCudaJudgeDriver(int driver, int runtime,
                                            char* message,
                                            int64_t message_size) {
  return Report(tf_deform::cuda::JudgeDriver(driver, runtime), message,
                message_size);
}

TF_DEFORM_C_API int TfDeformCudaJudgeGpu(int major, int minor, char* message,
                                         int64_t message_size) {
  return Report(tf_deform::cuda::JudgeGpu(major, minor), message, message_size);
}

TF_DEFORM_C_API int TfDeformCudaCheckDriver(char* message,
                                            int64_t message_size) {
  return Report(tf_deform::cuda::CheckDriver(), message, message_size);
}

#endif  // TF_DEFORM_CUDA

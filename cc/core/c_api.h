// SPDX-License-Identifier: Apache-2.0
// Defines the C entry points of the core, for callers without a framework.
//
// Every entry point that can fail returns a Status::Code and, if that is not
// 0, writes the text of the error to `message` (message_size bytes, may be 0).

#ifndef TF_DEFORM_CC_CORE_C_API_H_
#define TF_DEFORM_CC_CORE_C_API_H_

#include <cstdio>

#include "cc/core/common.h"
#include "cc/core/threads.h"

#define TF_DEFORM_C_API extern "C" __attribute__((visibility("default")))

namespace tf_deform {

inline int Report(const Status& status, char* message, int64_t message_size) {
  if (!status.ok() && message_size > 0) {
    snprintf(message, static_cast<size_t>(message_size), "%s", status.message);
  }
  return status.code;
}

}  // namespace tf_deform

// Defines the C entry points of `Op`, named TfDeformOpCpuForward and so on, on
// every device of this build. The arguments after `Op` name the second output
// of Forward, if it has one. `data_type` is a DataType.
#define TF_DEFORM_C_ENTRY_POINTS(Op, ...)                                   \
  TF_DEFORM_C_API int64_t TfDeform##Op##CpuWorkspaceBytes(                  \
      const Op::Params* params, int data_type, int num_threads) {           \
    return cpu::WorkspaceBytes(*params, static_cast<DataType>(data_type),   \
                               num_threads);                                \
  }                                                                         \
  TF_DEFORM_C_API int64_t TfDeform##Op##CpuBackwardWorkspaceBytes(          \
      const Op::Params* params, int data_type, const Op::Gradients* wanted, \
      int num_threads) {                                                    \
    return cpu::BackwardWorkspaceBytes(                                     \
        *params, static_cast<DataType>(data_type), *wanted, num_threads);   \
  }                                                                         \
  TF_DEFORM_C_RUN(Op, Cpu, cpu, int num_threads, Threads(num_threads),      \
                  __VA_ARGS__)                                              \
  TF_DEFORM_C_CUDA_ENTRY_POINTS(Op, __VA_ARGS__)

#ifdef TF_DEFORM_CUDA
#define TF_DEFORM_C_CUDA_ENTRY_POINTS(Op, ...)                              \
  TF_DEFORM_C_API int64_t TfDeform##Op##CudaWorkspaceBytes(                 \
      const Op::Params* params, int data_type) {                            \
    return cuda::WorkspaceBytes(*params, static_cast<DataType>(data_type)); \
  }                                                                         \
  TF_DEFORM_C_API int64_t TfDeform##Op##CudaBackwardWorkspaceBytes(         \
      const Op::Params* params, int data_type, const Op::Gradients* wanted, \
      const CudaStream* stream) {                                           \
    return cuda::BackwardWorkspaceBytes(                                    \
        *params, static_cast<DataType>(data_type), *wanted, *stream);       \
  }                                                                         \
  TF_DEFORM_C_RUN(Op, Cuda, cuda, const CudaStream* stream, *stream,        \
                  __VA_ARGS__)
#else
#define TF_DEFORM_C_CUDA_ENTRY_POINTS(Op, ...)
#endif

// Defines Forward and Backward on one device, which run on `executor`.
#define TF_DEFORM_C_RUN(Op, Device, device, executor_parameter, executor, ...) \
  TF_DEFORM_C_API int TfDeform##Op##Device##Forward(                           \
      const Op::Params* params, int data_type, const Op::Inputs* operands,     \
      void* workspace, void* output,                                           \
      __VA_OPT__(float* __VA_ARGS__, ) executor_parameter, char* message,      \
      int64_t message_size) {                                                  \
    return Report(device::Forward(*params, static_cast<DataType>(data_type),   \
                                  *operands, workspace, output,                \
                                  __VA_OPT__(__VA_ARGS__, ) executor),         \
                  message, message_size);                                      \
  }                                                                            \
  TF_DEFORM_C_API int TfDeform##Op##Device##Backward(                          \
      const Op::Params* params, int data_type, const Op::Inputs* operands,     \
      const void* grad_output, void* workspace,                                \
      const Op::Gradients* gradients, executor_parameter, char* message,       \
      int64_t message_size) {                                                  \
    return Report(                                                             \
        device::Backward(*params, static_cast<DataType>(data_type), *operands, \
                         grad_output, workspace, *gradients, executor),        \
        message, message_size);                                                \
  }

#endif  // TF_DEFORM_CC_CORE_C_API_H_

// A library of the CUDA kernels on emulated threads: what cc/core lacks in it.
// SPDX-License-Identifier: Apache-2.0
//
// Linked from this file, cc/core/*_cuda.cu (but device_cuda.cu), *_c.cc and
// what those need, all compiled with -DTF_DEFORM_CUDA -include
// tests/core/emulated_cuda.h.

#include "cc/core/cuda.h"
#include "cc/core/deformable_conv2d.h"
#include "cc/core/deformable_psroi_pool.h"
#include "cc/core/deformable_roi_align.h"

extern "C" __attribute__((visibility("default"))) void TfDeformEmulatedOrder(
    int backwards) {
  emulated::block.backwards = backwards != 0;
}

namespace tf_deform {
namespace cuda {

Status CheckDriver() { return Status(); }
Status JudgeDriver(int, int) { return Status(); }
Status JudgeGpu(int, int) { return Status(); }

}  // namespace cuda

// The CPU kernels are in the library that is tested against this one.
namespace cpu {

#define TF_DEFORM_NO_CPU(Op, OUTPUTS)                                          \
  int64_t WorkspaceBytes(const Op##Params&, DataType, int) { abort(); }        \
  int64_t BackwardWorkspaceBytes(const Op##Params&, DataType,                  \
                                 const Op##Gradients&, int) {                  \
    abort();                                                                   \
  }                                                                            \
  Status Forward(const Op##Params&, DataType, const Op##Inputs&, void*,        \
                 OUTPUTS, const ParallelFor&) {                                \
    abort();                                                                   \
  }                                                                            \
  Status Backward(const Op##Params&, DataType, const Op##Inputs&, const void*, \
                  void*, const Op##Gradients&, const ParallelFor&) {           \
    abort();                                                                   \
  }

#define TF_DEFORM_TWO_OUTPUTS void*, float*
TF_DEFORM_NO_CPU(DeformableConv2D, void*)
TF_DEFORM_NO_CPU(DeformablePSROIPool, TF_DEFORM_TWO_OUTPUTS)
TF_DEFORM_NO_CPU(DeformableROIAlign, void*)

}  // namespace cpu
}  // namespace tf_deform

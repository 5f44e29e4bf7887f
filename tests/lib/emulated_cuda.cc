// SPDX-License-Identifier: Apache-2.0
// What stands for cc/core/cuda/device.cu where kernels are emulated, and how
// tests reach the emulation.

#include "cc/core/cuda.h"

#define TF_DEFORM_EXPORT extern "C" __attribute__((visibility("default")))

// Whether the threads of every block run backwards.
TF_DEFORM_EXPORT void TfDeformEmulatedOrder(int backwards) {
  emulated::block.backwards = backwards != 0;
}

// That of the last launch.
TF_DEFORM_EXPORT void* TfDeformEmulatedStream() {
  return emulated::block.stream;
}

namespace tf_deform {
namespace cuda {

Status CheckDriver() { return Status(); }
Status JudgeDriver(int, int) { return Status(); }
Status JudgeGpu(int, int) { return Status(); }

}  // namespace cuda
}  // namespace tf_deform

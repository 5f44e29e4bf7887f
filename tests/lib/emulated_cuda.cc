// SPDX-License-Identifier: Apache-2.0
// Replaces cc/core/cuda/device.cu where kernels are emulated, and lets
// tests reach the emulation.

#include "cc/core/cuda.h"

#define TF_DEFORM_EXPORT extern "C" __attribute__((visibility("default")))

// Says whether the threads of every block run backwards.
TF_DEFORM_EXPORT void TfDeformEmulatedOrder(int backwards) {
  emulated::block.backwards = backwards != 0;
}

// Returns the stream of the last launch.
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

// The GPU's driver, and what this build needs of it.
// SPDX-License-Identifier: Apache-2.0

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>

#include "cc/core/cuda.h"

namespace tf_deform {
namespace cuda {
namespace {

Status Failed(const char* what, cudaError_t error) {
  return Internal(
      "Expected the CUDA runtime to tell the version of %s. "
      "Received: %s",
      what, cudaGetErrorString(error));
}

}  // namespace

Status JudgeDriver(int driver, int runtime) {
  // Drivers run what was built for any minor version of their own major
  // version.
  if (driver / 1000 >= runtime / 1000) return Status();
  char received[64] = "no driver";
  if (driver > 0) {
    snprintf(received, sizeof(received), "a driver for CUDA %d.%d",
             driver / 1000, driver % 1000 / 10);
  }
  return Internal(
      "Expected a GPU driver for CUDA %d or newer, as tf_deform was built with "
      "CUDA %d.%d. Received: %s. %s the GPU's driver, or run on the CPU",
      runtime / 1000, runtime / 1000, runtime % 1000 / 10, received,
      driver > 0 ? "Update" : "Install");
}

Status CheckDriver() {
  static std::atomic<bool> is_good{false};
  if (is_good.load(std::memory_order_relaxed)) return Status();
  int driver, runtime;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return Failed("the driver", error);
  error = cudaRuntimeGetVersion(&runtime);
  if (error != cudaSuccess) return Failed("itself", error);
  const Status status = JudgeDriver(driver, runtime);
  if (status.ok()) is_good.store(true, std::memory_order_relaxed);
  return status;
}

}  // namespace cuda
}  // namespace tf_deform

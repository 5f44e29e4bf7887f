// SPDX-License-Identifier: Apache-2.0
// Checks that the GPU's driver is new enough for this build.

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>

#include "cc/core/cuda.h"

namespace tf_deform {
namespace cuda {
namespace device_cu {

Status Failed(const char* what, cudaError_t error) {
  (void)cudaGetLastError();  // or the next call would report it again
  return Internal("Expected the CUDA runtime to tell %s. Received: %s", what,
                  cudaGetErrorString(error));
}

constexpr int kDevices = 64;  // whose check is remembered

}  // namespace device_cu

using namespace device_cu;

Status JudgeDriver(int driver, int runtime) {
  // A driver runs code that was built for any minor version of its own major
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

Status JudgeGpu(int major, int minor) {
  if (major >= 8) return Status();
  return Internal(
      "Expected a GPU of compute capability 8.0 or newer. Received: %d.%d. "
      "Place the op on a newer one, or on the CPU: tf.device('/CPU:0')",
      major, minor);
}

Status CheckDriver() {
  static std::atomic<bool> is_good[kDevices];  // all false
  int driver, runtime, device, major, minor;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return Failed("the driver's version", error);
  error = cudaRuntimeGetVersion(&runtime);
  if (error != cudaSuccess) return Failed("its own version", error);
  TF_DEFORM_RETURN_IF_ERROR(JudgeDriver(driver, runtime));
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return Failed("the current GPU", error);
  const bool remembers = device < kDevices;
  if (remembers && is_good[device].load(std::memory_order_relaxed)) {
    return Status();
  }
  error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor,
                                   device);
  }
  if (error != cudaSuccess) return Failed("what the GPU can do", error);
  const Status status = JudgeGpu(major, minor);
  if (remembers && status.ok()) {
    is_good[device].store(true, std::memory_order_relaxed);
  }
  return status;
}

}  // namespace cuda
}  // namespace tf_deform

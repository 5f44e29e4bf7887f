// SPDX-License-Identifier: Apache-2.0
// Checks that the GPU's driver is new enough for this build. Exists only in a
// build with nvcc (TF_DEFORM_CUDA).

#ifndef TF_DEFORM_CC_CORE_CUDA_H_
#define TF_DEFORM_CC_CORE_CUDA_H_

#include "cc/core/common.h"

namespace tf_deform {
namespace cuda {

// Checks that a driver for CUDA `driver` runs code whose CUDA runtime is
// `runtime` (1000 * major + 10 * minor; 0 if there is no driver). The error
// names both versions.
Status JudgeDriver(int driver, int runtime);

// Checks that a GPU of that compute capability runs this build's code.
Status JudgeGpu(int major, int minor);

// Checks this machine's driver, this build's runtime and the current GPU.
Status CheckDriver();

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_H_

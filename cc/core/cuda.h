// The GPU's driver, and what this build needs of it. Only in a build with nvcc
// (TF_DEFORM_CUDA). SPDX-License-Identifier: Apache-2.0

#ifndef TF_DEFORM_CC_CORE_CUDA_H_
#define TF_DEFORM_CC_CORE_CUDA_H_

#include "cc/core/common.h"

namespace tf_deform {
namespace cuda {

// Whether a driver for CUDA `driver` runs code whose CUDA runtime is `runtime`
// (1000 * major + 10 * minor, 0: there is none). The error names both.
Status JudgeDriver(int driver, int runtime);

// The same of this machine's driver and this build's runtime.
Status CheckDriver();

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_H_

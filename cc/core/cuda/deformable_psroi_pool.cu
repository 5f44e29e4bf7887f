// SPDX-License-Identifier: Apache-2.0
// Runs deformable position-sensitive ROI pooling on a GPU.

#include "cc/core/cuda/roi_passes-inl.h"
#include "cc/core/deformable_psroi_pool.h"
// The rule builds on the files before.
#include "cc/core/deformable_psroi_pool_rule-inl.h"

namespace tf_deform {
namespace cuda {

TF_DEFORM_CUDA_ENTRY_POINTS(DeformablePSROIPool, PSROIPoolRule, count)

}  // namespace cuda
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Runs deformable ROIAlign on a GPU.

#include "cc/core/cuda/roi_passes-inl.h"
#include "cc/core/deformable_roi_align.h"
// The rule builds on the files before.
#include "cc/core/deformable_roi_align_rule-inl.h"

namespace tf_deform {
namespace cuda {

TF_DEFORM_CUDA_ENTRY_POINTS(DeformableROIAlign, ROIAlignRule)

}  // namespace cuda
}  // namespace tf_deform

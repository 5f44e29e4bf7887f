// SPDX-License-Identifier: Apache-2.0
// Compiles deformable ROIAlign for every instruction set of the CPU, and
// chooses among the sets at run time.

#include "cc/core/deformable_roi_align.h"

#define TF_DEFORM_SOURCE "cc/core/cpu/deformable_roi_align-inl.h"
#include "cc/core/cpu/entry_points.h"
#include "cc/core/cpu/every_isa-inl.h"

namespace tf_deform {
namespace cpu {

TF_DEFORM_CPU_ENTRY_POINTS(DeformableROIAlign)

}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Deformable ROIAlign on the CPU, for one instruction set.
//
// The file has no include guard: see simd-inl.h.

#include "cc/core/cpu/simd-inl.h"
// Each of the next files builds on those before.
#include "cc/core/cpu/tasks-inl.h"
//
#include "cc/core/cpu/roi_bins-inl.h"
//
#include "cc/core/cpu/roi_lanes-inl.h"
//
#include "cc/core/cpu/roi_packing-inl.h"
//
#include "cc/core/cpu/roi_passes-inl.h"
//
#include "cc/core/deformable_roi_align_rule-inl.h"

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

constexpr auto WorkspaceBytes =
    OpWorkspaceBytes<DeformableROIAlign, ROIAlignRule>;
constexpr auto BackwardWorkspaceBytes =
    OpBackwardWorkspaceBytes<DeformableROIAlign, ROIAlignRule>;
constexpr auto Forward = OpForward<DeformableROIAlign, ROIAlignRule>;
constexpr auto Backward = OpBackward<DeformableROIAlign, ROIAlignRule>;

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Deformable position-sensitive ROI pooling on the CPU, for one instruction
// set.
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
#include "cc/core/deformable_psroi_pool_rule-inl.h"

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

constexpr auto WorkspaceBytes =
    OpWorkspaceBytes<DeformablePSROIPool, PSROIPoolRule>;
constexpr auto BackwardWorkspaceBytes =
    OpBackwardWorkspaceBytes<DeformablePSROIPool, PSROIPoolRule>;
constexpr auto Forward = OpForward<DeformablePSROIPool, PSROIPoolRule, float*>;
constexpr auto Backward = OpBackward<DeformablePSROIPool, PSROIPoolRule>;

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

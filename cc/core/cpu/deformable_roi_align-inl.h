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

static int64_t WorkspaceBytes(const DeformableROIAlignParams& params,
                              DataType type, int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    const ROIAlignRule<typename AccumulatorOf<T>::Type> rule(params);
    bytes = PoolWorkspace<T>(rule, num_workers);
  });
  return bytes;
}

// The passes run one after the other in the same workspace.
static int64_t BackwardWorkspaceBytes(const DeformableROIAlignParams& params,
                                      DataType type,
                                      const DeformableROIAlignGradients& wanted,
                                      int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    const ROIAlignRule<typename AccumulatorOf<T>::Type> rule(params);
    if (wanted.inputs != nullptr) {
      bytes = ScatterWorkspace<T>(rule, num_workers);
    }
    if (wanted.offset != nullptr) {
      bytes = Max(bytes, PoolWorkspace<T>(rule, num_workers));
    }
  });
  return bytes;
}

static void Forward(const DeformableROIAlignParams& params, DataType type,
                    const DeformableROIAlignInputs& operands, void* workspace,
                    void* output, const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    using E = typename AccumulatorOf<T>::Type;
    PoolPass<T>(ROIAlignRule<E>(params), static_cast<const T*>(operands.inputs),
                static_cast<const E*>(operands.rois),
                static_cast<const E*>(operands.offset), workspace,
                static_cast<T*>(output), nullptr, parallel_for);
  });
}

static void Backward(const DeformableROIAlignParams& params, DataType type,
                     const DeformableROIAlignInputs& operands,
                     const void* grad_output, void* workspace,
                     const DeformableROIAlignGradients& gradients,
                     const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    using E = typename AccumulatorOf<T>::Type;
    const ROIAlignRule<E> rule(params);
    const E* rois = static_cast<const E*>(operands.rois);
    const E* offset = static_cast<const E*>(operands.offset);
    const T* gradient = static_cast<const T*>(grad_output);
    if (gradients.inputs != nullptr) {
      ScatterPass<T>(rule, rois, offset, gradient, workspace,
                     static_cast<T*>(gradients.inputs), parallel_for);
    }
    if (gradients.offset != nullptr) {
      DisplacePass<T>(rule, static_cast<const T*>(operands.inputs), rois,
                      offset, gradient, workspace,
                      static_cast<E*>(gradients.offset), parallel_for);
    }
  });
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

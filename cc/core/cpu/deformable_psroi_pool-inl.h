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

static int64_t WorkspaceBytes(const DeformablePSROIPoolParams& params,
                              DataType type, int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    const PSROIPoolRule<typename AccumulatorOf<T>::Type> rule(params);
    bytes = PoolWorkspace<T>(rule, num_workers);
  });
  return bytes;
}

// The passes run one after the other in the same workspace.
static int64_t BackwardWorkspaceBytes(
    const DeformablePSROIPoolParams& params, DataType type,
    const DeformablePSROIPoolGradients& wanted, int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    const PSROIPoolRule<typename AccumulatorOf<T>::Type> rule(params);
    if (wanted.inputs != nullptr) {
      bytes = ScatterWorkspace<T>(rule, num_workers);
    }
    if (wanted.trans != nullptr) {
      bytes = Max(bytes, PoolWorkspace<T>(rule, num_workers));
    }
  });
  return bytes;
}

static void Forward(const DeformablePSROIPoolParams& params, DataType type,
                    const DeformablePSROIPoolInputs& operands, void* workspace,
                    void* output, float* count,
                    const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    using E = typename AccumulatorOf<T>::Type;
    PoolPass<T>(PSROIPoolRule<E>(params),
                static_cast<const T*>(operands.inputs),
                static_cast<const E*>(operands.rois),
                static_cast<const E*>(operands.trans), workspace,
                static_cast<T*>(output), count, parallel_for);
  });
}

static void Backward(const DeformablePSROIPoolParams& params, DataType type,
                     const DeformablePSROIPoolInputs& operands,
                     const void* grad_output, void* workspace,
                     const DeformablePSROIPoolGradients& gradients,
                     const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    using E = typename AccumulatorOf<T>::Type;
    const PSROIPoolRule<E> rule(params);
    const E* rois = static_cast<const E*>(operands.rois);
    const E* trans = static_cast<const E*>(operands.trans);
    const T* gradient = static_cast<const T*>(grad_output);
    if (gradients.inputs != nullptr) {
      ScatterPass<T>(rule, rois, trans, gradient, workspace,
                     static_cast<T*>(gradients.inputs), parallel_for);
    }
    if (gradients.trans != nullptr) {
      DisplacePass<T>(rule, static_cast<const T*>(operands.inputs), rois, trans,
                      gradient, workspace, static_cast<E*>(gradients.trans),
                      parallel_for);
    }
  });
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

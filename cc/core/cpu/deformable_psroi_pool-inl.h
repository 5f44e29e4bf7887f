// SPDX-License-Identifier: Apache-2.0
// Deformable position-sensitive ROI pooling on the CPU, for one instruction
// set.
//
// No include guard: see simd-inl.h.

#include "cc/core/cpu/simd-inl.h"
// The next two build on the one before.
#include "cc/core/cpu/tasks-inl.h"
//
#include "cc/core/cpu/roi_pooling-inl.h"

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// To the nearest integer, halves away from zero.
template <typename E>
static inline E RoundHalfAway(E value) {
  // From 2^62 on there are no fractions, and no int64_t either.
  if (!(value > E(-4e18) && value < E(4e18))) return value;
  const E whole = static_cast<E>(static_cast<int64_t>(value));
  const E rest = value - whole;
  return rest >= E(0.5) ? whole + 1 : rest <= E(-0.5) ? whole - 1 : whole;
}

// What the operator makes of a ROI, see roi_pooling-inl.h.
template <typename E>
struct PSROIPoolRule : RoiGeometry {
  static constexpr double kMargin = 0.5;
  static constexpr bool kMeanOfAll = false;

  E spatial_scale, trans_std;
  int64_t sample_per_part;

  explicit PSROIPoolRule(const DeformablePSROIPoolParams& p)
      : RoiGeometry{
            p.batch,           p.height,         p.width,
            p.num_rois,        p.pooled_h,       p.pooled_w,
            p.group_h,         p.group_w,        p.part_h,
            p.part_w,          p.num_classes,    p.output_dim / p.num_classes,
            p.sample_per_part, p.sample_per_part},
        spatial_scale(static_cast<E>(p.spatial_scale)),
        trans_std(static_cast<E>(p.trans_std)),
        sample_per_part(p.sample_per_part) {}

  Roi<E> Locate(const E* roi) const {
    return {Axis(roi[2], roi[4], pooled_h), Axis(roi[1], roi[3], pooled_w)};
  }

  E Displacement(E value, E size) const { return value * trans_std * size; }

  E DisplacementSlope(E size) const { return trans_std * size; }

 private:
  RoiAxis<E> Axis(E from, E to, int64_t pooled) const {
    const E start = Rounded(RoundHalfAway(from) * spatial_scale) - E(0.5);
    const E end = Rounded((RoundHalfAway(to) + 1) * spatial_scale) - E(0.5);
    const E size = end - start > E(0.1) ? end - start : E(0.1);
    const E bin = size / static_cast<E>(pooled);
    const E step = bin / static_cast<E>(sample_per_part);
    return {start, size, bin, step, 0, sample_per_part};
  }
};

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

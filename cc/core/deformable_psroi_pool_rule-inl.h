// SPDX-License-Identifier: Apache-2.0
// Places the samples of deformable position-sensitive ROI pooling: defines its
// Rule (cpu/roi_bins-inl.h, cuda/roi_bins-inl.h), for the CPU and a GPU.
//
// The file has no include guard: see cpu/simd-inl.h.

namespace tf_deform::TF_DEFORM_RULE_NAMESPACE {

template <typename E>
struct PSROIPoolRule : RoiGeometry {
  static constexpr double kMargin = 0.5;
  static constexpr double kPhase = 0;
  static constexpr bool kMeanOfAll = false;

  E spatial_scale, trans_std;

  explicit PSROIPoolRule(const DeformablePSROIPoolParams& p)
      : RoiGeometry{p.batch,
                    p.height,
                    p.width,
                    p.num_rois,
                    p.pooled_h,
                    p.pooled_w,
                    p.group_h,
                    p.group_w,
                    p.part_h,
                    p.part_w,
                    p.num_classes,
                    /*class_channels=*/p.output_dim / p.num_classes,
                    p.sample_per_part,
                    p.sample_per_part},
        spatial_scale(static_cast<E>(p.spatial_scale)),
        trans_std(static_cast<E>(p.trans_std)) {}

  TF_DEFORM_RULE_FUNCTION RoiAxis<E> Axis(E from, E to, bool along_x) const {
    const E start = Product(RoundHalfAway(from), spatial_scale) - E(0.5);
    const E end = Product(RoundHalfAway(to) + 1, spatial_scale) - E(0.5);
    const E size = end - start > E(0.1) ? end - start : E(0.1);
    const E bin = size / static_cast<E>(Pooled(along_x));
    const E step = bin / static_cast<E>(samples_h);
    return {start, size, bin, step, static_cast<SampleCount>(samples_h)};
  }

  TF_DEFORM_RULE_FUNCTION E Displacement(E value, E size) const {
    return Product(value * trans_std, size);
  }

  TF_DEFORM_RULE_FUNCTION E DisplacementSlope(E size) const {
    return trans_std * size;
  }

 private:
  // Rounds to the nearest integer, halves away from zero.
  TF_DEFORM_RULE_FUNCTION static E RoundHalfAway(E value) {
    // Numbers from 2^62 on have no fractions, and do not fit in int64_t.
    if (!(value > E(-4e18) && value < E(4e18))) return value;
    const E whole = static_cast<E>(static_cast<int64_t>(value));
    const E rest = value - whole;
    return rest >= E(0.5) ? whole + 1 : rest <= E(-0.5) ? whole - 1 : whole;
  }
};

}  // namespace tf_deform::TF_DEFORM_RULE_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// Places the samples of deformable ROIAlign: defines its Rule
// (cpu/roi_bins-inl.h, cuda/roi_bins-inl.h), for the CPU and a GPU.
//
// The file has no include guard: see cpu/simd-inl.h.

namespace tf_deform::TF_DEFORM_RULE_NAMESPACE {

template <typename E>
struct ROIAlignRule : RoiGeometry {
  static constexpr double kMargin = 1;
  static constexpr double kPhase = 0.5;
  static constexpr bool kMeanOfAll = true;

  E spatial_scale, gamma;
  int64_t sampling_ratio;

  explicit ROIAlignRule(const DeformableROIAlignParams& p)
      : RoiGeometry{p.batch,
                    p.height,
                    p.width,
                    p.num_rois,
                    p.pooled_h,
                    p.pooled_w,
                    /*group_h=*/1,
                    /*group_w=*/1,
                    /*part_h=*/p.pooled_h,
                    /*part_w=*/p.pooled_w,
                    /*classes=*/1,
                    /*class_channels=*/p.channels,
                    MaxSamples(p.sampling_ratio, p.height, p.pooled_h),
                    MaxSamples(p.sampling_ratio, p.width, p.pooled_w)},
        spatial_scale(static_cast<E>(p.spatial_scale)),
        gamma(static_cast<E>(p.gamma)),
        sampling_ratio(p.sampling_ratio) {}

  TF_DEFORM_RULE_FUNCTION RoiAxis<E> Axis(E from, E to, bool along_x) const {
    const E start = Product(from, spatial_scale) - E(0.5);
    const E size = (to - from) * spatial_scale;
    const E bin = size / static_cast<E>(Pooled(along_x));
    int64_t samples = sampling_ratio;
    if (samples <= 0) {
      const int64_t most = along_x ? samples_w : samples_h;
      // The comparison is written so that NaN gives no samples.
      samples = bin < static_cast<E>(most) ? static_cast<int64_t>(bin) : most;
      if (!(bin > 0)) samples = 0;
      if (samples < most && static_cast<E>(samples) < bin) ++samples;
    }
    const E step = bin / static_cast<E>(Max(samples, 1));
    return {start, size, bin, step, static_cast<SampleCount>(samples)};
  }

  TF_DEFORM_RULE_FUNCTION E Displacement(E value, E size) const {
    return Product(gamma * size, value);
  }

  TF_DEFORM_RULE_FUNCTION E DisplacementSlope(E size) const {
    return gamma * size;
  }

 private:
  // Returns the largest number of samples of a bin along an axis; without a
  // given ratio, the number of samples depends on the size of the ROI.
  static int64_t MaxSamples(int64_t ratio, int64_t pixels, int64_t pooled) {
    return ratio > 0 ? ratio : CeilDiv(2 * pixels, pooled);
  }
};

}  // namespace tf_deform::TF_DEFORM_RULE_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// Defines the attributes of deformable ROIAlign in TensorFlow.

#ifndef TF_DEFORM_CC_TF_DEFORMABLE_ROI_ALIGN_OP_H_
#define TF_DEFORM_CC_TF_DEFORMABLE_ROI_ALIGN_OP_H_

#include "cc/core/deformable_roi_align.h"
#include "cc/tf/attributes.h"

namespace tf_deform {

template <>
struct Attributes<DeformableROIAlign> {
  static constexpr const char* kDefinitions[] = {
      "spatial_scale: list(float)",
      "pooled_size: list(int)",
      "sampling_ratio: int = 0",
      "gamma: list(float)",
  };

  template <typename Source>
  static tensorflow::Status Read(Source* source,
                                 DeformableROIAlignParams* params) {
    TF_RETURN_IF_ERROR(
        GetDouble(source, "spatial_scale", &params->spatial_scale));
    TF_RETURN_IF_ERROR(GetDouble(source, "gamma", &params->gamma));
    TF_RETURN_IF_ERROR(
        source->GetAttr("sampling_ratio", &params->sampling_ratio));
    return GetPair(source, "pooled_size", &params->pooled_h, &params->pooled_w);
  }
};

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_DEFORMABLE_ROI_ALIGN_OP_H_

// SPDX-License-Identifier: Apache-2.0
// Defines the attributes of deformable position-sensitive ROI pooling in
// TensorFlow.

#ifndef TF_DEFORM_CC_TF_DEFORMABLE_PSROI_POOL_OP_H_
#define TF_DEFORM_CC_TF_DEFORMABLE_PSROI_POOL_OP_H_

#include "cc/core/deformable_psroi_pool.h"
#include "cc/tf/attributes.h"

namespace tf_deform {

template <>
struct Attributes<DeformablePSROIPool> {
  static constexpr const char* kDefinitions[] = {
      "output_dim: int",        "spatial_scale: list(float)",
      "pooled_size: list(int)", "group_size: list(int)",
      "part_size: list(int)",   "sample_per_part: int = 4",
      "trans_std: list(float)",
  };

  template <typename Source>
  static tensorflow::Status Read(Source* source,
                                 DeformablePSROIPoolParams* params) {
    TF_RETURN_IF_ERROR(
        GetDouble(source, "spatial_scale", &params->spatial_scale));
    TF_RETURN_IF_ERROR(GetDouble(source, "trans_std", &params->trans_std));
    TF_RETURN_IF_ERROR(source->GetAttr("output_dim", &params->output_dim));
    TF_RETURN_IF_ERROR(
        source->GetAttr("sample_per_part", &params->sample_per_part));
    TF_RETURN_IF_ERROR(
        GetPair(source, "pooled_size", &params->pooled_h, &params->pooled_w));
    TF_RETURN_IF_ERROR(
        GetPair(source, "group_size", &params->group_h, &params->group_w));
    return GetPair(source, "part_size", &params->part_h, &params->part_w);
  }
};

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_DEFORMABLE_PSROI_POOL_OP_H_

// SPDX-License-Identifier: Apache-2.0
// Deformable ROIAlign: attributes, and the core by what it runs on,
// for TensorFlow glue and XLA glue.

#ifndef TF_DEFORM_CC_TF_DEFORMABLE_ROI_ALIGN_OP_H_
#define TF_DEFORM_CC_TF_DEFORMABLE_ROI_ALIGN_OP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cc/core/deformable_roi_align.h"
#include "cc/tf/attributes.h"

namespace tf_deform {

// Reads the attributes that both ops have; for `Source` see attributes.h.
template <typename Source>
tensorflow::Status ReadAttributes(Source* source,
                                  DeformableROIAlignParams* params) {
  TF_RETURN_IF_ERROR(
      GetDouble(source, "spatial_scale", &params->spatial_scale));
  TF_RETURN_IF_ERROR(GetDouble(source, "gamma", &params->gamma));
  TF_RETURN_IF_ERROR(
      source->GetAttr("sampling_ratio", &params->sampling_ratio));
  return GetPair(source, "pooled_size", &params->pooled_h, &params->pooled_w);
}

// The core on both devices, by what it runs on there.
using cpu::Backward;
using cpu::Forward;

inline int64_t WorkspaceBytes(const DeformableROIAlignParams& params,
                              DataType type, const ParallelFor& parallel_for) {
  return cpu::WorkspaceBytes(params, type, parallel_for.num_workers);
}

inline int64_t BackwardWorkspaceBytes(const DeformableROIAlignParams& params,
                                      DataType type,
                                      const DeformableROIAlignGradients& wanted,
                                      const ParallelFor& parallel_for) {
  return cpu::BackwardWorkspaceBytes(params, type, wanted,
                                     parallel_for.num_workers);
}

#ifdef TF_DEFORM_CUDA
using cuda::Backward;
using cuda::BackwardWorkspaceBytes;
using cuda::Forward;

inline int64_t WorkspaceBytes(const DeformableROIAlignParams& params,
                              DataType type, const CudaStream&) {
  return cuda::WorkspaceBytes(params, type);
}
#endif

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_DEFORMABLE_ROI_ALIGN_OP_H_

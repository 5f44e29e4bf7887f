// SPDX-License-Identifier: Apache-2.0
// Deformable position-sensitive ROI pooling: attributes, and the core by what
// it runs on, for TensorFlow glue and XLA glue.

#ifndef TF_DEFORM_CC_TF_DEFORMABLE_PSROI_POOL_OP_H_
#define TF_DEFORM_CC_TF_DEFORMABLE_PSROI_POOL_OP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cc/core/deformable_psroi_pool.h"
#include "cc/tf/attributes.h"

namespace tf_deform {

// Reads the attributes that both ops have; for `Source` see attributes.h.
template <typename Source>
tensorflow::Status ReadAttributes(Source* source,
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

// The core on both devices, by what it runs on there.
using cpu::Backward;
using cpu::Forward;

inline int64_t WorkspaceBytes(const DeformablePSROIPoolParams& params,
                              DataType type, const ParallelFor& parallel_for) {
  return cpu::WorkspaceBytes(params, type, parallel_for.num_workers);
}

inline int64_t BackwardWorkspaceBytes(
    const DeformablePSROIPoolParams& params, DataType type,
    const DeformablePSROIPoolGradients& wanted,
    const ParallelFor& parallel_for) {
  return cpu::BackwardWorkspaceBytes(params, type, wanted,
                                     parallel_for.num_workers);
}

#ifdef TF_DEFORM_CUDA
using cuda::Backward;
using cuda::BackwardWorkspaceBytes;
using cuda::Forward;

inline int64_t WorkspaceBytes(const DeformablePSROIPoolParams& params,
                              DataType type, const CudaStream&) {
  return cuda::WorkspaceBytes(params, type);
}
#endif

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_DEFORMABLE_PSROI_POOL_OP_H_

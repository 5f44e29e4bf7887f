// SPDX-License-Identifier: Apache-2.0
// Deformable convolution: attributes, and the core by what it runs on,
// for TensorFlow glue and XLA glue.

#ifndef TF_DEFORM_CC_TF_DEFORMABLE_CONV2D_OP_H_
#define TF_DEFORM_CC_TF_DEFORMABLE_CONV2D_OP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cc/core/deformable_conv2d.h"
#include "cc/tf/attributes.h"

namespace tf_deform {

// Reads the attributes that both ops have; for `Source` see attributes.h.
template <typename Source>
tensorflow::Status ReadAttributes(Source* source,
                                  DeformableConv2DParams* params) {
  std::vector<int64_t> paddings;
  std::string padding, boundary;
  TF_RETURN_IF_ERROR(
      GetPair(source, "strides", &params->stride_h, &params->stride_w));
  TF_RETURN_IF_ERROR(
      GetPair(source, "dilations", &params->dilation_h, &params->dilation_w));
  TF_RETURN_IF_ERROR(source->GetAttr("explicit_paddings", &paddings));
  TF_RETURN_IF_ERROR(source->GetAttr("offset_groups", &params->offset_groups));
  TF_RETURN_IF_ERROR(source->GetAttr("padding", &padding));
  TF_RETURN_IF_ERROR(source->GetAttr("boundary", &boundary));
  if (padding == "VALID") {
    params->padding = Padding::kValid;
  } else if (padding == "SAME") {
    params->padding = Padding::kSame;
  } else if (padding == "EXPLICIT") {
    params->padding = Padding::kExplicit;
  } else {
    return tensorflow::errors::InvalidArgument(
        "Expected `padding` to be VALID, SAME or EXPLICIT. Received: ",
        padding);
  }
  if (boundary == "zeros") {
    params->boundary = Boundary::kZeros;
  } else if (boundary == "clamp") {
    params->boundary = Boundary::kClamp;
  } else {
    return tensorflow::errors::InvalidArgument(
        "Expected `boundary` to be zeros or clamp. Received: ", boundary);
  }
  const bool is_explicit = params->padding == Padding::kExplicit;
  if (paddings.size() != (is_explicit ? 4 : 0)) {
    return tensorflow::errors::InvalidArgument(
        "Expected `explicit_paddings` to hold (top, bottom, left, right) with "
        "padding EXPLICIT and nothing otherwise. Received: ",
        paddings.size(), " values with padding ", padding);
  }
  if (is_explicit) {
    params->pad_top = paddings[0];
    params->pad_bottom = paddings[1];
    params->pad_left = paddings[2];
    params->pad_right = paddings[3];
  }
  return tensorflow::Status();
}

// The core on both devices, by what it runs on there.
using cpu::Backward;
using cpu::Forward;

inline int64_t WorkspaceBytes(const DeformableConv2DParams& params,
                              DataType type, const ParallelFor& parallel_for) {
  return cpu::WorkspaceBytes(params, type, parallel_for.num_workers);
}

inline int64_t BackwardWorkspaceBytes(const DeformableConv2DParams& params,
                                      DataType type,
                                      const DeformableConv2DGradients& wanted,
                                      const ParallelFor& parallel_for) {
  return cpu::BackwardWorkspaceBytes(params, type, wanted,
                                     parallel_for.num_workers);
}

#ifdef TF_DEFORM_CUDA
using cuda::Backward;
using cuda::BackwardWorkspaceBytes;
using cuda::Forward;

inline int64_t WorkspaceBytes(const DeformableConv2DParams& params,
                              DataType type, const CudaStream&) {
  return cuda::WorkspaceBytes(params, type);
}
#endif

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_DEFORMABLE_CONV2D_OP_H_

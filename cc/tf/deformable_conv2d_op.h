// SPDX-License-Identifier: Apache-2.0
// Defines the attributes of deformable convolution in TensorFlow.

#ifndef TF_DEFORM_CC_TF_DEFORMABLE_CONV2D_OP_H_
#define TF_DEFORM_CC_TF_DEFORMABLE_CONV2D_OP_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cc/core/deformable_conv2d.h"
#include "cc/tf/attributes.h"

namespace tf_deform {

template <>
struct Attributes<DeformableConv2D> {
  static constexpr const char* kDefinitions[] = {
      "strides: list(int)",
      "padding: {'SAME', 'VALID', 'EXPLICIT'}",
      "explicit_paddings: list(int) = []",
      "dilations: list(int) = [1, 1]",
      "offset_groups: int = 1",
      "boundary: {'zeros', 'clamp'} = 'zeros'",
      "modulation: {'mask', 'none', 'sigmoid', '2sigmoid'} = 'mask'",
  };

  template <typename Source>
  static tensorflow::Status Read(Source* source,
                                 DeformableConv2DParams* params) {
    std::vector<int64_t> paddings;
    std::string padding, boundary, modulation;
    TF_RETURN_IF_ERROR(
        GetPair(source, "strides", &params->stride_h, &params->stride_w));
    TF_RETURN_IF_ERROR(
        GetPair(source, "dilations", &params->dilation_h, &params->dilation_w));
    TF_RETURN_IF_ERROR(source->GetAttr("explicit_paddings", &paddings));
    TF_RETURN_IF_ERROR(
        source->GetAttr("offset_groups", &params->offset_groups));
    TF_RETURN_IF_ERROR(source->GetAttr("padding", &padding));
    TF_RETURN_IF_ERROR(source->GetAttr("boundary", &boundary));
    TF_RETURN_IF_ERROR(source->GetAttr("modulation", &modulation));
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
    if (modulation == "mask") {
      params->modulation = Modulation::kMask;
    } else if (modulation == "none") {
      params->modulation = Modulation::kNone;
    } else if (modulation == "sigmoid") {
      params->modulation = Modulation::kSigmoid;
    } else if (modulation == "2sigmoid") {
      params->modulation = Modulation::kTwoSigmoid;
    } else {
      return tensorflow::errors::InvalidArgument(
          "Expected `modulation` to be mask, none, sigmoid or 2sigmoid. "
          "Received: ",
          modulation);
    }
    const bool is_explicit = params->padding == Padding::kExplicit;
    if (paddings.size() != (is_explicit ? 4 : 0)) {
      return tensorflow::errors::InvalidArgument(
          "Expected `explicit_paddings` to hold (top, bottom, left, right) "
          "with "
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
};

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_DEFORMABLE_CONV2D_OP_H_

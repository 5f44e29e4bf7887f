// SPDX-License-Identifier: Apache-2.0
// Deformable ROIAlign: the judgement of attributes and shapes, the same for
// every device and framework.

#include "cc/core/deformable_roi_align.h"

#include "cc/core/checks.h"
#include "cc/core/rois.h"

namespace tf_deform {

Status Validate(const DeformableROIAlignShapes& shapes,
                DeformableROIAlignParams* params) {
  DeformableROIAlignParams& p = *params;
  TF_DEFORM_RETURN_IF_ERROR(
      CheckFactor(p.spatial_scale, false, "spatial_scale"));
  TF_DEFORM_RETURN_IF_ERROR(CheckFactor(p.gamma, true, "gamma"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.pooled_h, 1, "pooled_size"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.pooled_w, 1, "pooled_size"));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckAttribute(p.sampling_ratio, -kMaxExtent, "sampling_ratio"));

  TF_DEFORM_RETURN_IF_ERROR(
      CheckRank(shapes.inputs, 4, "inputs", "batch, height, width, channels"));
  TF_DEFORM_RETURN_IF_ERROR(CheckRoisShape(shapes.rois));
  TF_DEFORM_RETURN_IF_ERROR(CheckImageSize(shapes.inputs));
  p.batch = shapes.inputs.dim(0);
  p.height = shapes.inputs.dim(1);
  p.width = shapes.inputs.dim(2);
  p.channels = shapes.inputs.dim(3);
  p.num_rois = shapes.rois.dim(0);
  if (p.channels == 0) {
    return InvalidArgument(
        "Expected `inputs` to have at least 1 channel. Received: "
        "inputs.shape=%s",
        ShapeText(shapes.inputs).text);
  }

  if (shapes.offset != nullptr) {
    const Shape& offset = *shapes.offset;
    TF_DEFORM_RETURN_IF_ERROR(
        CheckRank(offset, 4, "offset", "num_rois, pooled_h, pooled_w, 2"));
    TF_DEFORM_RETURN_IF_ERROR(CheckDisplacementShape(
        offset, "offset", "pooled_size", p.num_rois, p.pooled_h, p.pooled_w));
    TF_DEFORM_RETURN_IF_ERROR(CheckDimension(
        offset, 3, 2, "offset", "a last dimension of", "(dy, dx)"));
    if (p.num_rois < 0) p.num_rois = offset.dim(0);
  }
  if (shapes.grad_output != nullptr) {
    TF_DEFORM_RETURN_IF_ERROR(CheckGradOutput(
        *shapes.grad_output, "num_rois, pooled_h, pooled_w, channels",
        {p.num_rois, p.pooled_h, p.pooled_w, p.channels}));
  }

  TF_DEFORM_RETURN_IF_ERROR(
      CheckBytes("inputs", {p.batch, p.height, p.width, p.channels}));
  TF_DEFORM_RETURN_IF_ERROR(CheckBytes("rois", {p.num_rois, 5}));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckBytes("offset", {p.num_rois, p.pooled_h, p.pooled_w, 2}));
  return CheckBytes("output", {p.num_rois, p.pooled_h, p.pooled_w, p.channels});
}

}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Checks attributes and shapes of deformable ROIAlign, for every device and
// framework.

#include "cc/core/deformable_roi_align.h"

#include "cc/core/c_api.h"
#include "cc/core/checks.h"
#include "cc/core/rois.h"

namespace tf_deform {

Status Validate(const DeformableROIAlignShapes& shapes,
                DeformableROIAlignParams* params) {
  DeformableROIAlignParams& p = *params;
  const Shape& inputs = *shapes.inputs;
  const Shape& rois = *shapes.rois;
  TF_DEFORM_RETURN_IF_ERROR(
      CheckFactor(p.spatial_scale, false, "spatial_scale"));
  TF_DEFORM_RETURN_IF_ERROR(CheckFactor(p.gamma, true, "gamma"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.pooled_h, 1, "pooled_size"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.pooled_w, 1, "pooled_size"));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckAttribute(p.sampling_ratio, -kMaxExtent, "sampling_ratio"));

  TF_DEFORM_RETURN_IF_ERROR(
      CheckRank(inputs, 4, "inputs", "batch, height, width, channels"));
  TF_DEFORM_RETURN_IF_ERROR(CheckRoisShape(rois));
  TF_DEFORM_RETURN_IF_ERROR(CheckImageSize(inputs));
  p.batch = inputs.dim(0);
  p.height = inputs.dim(1);
  p.width = inputs.dim(2);
  p.channels = inputs.dim(3);
  p.num_rois = rois.dim(0);
  if (p.channels == 0) {
    return InvalidArgument(
        "Expected `inputs` to have at least 1 channel. Received: "
        "inputs.shape=%s",
        ShapeText(inputs).text);
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

Status CheckOperands(const DeformableROIAlignParams& params, DataType type,
                     const DeformableROIAlignInputs& operands) {
  TF_DEFORM_RETURN_IF_ERROR(
      CheckCall(type, {params.batch, params.height, params.width,
                       params.channels, params.num_rois}));
  if (operands.bad_rois_are_padding) return Status();
  return CheckBatchIndices(operands.rois, type, params.num_rois, params.batch);
}

TF_DEFORM_C_API int TfDeformDeformableROIAlignValidate(
    DeformableROIAlignParams* params, const Shape* inputs, const Shape* rois,
    const Shape* offset, const Shape* grad_output, char* message,
    int64_t message_size) {
  const DeformableROIAlignShapes shapes = {inputs, rois, offset, grad_output};
  return Report(Validate(shapes, params), message, message_size);
}

TF_DEFORM_C_ENTRY_POINTS(DeformableROIAlign)

}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Checks attributes and shapes of deformable position-sensitive ROI pooling,
// for every device and framework.

#include "cc/core/deformable_psroi_pool.h"

#include "cc/core/c_api.h"
#include "cc/core/checks.h"
#include "cc/core/rois.h"

namespace tf_deform {

Status Validate(const DeformablePSROIPoolShapes& shapes,
                DeformablePSROIPoolParams* params) {
  DeformablePSROIPoolParams& p = *params;
  const Shape& inputs = *shapes.inputs;
  const Shape& rois = *shapes.rois;
  TF_DEFORM_RETURN_IF_ERROR(
      CheckFactor(p.spatial_scale, false, "spatial_scale"));
  TF_DEFORM_RETURN_IF_ERROR(CheckFactor(p.trans_std, true, "trans_std"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.output_dim, 1, "output_dim"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.pooled_h, 1, "pooled_size"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.pooled_w, 1, "pooled_size"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.group_h, 1, "group_size"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.group_w, 1, "group_size"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.part_h, 1, "part_size"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.part_w, 1, "part_size"));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckAttribute(p.sample_per_part, 1, "sample_per_part"));

  TF_DEFORM_RETURN_IF_ERROR(
      CheckRank(inputs, 4, "inputs",
                "batch, height, width, output_dim * group_h * group_w"));
  TF_DEFORM_RETURN_IF_ERROR(CheckRoisShape(rois));
  TF_DEFORM_RETURN_IF_ERROR(CheckImageSize(inputs));
  p.batch = inputs.dim(0);
  p.height = inputs.dim(1);
  p.width = inputs.dim(2);
  p.num_rois = rois.dim(0);
  if (__builtin_mul_overflow(p.output_dim, p.group_h * p.group_w,
                             &p.channels)) {
    return InvalidArgument(
        "Expected output_dim * group_h * group_w to fit in 64 bits. Received: "
        "output_dim=%lld, group_size=(%lld, %lld)",
        static_cast<LongLong>(p.output_dim), static_cast<LongLong>(p.group_h),
        static_cast<LongLong>(p.group_w));
  }
  if (inputs.dim(3) >= 0 && inputs.dim(3) != p.channels) {
    return InvalidArgument(
        "Expected `inputs` to have %lld channels (output_dim * group_h * "
        "group_w = %lld * %lld * %lld). Received: inputs.shape=%s",
        static_cast<LongLong>(p.channels), static_cast<LongLong>(p.output_dim),
        static_cast<LongLong>(p.group_h), static_cast<LongLong>(p.group_w),
        ShapeText(inputs).text);
  }

  p.num_classes = 1;
  if (shapes.trans != nullptr) {
    const Shape& trans = *shapes.trans;
    TF_DEFORM_RETURN_IF_ERROR(CheckRank(
        trans, 4, "trans", "num_rois, part_h, part_w, num_classes * 2"));
    TF_DEFORM_RETURN_IF_ERROR(CheckDisplacementShape(
        trans, "trans", "part_size", p.num_rois, p.part_h, p.part_w));
    const int64_t pairs = trans.dim(3);
    if (pairs == 0 || (pairs > 0 && pairs % 2 != 0)) {
      return InvalidArgument(
          "Expected the last dimension of `trans` to be 2 * num_classes, (dy, "
          "dx) of each class. Received: trans.shape=%s",
          ShapeText(trans).text);
    }
    p.num_classes = pairs < 0 ? -1 : pairs / 2;
    if (pairs > 0 && p.output_dim % p.num_classes != 0) {
      return InvalidArgument(
          "Expected output_dim to be a multiple of the classes of `trans` "
          "(half of its last dimension). Received: output_dim=%lld, "
          "trans.shape=%s",
          static_cast<LongLong>(p.output_dim), ShapeText(trans).text);
    }
    if (p.num_rois < 0) p.num_rois = trans.dim(0);
  }
  if (shapes.grad_output != nullptr) {
    TF_DEFORM_RETURN_IF_ERROR(CheckGradOutput(
        *shapes.grad_output, "num_rois, pooled_h, pooled_w, output_dim",
        {p.num_rois, p.pooled_h, p.pooled_w, p.output_dim}));
  }

  TF_DEFORM_RETURN_IF_ERROR(
      CheckBytes("inputs", {p.batch, p.height, p.width, p.channels}));
  TF_DEFORM_RETURN_IF_ERROR(CheckBytes("rois", {p.num_rois, 5}));
  if (shapes.trans != nullptr) {
    TF_DEFORM_RETURN_IF_ERROR(CheckBytes(
        "trans", {p.num_rois, p.part_h, p.part_w, shapes.trans->dim(3)}));
  }
  return CheckBytes("output",
                    {p.num_rois, p.pooled_h, p.pooled_w, p.output_dim});
}

Status CheckOperands(const DeformablePSROIPoolParams& params, DataType type,
                     const DeformablePSROIPoolInputs& operands) {
  TF_DEFORM_RETURN_IF_ERROR(
      CheckCall(type, {params.batch, params.height, params.width,
                       params.channels, params.num_rois, params.num_classes}));
  if (operands.bad_rois_are_padding) return Status();
  return CheckBatchIndices(operands.rois, type, params.num_rois, params.batch);
}

TF_DEFORM_C_API int TfDeformDeformablePSROIPoolValidate(
    DeformablePSROIPoolParams* params, const Shape* inputs, const Shape* rois,
    const Shape* trans, const Shape* grad_output, char* message,
    int64_t message_size) {
  const DeformablePSROIPoolShapes shapes = {inputs, rois, trans, grad_output};
  return Report(Validate(shapes, params), message, message_size);
}

TF_DEFORM_C_ENTRY_POINTS(DeformablePSROIPool, count)

}  // namespace tf_deform

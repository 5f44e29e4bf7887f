// SPDX-License-Identifier: Apache-2.0
// Checks attributes and shapes of deformable convolution, for every device and
// framework.

#include "cc/core/deformable_conv2d.h"

#include "cc/core/c_api.h"
#include "cc/core/checks.h"

namespace tf_deform {
namespace {

// Computes the output's size along one axis and, for kValid and kSame, the
// padding.
Status OutputSize(const char* axis, int64_t size, int64_t kernel,
                  int64_t stride, int64_t dilation, Padding padding,
                  int64_t* before, int64_t* after, int64_t* out) {
  if (padding == Padding::kValid) *before = *after = 0;
  if (size < 0 || kernel < 0) return Status();
  // Counts input pixels from the first to the last tap, both included.
  const int64_t span = (kernel - 1) * dilation + 1;
  if (padding == Padding::kSame) {
    *out = size / stride + (size % stride != 0);
    int64_t total = 0;
    if (*out > 0 &&
        (__builtin_add_overflow((*out - 1) * stride - size, span, &total) ||
         total < 0))
      total = 0;
    *before = total / 2;
    *after = total - *before;
    return Status();
  }
  const int64_t room = size + *before + *after - span;
  if (room < 0 && size > 0) {
    return InvalidArgument(
        "Expected the padded %s to be at least the extent of the dilated "
        "kernel, %lld. Received: %s %lld with padding "
        "(%lld, %lld), kernel size %lld, dilation_rate %lld",
        axis, static_cast<LongLong>(span), axis, static_cast<LongLong>(size),
        static_cast<LongLong>(*before), static_cast<LongLong>(*after),
        static_cast<LongLong>(kernel), static_cast<LongLong>(dilation));
  }
  *out = room < 0 ? 0 : room / stride + 1;
  return Status();
}

// Checks the attributes that the caller sets.
Status CheckAttributes(const DeformableConv2DParams& p) {
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.stride_h, 1, "strides"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.stride_w, 1, "strides"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.dilation_h, 1, "dilation_rate"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.dilation_w, 1, "dilation_rate"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.pad_top, 0, "padding"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.pad_bottom, 0, "padding"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.pad_left, 0, "padding"));
  TF_DEFORM_RETURN_IF_ERROR(CheckAttribute(p.pad_right, 0, "padding"));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckAttribute(p.offset_groups, 1, "offset_groups"));
  if (p.padding < Padding::kValid || p.padding > Padding::kExplicit) {
    return InvalidArgument(
        "Expected `padding` to be 0 (valid), 1 (same) or 2 (explicit). "
        "Received: %d",
        static_cast<int>(p.padding));
  }
  if (p.boundary != Boundary::kZeros && p.boundary != Boundary::kClamp) {
    return InvalidArgument(
        "Expected `boundary` to be 0 (zeros) or 1 (clamp). Received: %d",
        static_cast<int>(p.boundary));
  }
  if (p.modulation < Modulation::kMask ||
      p.modulation > Modulation::kTwoSigmoid) {
    return InvalidArgument(
        "Expected `modulation` to be 0 (mask), 1 (none), 2 (sigmoid) or 3 "
        "(2sigmoid). Received: %lld",
        static_cast<LongLong>(p.modulation));
  }
  return Status();
}

// Counts the numbers that an offset holds for each sample.
int64_t OffsetNumbers(const DeformableConv2DParams& p) {
  return p.modulation > Modulation::kNone ? 3 : 2;
}

Status CheckRanks(const DeformableConv2DShapes& shapes,
                  const DeformableConv2DParams& p) {
  TF_DEFORM_RETURN_IF_ERROR(
      CheckRank(*shapes.inputs, 4, "inputs", "batch, height, width, channels"));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckRank(*shapes.kernel, 4, "kernel",
                "kernel_h, kernel_w, channels // groups, filters"));
  TF_DEFORM_RETURN_IF_ERROR(CheckRank(
      *shapes.offset, 4, "offset",
      OffsetNumbers(p) == 2
          ? "batch, out_h, out_w, offset_groups * kernel_h * kernel_w * 2"
          : "batch, out_h, out_w, offset_groups * kernel_h * kernel_w * 3"));
  if (shapes.mask != nullptr) {
    if (p.modulation != Modulation::kMask) {
      return InvalidArgument(
          "Expected no `mask` where `offset` holds what a branch predicts "
          "(`modulation` is not mask). Received: mask.shape=%s",
          ShapeText(*shapes.mask).text);
    }
    TF_DEFORM_RETURN_IF_ERROR(
        CheckRank(*shapes.mask, 4, "mask",
                  "batch, out_h, out_w, offset_groups * kernel_h * kernel_w"));
  }
  return Status();
}

// Checks the channels, groups and filters of inputs and kernel, and fills
// `p.groups`, -1 if a shape does not tell it.
Status CheckChannels(const Shape& inputs, const Shape& kernel,
                     DeformableConv2DParams& p) {
  const int64_t group_channels = kernel.dim(2);
  p.groups = -1;
  TF_DEFORM_RETURN_IF_ERROR(CheckImageSize(inputs));
  if (p.channels == 0) {
    return InvalidArgument(
        "Expected `inputs` to have at least 1 channel. Received: "
        "inputs.shape=%s",
        ShapeText(inputs).text);
  }
  for (int axis = 0; axis < 4; ++axis) {
    if (kernel.dim(axis) == 0 || (axis < 2 && kernel.dim(axis) > kMaxExtent)) {
      return InvalidArgument(
          "Expected every dimension of `kernel` to be at least 1 and its "
          "height and width at most %lld. Received: "
          "kernel.shape=%s",
          static_cast<LongLong>(kMaxExtent), ShapeText(kernel).text);
    }
  }
  if (p.channels > 0 && group_channels > 0) {
    if (p.channels % group_channels != 0) {
      return InvalidArgument(
          "Expected the channels of `inputs` to be a multiple of the input "
          "channels of `kernel` (its third dimension, "
          "channels // groups). Received: inputs.shape=%s, kernel.shape=%s",
          ShapeText(inputs).text, ShapeText(kernel).text);
    }
    p.groups = p.channels / group_channels;
    if (p.filters > 0 && p.filters % p.groups != 0) {
      return InvalidArgument(
          "Expected the filters of `kernel` (its last dimension) to be a "
          "multiple of groups, %lld (channels of `inputs` "
          "// input channels of `kernel`). Received: inputs.shape=%s, "
          "kernel.shape=%s",
          static_cast<LongLong>(p.groups), ShapeText(inputs).text,
          ShapeText(kernel).text);
    }
  }
  if (p.channels > 0 && p.channels % p.offset_groups != 0) {
    return InvalidArgument(
        "Expected the channels of `inputs` to be a multiple of offset_groups, "
        "%lld. Received: inputs.shape=%s",
        static_cast<LongLong>(p.offset_groups), ShapeText(inputs).text);
  }
  return Status();
}

// Computes the number of channels of a mask and of an offset, -1 if the
// kernel's shape does not tell it.
Status FieldChannels(const Shape& kernel, const DeformableConv2DParams& p,
                     int64_t* mask_channels, int64_t* offset_channels) {
  *mask_channels = *offset_channels = -1;
  if (p.kernel_h > 0 && p.kernel_w > 0) {
    if (__builtin_mul_overflow(p.kernel_h * p.kernel_w, p.offset_groups,
                               mask_channels) ||
        __builtin_mul_overflow(*mask_channels, OffsetNumbers(p),
                               offset_channels)) {
      return InvalidArgument(
          "Expected %lld * offset_groups * kernel_h * kernel_w to fit in 64 "
          "bits. Received: offset_groups=%lld, kernel.shape=%s",
          static_cast<LongLong>(OffsetNumbers(p)),
          static_cast<LongLong>(p.offset_groups), ShapeText(kernel).text);
    }
  }
  return Status();
}

// Checks an offset or a mask, which differ in their last dimension alone.
Status CheckField(const Shape& shape, const char* name, int64_t channels,
                  const char* factor, const DeformableConv2DParams& p) {
  TF_DEFORM_RETURN_IF_ERROR(
      CheckDimension(shape, 0, p.batch, name, "batch size", "as `inputs`"));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckDimension(shape, 1, p.out_h, name, "height", "the output's"));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckDimension(shape, 2, p.out_w, name, "width", "the output's"));
  const int64_t received = shape.dim(3);
  if (received < 0 || channels < 0 || received == channels) return Status();
  return InvalidArgument(
      "Expected `%s` to have %lld channels (%s%s * %lld * %lld). Received: "
      "%s.shape=%s",
      name, static_cast<LongLong>(channels), factor, "offset_groups",
      static_cast<LongLong>(p.kernel_h), static_cast<LongLong>(p.kernel_w),
      name, ShapeText(shape).text);
}

}  // namespace

Status Validate(const DeformableConv2DShapes& shapes,
                DeformableConv2DParams* params) {
  DeformableConv2DParams& p = *params;
  const Shape& inputs = *shapes.inputs;
  const Shape& kernel = *shapes.kernel;
  const Shape& offset = *shapes.offset;
  TF_DEFORM_RETURN_IF_ERROR(CheckAttributes(p));
  TF_DEFORM_RETURN_IF_ERROR(CheckRanks(shapes, p));

  p.batch = inputs.dim(0);
  p.height = inputs.dim(1);
  p.width = inputs.dim(2);
  p.channels = inputs.dim(3);
  p.kernel_h = kernel.dim(0);
  p.kernel_w = kernel.dim(1);
  p.filters = kernel.dim(3);
  p.out_h = p.out_w = -1;

  TF_DEFORM_RETURN_IF_ERROR(CheckChannels(inputs, kernel, p));
  TF_DEFORM_RETURN_IF_ERROR(OutputSize("height", p.height, p.kernel_h,
                                       p.stride_h, p.dilation_h, p.padding,
                                       &p.pad_top, &p.pad_bottom, &p.out_h));
  TF_DEFORM_RETURN_IF_ERROR(OutputSize("width", p.width, p.kernel_w, p.stride_w,
                                       p.dilation_w, p.padding, &p.pad_left,
                                       &p.pad_right, &p.out_w));
  int64_t mask_channels, offset_channels;
  TF_DEFORM_RETURN_IF_ERROR(
      FieldChannels(kernel, p, &mask_channels, &offset_channels));
  TF_DEFORM_RETURN_IF_ERROR(CheckField(offset, "offset", offset_channels,
                                       OffsetNumbers(p) == 2 ? "2 * " : "3 * ",
                                       p));
  if (shapes.mask != nullptr) {
    TF_DEFORM_RETURN_IF_ERROR(
        CheckField(*shapes.mask, "mask", mask_channels, "", p));
  }
  if (shapes.grad_output != nullptr) {
    TF_DEFORM_RETURN_IF_ERROR(
        CheckGradOutput(*shapes.grad_output, "batch, out_h, out_w, filters",
                        {p.batch, p.out_h, p.out_w, p.filters}));
  }

  TF_DEFORM_RETURN_IF_ERROR(
      CheckBytes("inputs", {p.batch, p.height, p.width, p.channels}));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckBytes("kernel", {p.kernel_h, p.kernel_w, kernel.dim(2), p.filters}));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckBytes("offset", {p.batch, p.out_h, p.out_w, offset_channels}));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckBytes("output", {p.batch, p.out_h, p.out_w, p.filters}));

  // Reads a size that is still unknown from the offset, which has the batch,
  // height and width of the output.
  if (p.batch < 0) p.batch = offset.dim(0);
  if (p.out_h < 0) p.out_h = offset.dim(1);
  if (p.out_w < 0) p.out_w = offset.dim(2);
  return Status();
}

Status CheckOperands(const DeformableConv2DParams& params, DataType type,
                     const DeformableConv2DInputs&) {
  return CheckCall(
      type, {params.batch, params.height, params.width, params.channels,
             params.kernel_h, params.kernel_w, params.filters, params.groups,
             params.out_h, params.out_w});
}

TF_DEFORM_C_API int TfDeformDeformableConv2DValidate(
    DeformableConv2DParams* params, const Shape* inputs, const Shape* kernel,
    const Shape* offset, const Shape* mask, const Shape* grad_output,
    char* message, int64_t message_size) {
  const DeformableConv2DShapes shapes = {inputs, kernel, offset, mask,
                                         grad_output};
  return Report(Validate(shapes, params), message, message_size);
}

TF_DEFORM_C_API int64_t TfDeformDeformableConv2DCpuPackedBytes(
    const DeformableConv2DParams* params, int data_type) {
  return cpu::PackedBytes(*params, static_cast<DataType>(data_type));
}

TF_DEFORM_C_API int64_t TfDeformDeformableConv2DCpuBackwardPackedBytes(
    const DeformableConv2DParams* params, int data_type,
    const DeformableConv2DGradients* wanted) {
  return cpu::BackwardPackedBytes(*params, static_cast<DataType>(data_type),
                                  *wanted);
}

TF_DEFORM_C_ENTRY_POINTS(DeformableConv2D)

}  // namespace tf_deform

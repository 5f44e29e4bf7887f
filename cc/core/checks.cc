// SPDX-License-Identifier: Apache-2.0
// Checks attributes and shapes, for all operators.

#include "cc/core/checks.h"

namespace tf_deform {

Status CheckAttribute(int64_t value, int64_t least, const char* name) {
  if (value >= least && value <= kMaxExtent) return Status();
  return InvalidArgument(
      "Expected `%s` to hold integers from %lld to %lld. Received: %lld", name,
      static_cast<LongLong>(least), static_cast<LongLong>(kMaxExtent),
      static_cast<LongLong>(value));
}

Status CheckRank(const Shape& shape, int rank, const char* name,
                 const char* axes) {
  if (shape.rank < 0 || shape.rank == rank) return Status();
  return InvalidArgument(
      "Expected `%s` to have rank %d (%s). Received: %s.shape=%s", name, rank,
      axes, name, ShapeText(shape).text);
}

Status CheckDimension(const Shape& shape, int axis, int64_t expected,
                      const char* name, const char* quantity,
                      const char* meaning) {
  const int64_t received = shape.dim(axis);
  if (received < 0 || expected < 0 || received == expected) return Status();
  return InvalidArgument(
      "Expected `%s` to have %s %lld (%s). Received: %s.shape=%s", name,
      quantity, static_cast<LongLong>(expected), meaning, name,
      ShapeText(shape).text);
}

Status CheckImageSize(const Shape& inputs) {
  if (inputs.dim(1) <= kMaxExtent && inputs.dim(2) <= kMaxExtent) {
    return Status();
  }
  return InvalidArgument(
      "Expected height and width of `inputs` to be at most %lld. Received: "
      "inputs.shape=%s",
      static_cast<LongLong>(kMaxExtent), ShapeText(inputs).text);
}

Status CheckGradOutput(const Shape& grad_output, const char* axes,
                       const int64_t (&output)[4]) {
  TF_DEFORM_RETURN_IF_ERROR(CheckRank(grad_output, 4, "grad_output", axes));
  Shape expected;
  expected.rank = 4;
  bool fits = true;
  for (int axis = 0; axis < 4; ++axis) {
    expected.dims[axis] = output[axis];
    const int64_t received = grad_output.dim(axis);
    fits =
        fits && (received < 0 || output[axis] < 0 || received == output[axis]);
  }
  if (fits) return Status();
  return InvalidArgument(
      "Expected `grad_output` to have the output's shape %s. Received: "
      "grad_output.shape=%s",
      ShapeText(expected).text, ShapeText(grad_output).text);
}

Status CheckBytes(const char* name, std::initializer_list<int64_t> dims) {
  int64_t bytes = 64;  // counts 8 bytes an element, and the alignment and
                       // padding that copies in scratch memory add
  bool empty = false;
  for (int64_t dim : dims) empty = empty || dim == 0;
  if (empty) return Status();
  for (int64_t dim : dims) {
    if (dim > 0 && __builtin_mul_overflow(bytes, dim, &bytes)) {
      return InvalidArgument(
          "Expected `%s` to hold at most 2**57 elements. Received: a larger "
          "product of its dimensions",
          name);
    }
  }
  return Status();
}

Status CheckCall(DataType type, std::initializer_list<int64_t> sizes) {
  if (type < DataType::kFloat16 || type > DataType::kFloat64) {
    return InvalidArgument(
        "Expected the data type to be 0 (float16), 1 (bfloat16), 2 (float32) "
        "or 3 (float64). Received: %d",
        static_cast<int>(type));
  }
  for (int64_t size : sizes) {
    if (size < 0) {
      return InvalidArgument(
          "Expected parameters that Validate completed from known shapes. "
          "Received: unknown sizes");
    }
  }
  return Status();
}

}  // namespace tf_deform

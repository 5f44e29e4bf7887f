// SPDX-License-Identifier: Apache-2.0
// Reads the attributes of ops, and converts types and errors, for TensorFlow's
// glue and for XLA's.
//
// Nothing here needs a kernel or a graph, whose headers take long to compile.

#ifndef TF_DEFORM_CC_TF_ATTRIBUTES_H_
#define TF_DEFORM_CC_TF_ATTRIBUTES_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cc/core/common.h"
#include "tensorflow/core/framework/types.pb.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/status.h"

namespace tf_deform {

// Returns the core's status as TensorFlow's status.
inline tensorflow::Status ToTensorFlow(const Status& status) {
  if (status.ok()) return tensorflow::Status();
  if (status.code == Status::kInvalidArgument) {
    return tensorflow::errors::InvalidArgument(status.message);
  }
  return tensorflow::errors::Internal(status.message);
}

// Returns the core's number for an element type of the registered kernels.
inline DataType ToDataType(tensorflow::DataType type) {
  switch (type) {
    case tensorflow::DT_HALF:
      return DataType::kFloat16;
    case tensorflow::DT_BFLOAT16:
      return DataType::kBFloat16;
    case tensorflow::DT_DOUBLE:
      return DataType::kFloat64;
    default:
      return DataType::kFloat32;
  }
}

// The attributes of an op, specialized for each:
//   kDefinitions: shared by an op and its gradient op, except types and the
//       number of optional operands. They are part of every SavedModel: once
//       released, only attributes with defaults may be added. A list of floats
//       is a number, see GetDouble.
//   Read(source, params): sets `params` from the attributes.
template <typename Op>
struct Attributes;

// `Source` below is an InferenceContext or an OpKernelConstruction.

// Reads the attribute `wanted` of a gradient op. It has an entry for each
// output.
template <typename Source>
tensorflow::Status GetWanted(Source* source, int num_outputs,
                             std::vector<bool>* wanted) {
  TF_RETURN_IF_ERROR(source->GetAttr("wanted", wanted));
  if (static_cast<int>(wanted->size()) == num_outputs) {
    return tensorflow::Status();
  }
  return tensorflow::errors::InvalidArgument(
      "Expected `wanted` to have an entry for each of the ", num_outputs,
      " gradients. Received: ", wanted->size());
}

// Reads the length of the optional operand `name`, a list of one tensor or
// none.
template <typename Source>
tensorflow::Status GetOptional(Source* source, const std::string& name,
                               int* number) {
  TF_RETURN_IF_ERROR(source->GetAttr("num_" + name, number));
  if (*number <= 1) return tensorflow::Status();
  return tensorflow::errors::InvalidArgument(
      "Expected `", name, "` to hold at most one tensor. Received: ", *number);
}

// Reads a pair (height, width).
template <typename Source>
tensorflow::Status GetPair(Source* source, const std::string& name,
                           int64_t* height, int64_t* width) {
  std::vector<int64_t> values;
  TF_RETURN_IF_ERROR(source->GetAttr(name, &values));
  if (values.size() != 2) {
    return tensorflow::errors::InvalidArgument(
        "Expected `", name,
        "` to be a pair (height, width). Received: ", values.size(), " values");
  }
  *height = values[0];
  *width = values[1];
  return tensorflow::Status();
}

// Reads a number as a sum of floats, because attributes have no doubles.
template <typename Source>
tensorflow::Status GetDouble(Source* source, const std::string& name,
                             double* value) {
  std::vector<float> parts;
  TF_RETURN_IF_ERROR(source->GetAttr(name, &parts));
  if (parts.empty()) {
    return tensorflow::errors::InvalidArgument(
        "Expected `", name, "` to be a number. Received: an empty list");
  }
  *value = 0;
  for (float part : parts) {
    // The sum is exact also on threads that treat subnormal numbers as 0.
    uint32_t bits;
    std::memcpy(&bits, &part, sizeof(bits));
    const bool is_normal = (bits >> 23 & 0xff) != 0;
    const double size = std::ldexp(static_cast<double>(bits & 0x7fffff), -149);
    *value += is_normal ? part : bits >> 31 != 0 ? -size : size;
  }
  return tensorflow::Status();
}

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_ATTRIBUTES_H_

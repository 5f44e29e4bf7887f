// SPDX-License-Identifier: Apache-2.0
// Checks attributes and shapes, for all operators.

#ifndef TF_DEFORM_CC_CORE_CHECKS_H_
#define TF_DEFORM_CC_CORE_CHECKS_H_

#include <initializer_list>

#include "cc/core/common.h"

namespace tf_deform {

using LongLong = long long;  // what %lld prints

// Attributes and image sizes are at most this number, so that the product of
// any two of them fits in int64_t.
constexpr int64_t kMaxExtent = (int64_t{1} << 31) - 1;

// Checks that an integer attribute is in [least, kMaxExtent].
Status CheckAttribute(int64_t value, int64_t least, const char* name);

// Checks that a tensor has the rank `rank`, or an unknown rank. `axes` names
// its dimensions.
Status CheckRank(const Shape& shape, int rank, const char* name,
                 const char* axes);

// Checks that one dimension of a shape is `expected`; a dimension < 0 is
// unknown and fits. `meaning` says where the expected number comes from.
Status CheckDimension(const Shape& shape, int axis, int64_t expected,
                      const char* name, const char* quantity,
                      const char* meaning);

// Checks height and width of `inputs`, (batch, height, width, channels).
Status CheckImageSize(const Shape& inputs);

// Checks the gradient's dimensions against the output's (unknown if < 0).
Status CheckGradOutput(const Shape& grad_output, const char* axes,
                       const int64_t (&output)[4]);

// Checks that a tensor's size, in bytes of the widest type, fits in int64_t.
// Unknown dimensions count as 1.
Status CheckBytes(const char* name, std::initializer_list<int64_t> dims);

// Checks that the type is one of the four element types, and that Validate
// filled the parameters: all of `sizes` are known.
Status CheckCall(DataType type, std::initializer_list<int64_t> sizes);

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CHECKS_H_

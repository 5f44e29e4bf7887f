// SPDX-License-Identifier: Apache-2.0
// Judgements of attributes and shapes that operators have in common.

#ifndef TF_DEFORM_CC_CORE_CHECKS_H_
#define TF_DEFORM_CC_CORE_CHECKS_H_

#include <initializer_list>

#include "cc/core/common.h"

namespace tf_deform {

using LongLong = long long;  // what %lld prints

// Attributes and image sizes stay below this, so that the product of any two
// fits in int64_t.
constexpr int64_t kMaxExtent = (int64_t{1} << 31) - 1;

// An integer attribute, in [least, kMaxExtent].
Status CheckAttribute(int64_t value, int64_t least, const char* name);

// A tensor of rank `rank`, or of unknown rank. `axes` names its dimensions.
Status CheckRank(const Shape& shape, int rank, const char* name,
                 const char* axes);

// The dimension `expected` (unknown if < 0) against one axis of a shape.
// `meaning` says where the number comes from.
Status CheckDimension(const Shape& shape, int axis, int64_t expected,
                      const char* name, const char* quantity,
                      const char* meaning);

// Height and width of `inputs`, (batch, height, width, channels).
Status CheckImageSize(const Shape& inputs);

// The output's dimensions (unknown if < 0) against the gradient's.
Status CheckGradOutput(const Shape& grad_output, const char* axes,
                       const int64_t (&output)[4]);

// A tensor, in bytes of the widest type, fits in int64_t. Unknown dimensions
// are taken as 1.
Status CheckBytes(const char* name, std::initializer_list<int64_t> dims);

// One of the four element types, and parameters that Validate completed:
// all of `sizes` known.
Status CheckCall(DataType type, std::initializer_list<int64_t> sizes);

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CHECKS_H_

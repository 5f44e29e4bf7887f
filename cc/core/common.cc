// SPDX-License-Identifier: Apache-2.0
// Implements status and shape texts.

#include "cc/core/common.h"

#include <cstdarg>
#include <cstdio>

namespace tf_deform {

namespace {

Status Failure(Status::Code code, const char* format, va_list arguments) {
  Status status;
  status.code = code;
  vsnprintf(status.message, sizeof(status.message), format, arguments);
  return status;
}

}  // namespace

Status InvalidArgument(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const Status status = Failure(Status::kInvalidArgument, format, arguments);
  va_end(arguments);
  return status;
}

Status Internal(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const Status status = Failure(Status::kInternal, format, arguments);
  va_end(arguments);
  return status;
}

ShapeText::ShapeText(const Shape& shape) {
  if (shape.rank < 0) {
    snprintf(text, sizeof(text), "None");
    return;
  }
  size_t used = static_cast<size_t>(snprintf(text, sizeof(text), "("));
  for (int axis = 0; axis < shape.rank; ++axis) {
    const char* separator = axis + 1 < shape.rank ? ", "
                            : shape.rank == 1     ? ","
                                                  : "";
    const size_t room = sizeof(text) - used;
    int written;
    if (axis == Shape::kMaxRank) {
      written = snprintf(text + used, room, "...");
      used += static_cast<size_t>(written);
      break;
    }
    if (shape.dims[axis] < 0) {
      written = snprintf(text + used, room, "None%s", separator);
    } else {
      written = snprintf(text + used, room, "%lld%s",
                         static_cast<long long>(shape.dims[axis]), separator);
    }
    if (static_cast<size_t>(written) >= room) return;
    used += static_cast<size_t>(written);
  }
  snprintf(text + used, sizeof(text) - used, ")");
}

}  // namespace tf_deform

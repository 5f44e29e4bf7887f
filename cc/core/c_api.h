// SPDX-License-Identifier: Apache-2.0
// What the C entry points have in common.
//
// Every entry point that can fail returns a Status::Code and, if that is not
// 0, writes the text of the error to `message` (message_size bytes, may be 0).

#ifndef TF_DEFORM_CC_CORE_C_API_H_
#define TF_DEFORM_CC_CORE_C_API_H_

#include <cstdio>

#include "cc/core/common.h"

#define TF_DEFORM_C_API extern "C" __attribute__((visibility("default")))

namespace tf_deform {

inline int Report(const Status& status, char* message, int64_t message_size) {
  if (!status.ok() && message_size > 0) {
    snprintf(message, static_cast<size_t>(message_size), "%s", status.message);
  }
  return status.code;
}

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_C_API_H_

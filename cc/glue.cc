// SPDX-License-Identifier: Apache-2.0
// Connects the core with TensorFlow and, if TensorFlow has XLA's C interface,
// with XLA. It is one unit, because both need TensorFlow's headers, which take
// longest to compile.

#include "cc/tf/registration-inl.h"
#if __has_include("xla/ffi/api/c_api.h")
#include "cc/xla/glue-inl.h"
#endif

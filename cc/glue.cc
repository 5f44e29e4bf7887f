// SPDX-License-Identifier: Apache-2.0
// Connects the core with TensorFlow and, if TensorFlow has XLA's C interface,
// with XLA. It is one unit, because both need TensorFlow's headers, which take
// longest to compile.

// Skips three headers. XLA's clients would take half of the time that all glue
// takes to compile, and the headers of tf2xla only name pointers to clients. A
// stream executor's header includes the third for one argument; it includes
// headers of LLVM, which TensorFlow 2.19 does not bring. If the headers of
// another TensorFlow need more, the compiler says so: remove the lines up to
// the next header.
#define XLA_CLIENT_CLIENT_H_
#define XLA_CLIENT_LOCAL_CLIENT_H_
#define XLA_STREAM_EXECUTOR_GPU_TMA_METADATA_H_
namespace xla {
class Client;
class LocalClient;
}  // namespace xla
namespace stream_executor::gpu {
class TmaDescriptor {};
}  // namespace stream_executor::gpu

#include "cc/tf/registration-inl.h"
#if __has_include("xla/ffi/api/c_api.h")
#include "cc/xla/glue-inl.h"
#endif

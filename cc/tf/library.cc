// SPDX-License-Identifier: Apache-2.0
// One library for a process.

#include "cc/tf/library.h"

#include <dlfcn.h>

#include <cstring>

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/platform/errors.h"

namespace tf_deform {

struct Copy {
  const char* path;
  const char* version;
};

// One variable for all copies in a process, however they are loaded: GCC marks
// what is inline and visible as unique (STB_GNU_UNIQUE).
__attribute__((visibility("default"))) inline Copy first_copy = {};

namespace {

const char* OwnPath() {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(&RegistersOps), &info) != 0
             ? info.dli_fname
             : "a file of unknown name";
}

// TensorFlow hands an error of a registration to whoever loads the library.
const bool is_refused = [] {
  if (RegistersOps() || std::strcmp(first_copy.version, kVersion) == 0) {
    return false;
  }
  tensorflow::OpRegistry::Global()->Register(
      [](tensorflow::OpRegistrationData*) -> tensorflow::Status {
        return tensorflow::errors::FailedPrecondition(
            "Expected one version of tf_deform's op library in a process. "
            "Received: ",
            OwnPath(), " of version ", kVersion, " after ", first_copy.path,
            " of version ", first_copy.version);
      });
  return true;
}();

}  // namespace

bool RegistersOps() {
  static const bool is_first = [] {
    if (first_copy.path != nullptr) return false;
    first_copy = {OwnPath(), kVersion};
    return true;
  }();
  return is_first;
}

}  // namespace tf_deform

// The copy that registered the ops of this process: its file, as it was named
// when it was loaded, and its version.
#define TF_DEFORM_EXPORT extern "C" __attribute__((visibility("default")))

TF_DEFORM_EXPORT const char* TfDeformRegisteredBy() {
  return tf_deform::first_copy.path;
}

TF_DEFORM_EXPORT const char* TfDeformRegisteredVersion() {
  return tf_deform::first_copy.version;
}

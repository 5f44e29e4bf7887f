// SPDX-License-Identifier: Apache-2.0
// Registers all ops when TensorFlow loads the library.

#ifndef TF_DEFORM_CC_TF_REGISTRATION_INL_H_
#define TF_DEFORM_CC_TF_REGISTRATION_INL_H_

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <iterator>

#include "cc/tf/library.h"
#include "cc/tf/marker_op.h"
#include "cc/tf/op_kernels.h"
#include "cc/tf/ops.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/kernel_def_builder.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/errors.h"

#define TF_DEFORM_EXPORT extern "C" __attribute__((visibility("default")))

// TensorFlow's version, such as "2.21.0": a function of its C API, whose header
// would take long to compile.
extern "C" const char* TF_Version();

namespace tf_deform {

struct Copy {
  const char* path;
  const char* version;
};

// All copies in a process share one variable, however they are loaded: GCC
// marks inline, visible variables as unique (STB_GNU_UNIQUE).
__attribute__((visibility("default"))) inline Copy first_copy = {};

namespace {

const char* OwnPath() {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(&RegistersOps), &info) != 0
             ? info.dli_fname
             : "a file of unknown name";
}

// Returns "2.21" of "2.21.0".
absl::string_view MinorVersion(absl::string_view version) {
  return version.substr(0, version.find('.', version.find('.') + 1));
}

// Tells whether this is the TensorFlow that the library was compiled for. Most
// others lack a symbol, and refuse the library. But some load it, and crash if
// it registers anything. Those of 2.18 and 2.19 fit each other.
bool FitsTensorFlow() {
  const absl::string_view wanted = MinorVersion(TF_DEFORM_TENSORFLOW);
  const absl::string_view found = MinorVersion(TF_Version());
  return wanted == found || (wanted == "2.18" && found == "2.19") ||
         (wanted == "2.19" && found == "2.18");
}

// Fails to register something: TensorFlow passes the error on to the program
// that loads the library.
template <typename... Words>
void Refuse(const Words&... words) {
  const tensorflow::Status status =
      tensorflow::errors::FailedPrecondition(words...);
  tensorflow::OpRegistry::Global()->Register(
      [status](tensorflow::OpRegistrationData*) -> tensorflow::Status {
        return status;
      });
}

const bool is_refused = [] {
  if (!FitsTensorFlow()) {
    Refuse("Expected TensorFlow ", TF_DEFORM_TENSORFLOW, ", for which ",
           OwnPath(), " was compiled. Received: TensorFlow ", TF_Version());
    return true;
  }
  if (RegistersOps() || std::strcmp(first_copy.version, kVersion) == 0) {
    return false;
  }
  Refuse("Expected one version of tf_deform's op library in a process. ",
         "Received: ", OwnPath(), " of version ", kVersion, " after ",
         first_copy.path, " of version ", first_copy.version);
  return true;
}();

}  // namespace

bool RegistersOps() {
  static const bool is_first = [] {
    if (first_copy.path != nullptr || !FitsTensorFlow()) return false;
    first_copy = {OwnPath(), kVersion};
    return true;
  }();
  return is_first;
}

}  // namespace tf_deform

// The copy that registered the ops of this process: its file, as it was named
// when it was loaded, and its version.
TF_DEFORM_EXPORT const char* TfDeformRegisteredBy() {
  return tf_deform::first_copy.path;
}

TF_DEFORM_EXPORT const char* TfDeformRegisteredVersion() {
  return tf_deform::first_copy.version;
}

// Tells the loader, which reads the file before it loads it, whose headers this
// was compiled with. The byte before it separates it from other texts.
TF_DEFORM_EXPORT __attribute__((used)) const char TfDeformBuiltFor[] =
    "\0tf_deform for TensorFlow " TF_DEFORM_TENSORFLOW;

// Writes the counts of `gradients_computed`. Tests read them, to see that
// unwanted gradients cost nothing.
#define TF_DEFORM_REGISTER(Op)                                             \
  TF_DEFORM_EXPORT void TfDeform##Op##GradientsComputed(int64_t* counts) { \
    const int number = tf_deform::NumGradients<tf_deform::Op>(             \
        std::size(tf_deform::Op::kOperands));                              \
    for (int i = 0; i < number; ++i) {                                     \
      counts[i] = tf_deform::gradients_computed<tf_deform::Op>[i];         \
    }                                                                      \
  }                                                                        \
  static const bool Op##_is_registered = tf_deform::RegisterOp<tf_deform::Op>()

TF_DEFORM_FOR_EACH_OP(TF_DEFORM_REGISTER);

namespace tf_deform {
namespace {

// The marker has neither outputs nor state: nothing waits for it, and
// TensorFlow prunes it from the graphs that run.
const bool marker_is_registered = [] {
  if (!RegistersOps()) return false;
  tensorflow::register_op::OpDefBuilderWrapper op(kMarker);
  op.SetShapeFn(tensorflow::shape_inference::NoOutputs);
  op();
  tensorflow::kernel_factory::OpKernelRegistrar(
      tensorflow::KernelDefBuilder(kMarker)
          .Device(tensorflow::DEVICE_DEFAULT)
          .Build(),
      kMarker,
      [](tensorflow::OpKernelConstruction* construction)
          -> tensorflow::OpKernel* { return new MarkerKernel(construction); });
  return true;
}();

}  // namespace
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_REGISTRATION_INL_H_

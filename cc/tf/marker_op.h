// SPDX-License-Identifier: Apache-2.0
// Defines the op whose name tells the user what to do if the ops are not
// registered.
//
// If a program loads a SavedModel without this library, TensorFlow's error
// names only the type of the first unknown op. So graphs exported with native
// ops have this op before all native ops.

#ifndef TF_DEFORM_CC_TF_MARKER_OP_H_
#define TF_DEFORM_CC_TF_MARKER_OP_H_

#include "tensorflow/core/framework/op_kernel.h"

namespace tf_deform {

// The name is in people's SavedModels, like every op's name, and must not
// change.
constexpr char kMarker[] = "TfDeform>ImportTfDeformOrLoadItsOpLibrary";

// Does nothing, on any device and for XLA.
class MarkerKernel final : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(tensorflow::OpKernelContext*) override {}
  bool IsExpensive() override { return false; }
};

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_MARKER_OP_H_

// SPDX-License-Identifier: Apache-2.0
// The op whose name tells what to do where the ops are not registered.
//
// Of a SavedModel that needs this library, a program that has not loaded it
// learns from TensorFlow one thing: the type of the first op that it does not
// know. Graphs exported with native ops have this one before them.

#ifndef TF_DEFORM_CC_TF_MARKER_OP_H_
#define TF_DEFORM_CC_TF_MARKER_OP_H_

#include "tensorflow/core/framework/op_kernel.h"

namespace tf_deform {

// In people's SavedModels, like every op's name: it stays as it is.
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

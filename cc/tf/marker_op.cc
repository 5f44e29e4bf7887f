// SPDX-License-Identifier: Apache-2.0
// The marker in TensorFlow: op, kernel.

#include "cc/tf/marker_op.h"

#include "cc/tf/library.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/kernel_def_builder.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace tf_deform {
namespace {

// Without outputs and without state: nothing waits for it, and TensorFlow
// prunes it from what runs.
TF_DEFORM_REGISTER_OP(kMarker).SetShapeFn(
    tensorflow::shape_inference::NoOutputs);

const bool is_registered = [] {
  if (!RegistersOps()) return false;
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

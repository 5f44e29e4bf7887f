// The marker in TensorFlow: op, kernel.
// SPDX-License-Identifier: Apache-2.0

#include "cc/tf/marker_op.h"

#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace tf_deform {
namespace {

// Without outputs and without state: nothing waits for it, and TensorFlow
// prunes it from what runs.
REGISTER_OP(kMarker).SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_KERNEL_BUILDER(Name(kMarker).Device(tensorflow::DEVICE_DEFAULT),
                        MarkerKernel);

}  // namespace
}  // namespace tf_deform

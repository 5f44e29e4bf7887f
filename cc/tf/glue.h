// What every op's TensorFlow glue shares: shapes, status, threads, types.
// SPDX-License-Identifier: Apache-2.0

#ifndef TF_DEFORM_CC_TF_GLUE_H_
#define TF_DEFORM_CC_TF_GLUE_H_

#include "cc/core/common.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/tensor.h"

namespace tf_deform {

// The core's verdict as TensorFlow's.
tensorflow::Status ToTensorFlow(const Status& status);

// A shape as the core judges it, unknown where the graph does not tell.
Shape ToShape(const tensorflow::TensorShape& shape);
Shape ToShape(tensorflow::shape_inference::InferenceContext* context,
              tensorflow::shape_inference::ShapeHandle shape);

// The threads that TensorFlow gives to CPU kernels. Valid while `context` is.
ParallelFor ToParallelFor(tensorflow::OpKernelContext* context);

// The core's number for an element type of the registered kernels.
DataType ToDataType(tensorflow::DataType type);

// Scratch of `bytes` for as long as `memory` lives.
tensorflow::Status AllocateWorkspace(tensorflow::OpKernelContext* context,
                                     int64_t bytes, tensorflow::Tensor* memory,
                                     void** workspace);

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_GLUE_H_

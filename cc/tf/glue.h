// What every op's TensorFlow glue shares: shapes, threads, types, outputs.
// SPDX-License-Identifier: Apache-2.0

#ifndef TF_DEFORM_CC_TF_GLUE_H_
#define TF_DEFORM_CC_TF_GLUE_H_

#include <atomic>

#include "cc/core/common.h"
#include "cc/tf/attributes.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/tensor.h"

namespace tf_deform {

// A shape as the core judges it, unknown where the graph does not tell.
Shape ToShape(const tensorflow::TensorShape& shape);
Shape ToShape(tensorflow::shape_inference::InferenceContext* context,
              tensorflow::shape_inference::ShapeHandle shape);

// What TensorFlow gives a kernel to run on. Valid while `context` is.
// ParallelFor: the threads of CPU kernels. CudaStream: the stream of GPU
// kernels, and what the program allows on it. Kernels are templates of one of
// the two: all else is the same on both devices.
template <typename Executor>
Executor GetExecutor(tensorflow::OpKernelContext* context);
template <>
ParallelFor GetExecutor(tensorflow::OpKernelContext* context);
template <>
CudaStream GetExecutor(tensorflow::OpKernelContext* context);

// The core's number for an element type of the registered kernels.
DataType ToDataType(tensorflow::DataType type);

// Scratch of `bytes` on the kernel's device for as long as `memory` lives.
tensorflow::Status AllocateWorkspace(tensorflow::OpKernelContext* context,
                                     int64_t bytes, tensorflow::Tensor* memory,
                                     void** workspace);

// A dimension of an op's output: its number if known, else the operand's own,
// so that equal unknown dimensions are known to be equal.
tensorflow::shape_inference::DimensionHandle OutputDim(
    tensorflow::shape_inference::InferenceContext* context, int64_t size,
    tensorflow::shape_inference::ShapeHandle operand, int axis);

// Allocates a gradient op's output, shaped like an input, and counts it; an
// unwanted one comes out empty. `target` stays as it is if nothing is to be
// computed: not wanted, pruned from the graph, or without elements.
tensorflow::Status AllocateGradient(tensorflow::OpKernelContext* context,
                                    int output, int input, bool wanted,
                                    void** target,
                                    std::atomic<int64_t>* computed);

// Registers ForwardKernel and BackwardKernel, templates of what they run on,
// for one device, TensorFlow's DEVICE_`device`, and all types.
#define TF_DEFORM_REGISTER_TYPE(name, device, Executor, T, Tcoord) \
  REGISTER_KERNEL_BUILDER(Name(name)                               \
                              .Device(tensorflow::DEVICE_##device) \
                              .TypeConstraint<T>("T")              \
                              .TypeConstraint<Tcoord>("Tcoord"),   \
                          ForwardKernel<Executor>);                \
  REGISTER_KERNEL_BUILDER(Name(name "Grad")                        \
                              .Device(tensorflow::DEVICE_##device) \
                              .TypeConstraint<T>("T")              \
                              .TypeConstraint<Tcoord>("Tcoord"),   \
                          BackwardKernel<Executor>)
#define TF_DEFORM_REGISTER(name, device, Executor)                         \
  TF_DEFORM_REGISTER_TYPE(name, device, Executor, Eigen::half, float);     \
  TF_DEFORM_REGISTER_TYPE(name, device, Executor, Eigen::bfloat16, float); \
  TF_DEFORM_REGISTER_TYPE(name, device, Executor, float, float);           \
  TF_DEFORM_REGISTER_TYPE(name, device, Executor, double, double)

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_GLUE_H_

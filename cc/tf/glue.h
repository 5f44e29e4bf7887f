// SPDX-License-Identifier: Apache-2.0
// What every op's TensorFlow glue shares: shapes, threads, types, outputs.

#ifndef TF_DEFORM_CC_TF_GLUE_H_
#define TF_DEFORM_CC_TF_GLUE_H_

#include <atomic>
#include <string>

#include "cc/core/common.h"
#include "cc/tf/attributes.h"
#include "cc/tf/library.h"
#include "tensorflow/core/framework/kernel_def_builder.h"
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

// Registers a kernel of an op for one device and all types.
template <typename Kernel>
void RegisterKernel(const char* op, const char* device) {
  for (const auto type : {tensorflow::DT_HALF, tensorflow::DT_BFLOAT16,
                          tensorflow::DT_FLOAT, tensorflow::DT_DOUBLE}) {
    tensorflow::kernel_factory::OpKernelRegistrar(
        tensorflow::KernelDefBuilder(op)
            .Device(device)
            .TypeConstraint("T", type)
            .TypeConstraint("Tcoord", type == tensorflow::DT_DOUBLE
                                          ? tensorflow::DT_DOUBLE
                                          : tensorflow::DT_FLOAT)
            .Build(),
        op,
        [](tensorflow::OpKernelConstruction* construction)
            -> tensorflow::OpKernel* { return new Kernel(construction); });
  }
}

// Registers the kernels of an op and of its gradient op for one device,
// TensorFlow's DEVICE_CPU or DEVICE_GPU, if this copy of the library is to.
template <typename ForwardKernel, typename BackwardKernel>
bool RegisterKernels(const std::string& op, const char* device) {
  if (!RegistersOps()) return false;
  RegisterKernel<ForwardKernel>(op.c_str(), device);
  RegisterKernel<BackwardKernel>((op + "Grad").c_str(), device);
  return true;
}

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_GLUE_H_

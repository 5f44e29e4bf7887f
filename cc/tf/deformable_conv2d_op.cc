// SPDX-License-Identifier: Apache-2.0
// Deformable convolution in TensorFlow: ops, shape functions, kernels.

#include "cc/tf/deformable_conv2d_op.h"

#include <atomic>
#include <cstdint>
#include <vector>

#include "cc/core/deformable_conv2d.h"
#include "cc/tf/glue.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/errors.h"

namespace tf_deform {
namespace {

using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

// Judges what the graph knows and fills `params` as far as that goes.
tensorflow::Status InferParams(InferenceContext* context, bool has_gradient,
                               DeformableConv2DParams* params) {
  int num_mask;
  TF_RETURN_IF_ERROR(GetOptional(context, "mask", &num_mask));
  TF_RETURN_IF_ERROR(ReadAttributes(context, params));
  DeformableConv2DShapes shapes;
  shapes.inputs = ToShape(context, context->input(0));
  shapes.kernel = ToShape(context, context->input(1));
  shapes.offset = ToShape(context, context->input(2));
  Shape mask, grad_output;
  if (num_mask == 1) {
    mask = ToShape(context, context->input(3));
    shapes.mask = &mask;
  }
  if (has_gradient) {
    grad_output = ToShape(context, context->input(3 + num_mask));
    shapes.grad_output = &grad_output;
  }
  return ToTensorFlow(Validate(shapes, params));
}

tensorflow::Status ForwardShape(InferenceContext* context) {
  DeformableConv2DParams params;
  TF_RETURN_IF_ERROR(InferParams(context, false, &params));
  const ShapeHandle offset = context->input(2);
  context->set_output(
      0, context->MakeShape(
             {OutputDim(context, params.batch, context->input(0), 0),
              OutputDim(context, params.out_h, offset, 1),
              OutputDim(context, params.out_w, offset, 2),
              OutputDim(context, params.filters, context->input(1), 3)}));
  return tensorflow::Status();
}

tensorflow::Status BackwardShape(InferenceContext* context) {
  DeformableConv2DParams params;
  TF_RETURN_IF_ERROR(InferParams(context, true, &params));
  std::vector<bool> wanted;
  TF_RETURN_IF_ERROR(context->GetAttr("wanted", &wanted));
  TF_RETURN_IF_ERROR(CheckWanted(wanted, context->num_outputs()));
  for (int i = 0; i < context->num_outputs(); ++i) {
    context->set_output(i, wanted[i] ? context->input(i) : context->Vector(0));
  }
  return tensorflow::Status();
}

// Gradients computed so far in this process: of inputs, kernel, offset, mask.
std::atomic<int64_t> gradients_computed[4];

// What the kernels of both ops do before the arithmetic.
class DeformableConv2DKernel : public OpKernel {
 public:
  explicit DeformableConv2DKernel(OpKernelConstruction* construction)
      : OpKernel(construction) {
    OP_REQUIRES_OK(construction, GetOptional(construction, "mask", &num_mask_));
    OP_REQUIRES_OK(construction, ReadAttributes(construction, &attributes_));
  }

 protected:
  int num_mask() const { return num_mask_; }

  // Judges the operands. `grad_output` may be null.
  tensorflow::Status Prepare(OpKernelContext* context,
                             const Tensor* grad_output,
                             DeformableConv2DParams* params,
                             DeformableConv2DInputs* operands) const {
    DeformableConv2DShapes shapes;
    shapes.inputs = ToShape(context->input(0).shape());
    shapes.kernel = ToShape(context->input(1).shape());
    shapes.offset = ToShape(context->input(2).shape());
    Shape mask, gradient;
    if (num_mask_ == 1) {
      mask = ToShape(context->input(3).shape());
      shapes.mask = &mask;
    }
    if (grad_output != nullptr) {
      gradient = ToShape(grad_output->shape());
      shapes.grad_output = &gradient;
    }
    *params = attributes_;
    TF_RETURN_IF_ERROR(ToTensorFlow(Validate(shapes, params)));
    operands->inputs = context->input(0).data();
    operands->kernel = context->input(1).data();
    operands->offset = context->input(2).data();
    if (num_mask_ == 1) operands->mask = context->input(3).data();
    return tensorflow::Status();
  }

 private:
  int num_mask_;
  DeformableConv2DParams attributes_;
};

// Executor: ParallelFor on the CPU, CudaStream on a GPU.
template <typename Executor>
class ForwardKernel : public DeformableConv2DKernel {
 public:
  using DeformableConv2DKernel::DeformableConv2DKernel;

  void Compute(OpKernelContext* context) override {
    DeformableConv2DParams params;
    DeformableConv2DInputs operands;
    OP_REQUIRES_OK(context, Prepare(context, nullptr, &params, &operands));
    TensorShape shape;
    OP_REQUIRES_OK(
        context, TensorShape::BuildTensorShape(
                     {params.batch, params.out_h, params.out_w, params.filters},
                     &shape));
    Tensor* output;
    OP_REQUIRES_OK(context, context->allocate_output(0, shape, &output));
    if (output->NumElements() == 0) return;
    const auto executor = GetExecutor<Executor>(context);
    const DataType type = ToDataType(output->dtype());
    Tensor memory;
    void* workspace;
    OP_REQUIRES_OK(context, AllocateWorkspace(
                                context, WorkspaceBytes(params, type, executor),
                                &memory, &workspace));
    OP_REQUIRES_OK(context,
                   ToTensorFlow(Forward(params, type, operands, workspace,
                                        output->data(), executor)));
  }
};

template <typename Executor>
class BackwardKernel : public DeformableConv2DKernel {
 public:
  explicit BackwardKernel(OpKernelConstruction* construction)
      : DeformableConv2DKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("wanted", &wanted_));
    OP_REQUIRES_OK(construction, CheckWanted(wanted_, 3 + num_mask()));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& grad_output = context->input(3 + num_mask());
    DeformableConv2DParams params;
    DeformableConv2DInputs operands;
    OP_REQUIRES_OK(context, Prepare(context, &grad_output, &params, &operands));
    DeformableConv2DGradients gradients;
    void** const targets[] = {&gradients.inputs, &gradients.kernel,
                              &gradients.offset, &gradients.mask};
    for (int i = 0; i < 3 + num_mask(); ++i) {
      OP_REQUIRES_OK(context,
                     AllocateGradient(context, i, i, wanted_[i], targets[i],
                                      &gradients_computed[i]));
    }
    const auto executor = GetExecutor<Executor>(context);
    const DataType type = ToDataType(grad_output.dtype());
    Tensor memory;
    void* workspace;
    OP_REQUIRES_OK(
        context,
        AllocateWorkspace(
            context, BackwardWorkspaceBytes(params, type, gradients, executor),
            &memory, &workspace));
    OP_REQUIRES_OK(context, ToTensorFlow(Backward(params, type, operands,
                                                  grad_output.data(), workspace,
                                                  gradients, executor)));
  }

 private:
  std::vector<bool> wanted_;
};

// Attributes of both ops. Once released, only attributes with defaults may be
// added: they are part of every SavedModel.
#define TF_DEFORM_DEFORMABLE_CONV2D_OP(name)          \
  TF_DEFORM_REGISTER_OP(name)                         \
      .Attr("T: {half, bfloat16, float, double}")     \
      .Attr("Tcoord: {float, double}")                \
      .Attr("num_mask: int >= 0")                     \
      .Attr("strides: list(int)")                     \
      .Attr("padding: {'SAME', 'VALID', 'EXPLICIT'}") \
      .Attr("explicit_paddings: list(int) = []")      \
      .Attr("dilations: list(int) = [1, 1]")          \
      .Attr("offset_groups: int = 1")                 \
      .Attr("boundary: {'zeros', 'clamp'} = 'zeros'") \
      .Input("inputs: T")                             \
      .Input("kernel: T")                             \
      .Input("offset: Tcoord")                        \
      .Input("mask: num_mask * Tcoord")

TF_DEFORM_DEFORMABLE_CONV2D_OP("TfDeform>DeformableConv2D")
    .Output("output: T")
    .SetShapeFn(ForwardShape);

// `wanted` says which gradients to compute; the others come out empty.
TF_DEFORM_DEFORMABLE_CONV2D_OP("TfDeform>DeformableConv2DGrad")
    .Attr("wanted: list(bool)")
    .Input("grad_output: T")
    .Output("grad_inputs: T")
    .Output("grad_kernel: T")
    .Output("grad_offset: Tcoord")
    .Output("grad_mask: num_mask * Tcoord")
    .SetShapeFn(BackwardShape);

const bool on_cpu =
    RegisterKernels<ForwardKernel<ParallelFor>, BackwardKernel<ParallelFor>>(
        "TfDeform>DeformableConv2D", tensorflow::DEVICE_CPU);
#ifdef TF_DEFORM_CUDA
const bool on_gpu =
    RegisterKernels<ForwardKernel<CudaStream>, BackwardKernel<CudaStream>>(
        "TfDeform>DeformableConv2D", tensorflow::DEVICE_GPU);
#endif

}  // namespace
}  // namespace tf_deform

// How many gradients of each operand (inputs, kernel, offset, mask) kernels of
// this process have computed: what tests ask to see that unwanted ones cost
// nothing.
extern "C" __attribute__((visibility("default"))) void
TfDeformDeformableConv2DGradientsComputed(int64_t counts[4]) {
  for (int i = 0; i < 4; ++i) {
    counts[i] = tf_deform::gradients_computed[i].load();
  }
}

// SPDX-License-Identifier: Apache-2.0
// Deformable position-sensitive ROI pooling in TensorFlow: ops, shape
// functions, kernels.

#include "cc/tf/deformable_psroi_pool_op.h"

#include <atomic>
#include <cstdint>
#include <vector>

#include "cc/core/deformable_psroi_pool.h"
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
                               DeformablePSROIPoolParams* params) {
  int num_trans;
  TF_RETURN_IF_ERROR(GetOptional(context, "trans", &num_trans));
  TF_RETURN_IF_ERROR(ReadAttributes(context, params));
  DeformablePSROIPoolShapes shapes;
  shapes.inputs = ToShape(context, context->input(0));
  shapes.rois = ToShape(context, context->input(1));
  Shape trans, grad_output;
  if (num_trans == 1) {
    trans = ToShape(context, context->input(2));
    shapes.trans = &trans;
  }
  if (has_gradient) {
    grad_output = ToShape(context, context->input(2 + num_trans));
    shapes.grad_output = &grad_output;
  }
  return ToTensorFlow(Validate(shapes, params));
}

tensorflow::Status ForwardShape(InferenceContext* context) {
  DeformablePSROIPoolParams params;
  TF_RETURN_IF_ERROR(InferParams(context, false, &params));
  const ShapeHandle output = context->MakeShape(
      {OutputDim(context, params.num_rois, context->input(1), 0),
       context->MakeDim(params.pooled_h), context->MakeDim(params.pooled_w),
       context->MakeDim(params.output_dim)});
  context->set_output(0, output);
  context->set_output(1, output);
  return tensorflow::Status();
}

tensorflow::Status BackwardShape(InferenceContext* context) {
  DeformablePSROIPoolParams params;
  TF_RETURN_IF_ERROR(InferParams(context, true, &params));
  std::vector<bool> wanted;
  TF_RETURN_IF_ERROR(context->GetAttr("wanted", &wanted));
  TF_RETURN_IF_ERROR(CheckWanted(wanted, context->num_outputs()));
  for (int i = 0; i < context->num_outputs(); ++i) {
    // Output 0 is the gradient of input 0, output 1 of input 2: ROIs have none.
    context->set_output(i,
                        wanted[i] ? context->input(2 * i) : context->Vector(0));
  }
  return tensorflow::Status();
}

// Gradients computed so far in this process: of inputs, trans.
std::atomic<int64_t> gradients_computed[2];

// What the kernels of both ops do before the arithmetic.
class DeformablePSROIPoolKernel : public OpKernel {
 public:
  explicit DeformablePSROIPoolKernel(OpKernelConstruction* construction)
      : OpKernel(construction) {
    OP_REQUIRES_OK(construction,
                   GetOptional(construction, "trans", &num_trans_));
    OP_REQUIRES_OK(construction, ReadAttributes(construction, &attributes_));
  }

 protected:
  int num_trans() const { return num_trans_; }

  // Judges the operands. `grad_output` may be null.
  tensorflow::Status Prepare(OpKernelContext* context,
                             const Tensor* grad_output,
                             DeformablePSROIPoolParams* params,
                             DeformablePSROIPoolInputs* operands) const {
    DeformablePSROIPoolShapes shapes;
    shapes.inputs = ToShape(context->input(0).shape());
    shapes.rois = ToShape(context->input(1).shape());
    Shape trans, gradient;
    if (num_trans_ == 1) {
      trans = ToShape(context->input(2).shape());
      shapes.trans = &trans;
    }
    if (grad_output != nullptr) {
      gradient = ToShape(grad_output->shape());
      shapes.grad_output = &gradient;
    }
    *params = attributes_;
    TF_RETURN_IF_ERROR(ToTensorFlow(Validate(shapes, params)));
    operands->inputs = context->input(0).data();
    operands->rois = context->input(1).data();
    if (num_trans_ == 1) operands->trans = context->input(2).data();
    return tensorflow::Status();
  }

 private:
  int num_trans_;
  DeformablePSROIPoolParams attributes_;
};

// Executor: ParallelFor on the CPU, CudaStream on a GPU.
template <typename Executor>
class ForwardKernel : public DeformablePSROIPoolKernel {
 public:
  using DeformablePSROIPoolKernel::DeformablePSROIPoolKernel;

  void Compute(OpKernelContext* context) override {
    DeformablePSROIPoolParams params;
    DeformablePSROIPoolInputs operands;
    OP_REQUIRES_OK(context, Prepare(context, nullptr, &params, &operands));
    TensorShape shape;
    OP_REQUIRES_OK(context, TensorShape::BuildTensorShape(
                                {params.num_rois, params.pooled_h,
                                 params.pooled_w, params.output_dim},
                                &shape));
    Tensor *output, *count;
    OP_REQUIRES_OK(context, context->allocate_output(0, shape, &output));
    OP_REQUIRES_OK(context, context->allocate_output(1, shape, &count));
    const auto executor = GetExecutor<Executor>(context);
    const DataType type = ToDataType(output->dtype());
    Tensor memory;
    void* workspace;
    OP_REQUIRES_OK(context, AllocateWorkspace(
                                context, WorkspaceBytes(params, type, executor),
                                &memory, &workspace));
    float* const counts = context->output_required(1)
                              ? static_cast<float*>(count->data())
                              : nullptr;
    OP_REQUIRES_OK(context,
                   ToTensorFlow(Forward(params, type, operands, workspace,
                                        output->data(), counts, executor)));
  }
};

template <typename Executor>
class BackwardKernel : public DeformablePSROIPoolKernel {
 public:
  explicit BackwardKernel(OpKernelConstruction* construction)
      : DeformablePSROIPoolKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("wanted", &wanted_));
    OP_REQUIRES_OK(construction, CheckWanted(wanted_, 1 + num_trans()));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& grad_output = context->input(2 + num_trans());
    DeformablePSROIPoolParams params;
    DeformablePSROIPoolInputs operands;
    OP_REQUIRES_OK(context, Prepare(context, &grad_output, &params, &operands));
    DeformablePSROIPoolGradients gradients;
    void** const targets[] = {&gradients.inputs, &gradients.trans};
    for (int i = 0; i < 1 + num_trans(); ++i) {
      OP_REQUIRES_OK(context,
                     AllocateGradient(context, i, 2 * i, wanted_[i], targets[i],
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
// added: they are part of every SavedModel. A list of floats is their sum, see
// GetDouble.
#define TF_DEFORM_DEFORMABLE_PSROI_POOL_OP(name)  \
  TF_DEFORM_REGISTER_OP(name)                     \
      .Attr("T: {half, bfloat16, float, double}") \
      .Attr("Tcoord: {float, double}")            \
      .Attr("num_trans: int >= 0")                \
      .Attr("output_dim: int")                    \
      .Attr("spatial_scale: list(float)")         \
      .Attr("pooled_size: list(int)")             \
      .Attr("group_size: list(int)")              \
      .Attr("part_size: list(int)")               \
      .Attr("sample_per_part: int = 4")           \
      .Attr("trans_std: list(float)")             \
      .Input("inputs: T")                         \
      .Input("rois: Tcoord")                      \
      .Input("trans: num_trans * Tcoord")

TF_DEFORM_DEFORMABLE_PSROI_POOL_OP("TfDeform>DeformablePSROIPool")
    .Output("output: T")
    .Output("count: float")
    .SetShapeFn(ForwardShape);

// `wanted` says which gradients to compute; the others come out empty.
TF_DEFORM_DEFORMABLE_PSROI_POOL_OP("TfDeform>DeformablePSROIPoolGrad")
    .Attr("wanted: list(bool)")
    .Input("grad_output: T")
    .Output("grad_inputs: T")
    .Output("grad_trans: num_trans * Tcoord")
    .SetShapeFn(BackwardShape);

const bool on_cpu =
    RegisterKernels<ForwardKernel<ParallelFor>, BackwardKernel<ParallelFor>>(
        "TfDeform>DeformablePSROIPool", tensorflow::DEVICE_CPU);
#ifdef TF_DEFORM_CUDA
const bool on_gpu =
    RegisterKernels<ForwardKernel<CudaStream>, BackwardKernel<CudaStream>>(
        "TfDeform>DeformablePSROIPool", tensorflow::DEVICE_GPU);
#endif

}  // namespace
}  // namespace tf_deform

// How many gradients of each operand (inputs, trans) kernels of this process
// have computed: what tests ask to see that unwanted ones cost nothing.
extern "C" __attribute__((visibility("default"))) void
TfDeformDeformablePSROIPoolGradientsComputed(int64_t counts[2]) {
  for (int i = 0; i < 2; ++i) {
    counts[i] = tf_deform::gradients_computed[i].load();
  }
}

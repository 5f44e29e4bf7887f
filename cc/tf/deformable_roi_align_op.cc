// SPDX-License-Identifier: Apache-2.0
// Deformable ROIAlign in TensorFlow: ops, shape
// functions, kernels.

#include "cc/tf/deformable_roi_align_op.h"

#include <atomic>
#include <cstdint>
#include <vector>

#include "cc/core/deformable_roi_align.h"
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
                               DeformableROIAlignParams* params) {
  int num_offset;
  TF_RETURN_IF_ERROR(GetOptional(context, "offset", &num_offset));
  TF_RETURN_IF_ERROR(ReadAttributes(context, params));
  DeformableROIAlignShapes shapes;
  shapes.inputs = ToShape(context, context->input(0));
  shapes.rois = ToShape(context, context->input(1));
  Shape offset, grad_output;
  if (num_offset == 1) {
    offset = ToShape(context, context->input(2));
    shapes.offset = &offset;
  }
  if (has_gradient) {
    grad_output = ToShape(context, context->input(2 + num_offset));
    shapes.grad_output = &grad_output;
  }
  return ToTensorFlow(Validate(shapes, params));
}

tensorflow::Status ForwardShape(InferenceContext* context) {
  DeformableROIAlignParams params;
  TF_RETURN_IF_ERROR(InferParams(context, false, &params));
  const ShapeHandle output = context->MakeShape(
      {OutputDim(context, params.num_rois, context->input(1), 0),
       context->MakeDim(params.pooled_h), context->MakeDim(params.pooled_w),
       OutputDim(context, params.channels, context->input(0), 3)});
  context->set_output(0, output);
  return tensorflow::Status();
}

tensorflow::Status BackwardShape(InferenceContext* context) {
  DeformableROIAlignParams params;
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

// Gradients computed so far in this process: of inputs, offset.
std::atomic<int64_t> gradients_computed[2];

// What the kernels of both ops do before the arithmetic.
class DeformableROIAlignKernel : public OpKernel {
 public:
  explicit DeformableROIAlignKernel(OpKernelConstruction* construction)
      : OpKernel(construction) {
    OP_REQUIRES_OK(construction,
                   GetOptional(construction, "offset", &num_offset_));
    OP_REQUIRES_OK(construction, ReadAttributes(construction, &attributes_));
  }

 protected:
  int num_offset() const { return num_offset_; }

  // Judges the operands. `grad_output` may be null.
  tensorflow::Status Prepare(OpKernelContext* context,
                             const Tensor* grad_output,
                             DeformableROIAlignParams* params,
                             DeformableROIAlignInputs* operands) const {
    DeformableROIAlignShapes shapes;
    shapes.inputs = ToShape(context->input(0).shape());
    shapes.rois = ToShape(context->input(1).shape());
    Shape offset, gradient;
    if (num_offset_ == 1) {
      offset = ToShape(context->input(2).shape());
      shapes.offset = &offset;
    }
    if (grad_output != nullptr) {
      gradient = ToShape(grad_output->shape());
      shapes.grad_output = &gradient;
    }
    *params = attributes_;
    TF_RETURN_IF_ERROR(ToTensorFlow(Validate(shapes, params)));
    operands->inputs = context->input(0).data();
    operands->rois = context->input(1).data();
    if (num_offset_ == 1) operands->offset = context->input(2).data();
    return tensorflow::Status();
  }

 private:
  int num_offset_;
  DeformableROIAlignParams attributes_;
};

// Executor: ParallelFor on the CPU, CudaStream on a GPU.
template <typename Executor>
class ForwardKernel : public DeformableROIAlignKernel {
 public:
  using DeformableROIAlignKernel::DeformableROIAlignKernel;

  void Compute(OpKernelContext* context) override {
    DeformableROIAlignParams params;
    DeformableROIAlignInputs operands;
    OP_REQUIRES_OK(context, Prepare(context, nullptr, &params, &operands));
    TensorShape shape;
    OP_REQUIRES_OK(context, TensorShape::BuildTensorShape(
                                {params.num_rois, params.pooled_h,
                                 params.pooled_w, params.channels},
                                &shape));
    Tensor* output;
    OP_REQUIRES_OK(context, context->allocate_output(0, shape, &output));
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
class BackwardKernel : public DeformableROIAlignKernel {
 public:
  explicit BackwardKernel(OpKernelConstruction* construction)
      : DeformableROIAlignKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("wanted", &wanted_));
    OP_REQUIRES_OK(construction, CheckWanted(wanted_, 1 + num_offset()));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& grad_output = context->input(2 + num_offset());
    DeformableROIAlignParams params;
    DeformableROIAlignInputs operands;
    OP_REQUIRES_OK(context, Prepare(context, &grad_output, &params, &operands));
    DeformableROIAlignGradients gradients;
    void** const targets[] = {&gradients.inputs, &gradients.offset};
    for (int i = 0; i < 1 + num_offset(); ++i) {
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
#define TF_DEFORM_DEFORMABLE_ROI_ALIGN_OP(name)   \
  TF_DEFORM_REGISTER_OP(name)                     \
      .Attr("T: {half, bfloat16, float, double}") \
      .Attr("Tcoord: {float, double}")            \
      .Attr("num_offset: int >= 0")               \
      .Attr("spatial_scale: list(float)")         \
      .Attr("pooled_size: list(int)")             \
      .Attr("sampling_ratio: int = 0")            \
      .Attr("gamma: list(float)")                 \
      .Input("inputs: T")                         \
      .Input("rois: Tcoord")                      \
      .Input("offset: num_offset * Tcoord")

TF_DEFORM_DEFORMABLE_ROI_ALIGN_OP("TfDeform>DeformableROIAlign")
    .Output("output: T")
    .SetShapeFn(ForwardShape);

// `wanted` says which gradients to compute; the others come out empty.
TF_DEFORM_DEFORMABLE_ROI_ALIGN_OP("TfDeform>DeformableROIAlignGrad")
    .Attr("wanted: list(bool)")
    .Input("grad_output: T")
    .Output("grad_inputs: T")
    .Output("grad_offset: num_offset * Tcoord")
    .SetShapeFn(BackwardShape);

const bool on_cpu =
    RegisterKernels<ForwardKernel<ParallelFor>, BackwardKernel<ParallelFor>>(
        "TfDeform>DeformableROIAlign", tensorflow::DEVICE_CPU);
#ifdef TF_DEFORM_CUDA
const bool on_gpu =
    RegisterKernels<ForwardKernel<CudaStream>, BackwardKernel<CudaStream>>(
        "TfDeform>DeformableROIAlign", tensorflow::DEVICE_GPU);
#endif

}  // namespace
}  // namespace tf_deform

// How many gradients of each operand (inputs, offset) kernels of this process
// have computed: what tests ask to see that unwanted ones cost nothing.
extern "C" __attribute__((visibility("default"))) void
TfDeformDeformableROIAlignGradientsComputed(int64_t counts[2]) {
  for (int i = 0; i < 2; ++i) {
    counts[i] = tf_deform::gradients_computed[i].load();
  }
}

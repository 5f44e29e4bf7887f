// SPDX-License-Identifier: Apache-2.0
// Makes an op in TensorFlow from its description: definition, shape functions,
// kernels of the op and of its gradient op.

#ifndef TF_DEFORM_CC_TF_OP_KERNELS_H_
#define TF_DEFORM_CC_TF_OP_KERNELS_H_

#include <atomic>
#include <cstdint>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "cc/core/common.h"
#include "cc/tf/attributes.h"
#include "cc/tf/glue.h"
#include "cc/tf/kept_memory.h"
#include "cc/tf/library.h"
#include "cc/tf/ops.h"
#include "tensorflow/core/framework/kernel_def_builder.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/tensor.h"

namespace tf_deform {

// Judges the shapes and attributes that the graph knows, and fills `params`
// from them.
template <typename Op>
tensorflow::Status InferParams(
    tensorflow::shape_inference::InferenceContext* context, bool has_gradient,
    int* num_operands, typename Op::Params* params) {
  TF_RETURN_IF_ERROR(ReadCall<Op>(context, num_operands, params));
  const auto shape_of = [context](int i) {
    return ToShape(context, context->input(i));
  };
  return ToTensorFlow(Judge<Op>(*num_operands, has_gradient, shape_of, params));
}

// If a size is not known, takes the operand's own dimension, so that equal
// unknown dimensions are known to be equal.
template <typename Op>
tensorflow::Status ForwardShape(
    tensorflow::shape_inference::InferenceContext* context) {
  int num_operands;
  typename Op::Params params;
  TF_RETURN_IF_ERROR(InferParams<Op>(context, false, &num_operands, &params));
  std::vector<tensorflow::shape_inference::DimensionHandle> dims;
  for (const Dimension& dim : Op::OutputShape(params)) {
    if (dim.size >= 0) {
      dims.push_back(context->MakeDim(dim.size));
    } else if (dim.operand >= 0 &&
               context->RankKnown(context->input(dim.operand))) {
      dims.push_back(context->Dim(context->input(dim.operand), dim.axis));
    } else {
      dims.push_back(context->UnknownDim());
    }
  }
  const auto output = context->MakeShape(dims);
  for (int i = 0; i < kNumOutputs<Op>; ++i) context->set_output(i, output);
  return tensorflow::Status();
}

template <typename Op>
tensorflow::Status BackwardShape(
    tensorflow::shape_inference::InferenceContext* context) {
  int num_operands;
  typename Op::Params params;
  TF_RETURN_IF_ERROR(InferParams<Op>(context, true, &num_operands, &params));
  std::vector<bool> wanted;
  TF_RETURN_IF_ERROR(
      GetWanted(context, NumGradients<Op>(num_operands), &wanted));
  ForEachGradient<Op>(num_operands, [&](int output, int operand) {
    context->set_output(
        output, wanted[output] ? context->input(operand) : context->Vector(0));
  });
  return tensorflow::Status();
}

// Reads attributes and judges operands, for the kernels of an op and of its
// gradient op.
template <typename Op>
class Kernel : public tensorflow::OpKernel {
 public:
  explicit Kernel(tensorflow::OpKernelConstruction* construction)
      : OpKernel(construction) {
    OP_REQUIRES_OK(construction,
                   ReadCall<Op>(construction, &num_operands_, &attributes_));
  }

 protected:
  int num_operands() const { return num_operands_; }

  // Judges the operands.
  tensorflow::Status Prepare(tensorflow::OpKernelContext* context,
                             bool has_gradient, typename Op::Params* params,
                             typename Op::Inputs* operands) const {
    *params = attributes_;
    const auto shape_of = [context](int i) {
      return ToShape(context->input(i).shape());
    };
    TF_RETURN_IF_ERROR(
        ToTensorFlow(Judge<Op>(num_operands_, has_gradient, shape_of, params)));
    *operands = ToInputs<Op>(num_operands_, [context](int i) {
      return static_cast<const void*>(context->input(i).data());
    });
    return tensorflow::Status();
  }

  // Runs a call with its scratch memory: run(operands, workspace). The
  // `packed_bytes` bytes of it that Op::kPacked names are kept for later calls.
  template <typename Run>
  tensorflow::Status RunWithScratch(tensorflow::OpKernelContext* context,
                                    int64_t workspace_bytes,
                                    int64_t packed_bytes,
                                    typename Op::Inputs operands,
                                    const Run& run) {
    tensorflow::Tensor workspace, packed;
    if constexpr (Op::kPacked != nullptr) {
      if (packed_bytes > 0) {
        TF_RETURN_IF_ERROR(packed_.Take(context, packed_bytes, &packed));
        operands.*Op::kPacked = packed.data();
      }
    }
    TF_RETURN_IF_ERROR(context->allocate_temp(
        tensorflow::DT_INT8, {workspace_bytes - packed_bytes}, &workspace));
    const Status status = run(operands, workspace.data());
    if (packed_bytes > 0) packed_.Return(std::move(packed));
    return ToTensorFlow(status);
  }

 private:
  KeptMemory packed_;
  int num_operands_ = 0;
  typename Op::Params attributes_;
};

// Executor: ParallelFor on the CPU, CudaStream on a GPU.
template <typename Op, typename Executor>
class ForwardKernel : public Kernel<Op> {
 public:
  using Kernel<Op>::Kernel;

  void Compute(tensorflow::OpKernelContext* context) override {
    typename Op::Params params;
    typename Op::Inputs operands;
    OP_REQUIRES_OK(context, this->Prepare(context, false, &params, &operands));
    tensorflow::TensorShape shape;
    for (const Dimension& dim : Op::OutputShape(params)) {
      OP_REQUIRES_OK(context, shape.AddDimWithStatus(dim.size));
    }
    void* outputs[kNumOutputs<Op>];
    for (int i = 0; i < kNumOutputs<Op>; ++i) {
      tensorflow::Tensor* output;
      OP_REQUIRES_OK(context, context->allocate_output(i, shape, &output));
      outputs[i] =
          i == 0 || context->output_required(i) ? output->data() : nullptr;
    }
    if (shape.num_elements() == 0) return;
    const auto executor = GetExecutor<Executor>(context);
    const DataType type = ToDataType(context->input(0).dtype());
    OP_REQUIRES_OK(context,
                   this->RunWithScratch(
                       context, WorkspaceBytes(params, type, executor),
                       PackedBytes<Op, Executor>(params, type), operands,
                       [&](const typename Op::Inputs& given, void* workspace) {
                         return ForwardTo<Op>(params, type, given, workspace,
                                              outputs, executor);
                       }));
  }
};

// Counts, for each output of the gradient op, the gradients that kernels of the
// process had to compute. A gradient is counted when its memory is allocated,
// so also if its computation fails.
template <typename Op>
std::atomic<int64_t> gradients_computed[std::size(Op::kOperands)];

template <typename Op, typename Executor>
class BackwardKernel : public Kernel<Op> {
 public:
  explicit BackwardKernel(tensorflow::OpKernelConstruction* construction)
      : Kernel<Op>(construction) {
    OP_REQUIRES_OK(construction,
                   GetWanted(construction,
                             NumGradients<Op>(this->num_operands()), &wanted_));
  }

  void Compute(tensorflow::OpKernelContext* context) override {
    typename Op::Params params;
    typename Op::Inputs operands;
    OP_REQUIRES_OK(context, this->Prepare(context, true, &params, &operands));
    typename Op::Gradients gradients;
    tensorflow::Status status;
    ForEachGradient<Op>(this->num_operands(), [&](int output, int operand) {
      status.Update(
          AllocateGradient(context, output, operand,
                           &(gradients.*Op::kOperands[operand].gradient)));
    });
    OP_REQUIRES_OK(context, status);
    const tensorflow::Tensor& grad_output =
        context->input(this->num_operands());
    const auto executor = GetExecutor<Executor>(context);
    const DataType type = ToDataType(grad_output.dtype());
    OP_REQUIRES_OK(
        context,
        this->RunWithScratch(
            context, BackwardWorkspaceBytes(params, type, gradients, executor),
            BackwardPackedBytes<Op, Executor>(params, type, gradients),
            operands, [&](const typename Op::Inputs& given, void* workspace) {
              return Backward(params, type, given, grad_output.data(),
                              workspace, gradients, executor);
            }));
  }

 private:
  // Allocates an output, shaped like its operand, and counts it; an unwanted
  // output is empty. `target` stays null if nothing is to be computed: not
  // wanted, pruned from the graph, or without elements.
  tensorflow::Status AllocateGradient(tensorflow::OpKernelContext* context,
                                      int output, int operand,
                                      void** target) const {
    tensorflow::Tensor* gradient;
    if (!wanted_[output]) {
      return context->allocate_output(output, {0}, &gradient);
    }
    if (!context->output_required(output)) return tensorflow::Status();
    TF_RETURN_IF_ERROR(context->allocate_output(
        output, context->input(operand).shape(), &gradient));
    if (gradient->NumElements() == 0) return tensorflow::Status();
    *target = gradient->data();
    gradients_computed<Op>[output].fetch_add(1, std::memory_order_relaxed);
    return tensorflow::Status();
  }

  std::vector<bool> wanted_;
};

// Defines an op or its gradient op; `wanted` of the gradient op says which
// gradients to compute; the others come out empty.
template <typename Op>
void DefineOp(bool is_gradient) {
  // The types as OpDefBuilder takes them; `list` of an optional operand.
  const auto types = [](const auto& operand) {
    const std::string type = operand.kind == kValue ? "T" : "Tcoord";
    return operand.presence == kRequired
               ? type
               : std::string("num_") + operand.name + " * " + type;
  };
  tensorflow::register_op::OpDefBuilderWrapper op(
      OpName<Op>(is_gradient).c_str());
  op.Attr("T: {half, bfloat16, float, double}");
  op.Attr("Tcoord: {float, double}");
  for (const auto& operand : Op::kOperands) {
    if (operand.presence == kOptional) {
      op.Attr(std::string("num_") + operand.name + ": int >= 0");
    }
    op.Input(std::string(operand.name) + ": " + types(operand));
  }
  for (const char* definition : Attributes<Op>::kDefinitions) {
    op.Attr(definition);
  }
  if (is_gradient) {
    op.Attr("wanted: list(bool)");
    op.Input("grad_output: T");
    for (const auto& operand : Op::kOperands) {
      if (operand.gradient == nullptr) continue;
      op.Output(std::string("grad_") + operand.name + ": " + types(operand));
    }
  } else {
    op.Output("output: T");
    for (const char* name : Op::kExtraOutputs) {
      op.Output(std::string(name) + ": float");
    }
  }
  op.SetShapeFn(is_gradient ? BackwardShape<Op> : ForwardShape<Op>);
  op();
}

// Registers a kernel of an op for one device and all types.
template <typename Kernel>
void RegisterKernel(const std::string& op, const char* device) {
  for (const auto type : {tensorflow::DT_HALF, tensorflow::DT_BFLOAT16,
                          tensorflow::DT_FLOAT, tensorflow::DT_DOUBLE}) {
    tensorflow::kernel_factory::OpKernelRegistrar(
        tensorflow::KernelDefBuilder(op.c_str())
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

// Registers the kernels of an op and of its gradient op for one device.
template <typename Op, typename Executor>
void RegisterKernels(const char* device) {
  RegisterKernel<ForwardKernel<Op, Executor>>(OpName<Op>(false), device);
  RegisterKernel<BackwardKernel<Op, Executor>>(OpName<Op>(true), device);
}

// Registers an op, its gradient op and their kernels, if this copy of the
// library is the first.
template <typename Op>
bool RegisterOp() {
  if (!RegistersOps()) return false;
  DefineOp<Op>(false);
  DefineOp<Op>(true);
  RegisterKernels<Op, ParallelFor>(tensorflow::DEVICE_CPU);
#ifdef TF_DEFORM_CUDA
  RegisterKernels<Op, CudaStream>(tensorflow::DEVICE_GPU);
#endif
  return true;
}

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_OP_KERNELS_H_

// SPDX-License-Identifier: Apache-2.0
// Lists all ops for TensorFlow's glue and XLA's, and defines the calls that
// both make from an op's description (cc/core/op.h).

#ifndef TF_DEFORM_CC_TF_OPS_H_
#define TF_DEFORM_CC_TF_OPS_H_

#include <cstdint>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>

#include "cc/core/common.h"
#include "cc/core/op.h"
#include "cc/tf/attributes.h"
#include "cc/tf/deformable_conv2d_op.h"
#include "cc/tf/deformable_psroi_pool_op.h"
#include "cc/tf/deformable_roi_align_op.h"

// Calls Macro(Op) for every op. A new op is entered here and above.
#define TF_DEFORM_FOR_EACH_OP(Macro) \
  Macro(DeformableConv2D);           \
  Macro(DeformablePSROIPool);        \
  Macro(DeformableROIAlign)

namespace tf_deform {

// Returns the name of an op, or of its gradient op, in TensorFlow and XLA.
template <typename Op>
std::string OpName(bool is_gradient) {
  return std::string("TfDeform>") + Op::kName + (is_gradient ? "Grad" : "");
}

// Reads the attributes that an op and its gradient op share, and how many
// operands a call has. For `Source` see attributes.h.
template <typename Op, typename Source>
tensorflow::Status ReadCall(Source* source, int* num_operands,
                            typename Op::Params* params) {
  static_assert(NumRequired<Op>() + 1 >= std::size(Op::kOperands),
                "only the last operand may be optional");
  *num_operands = NumRequired<Op>();
  for (const auto& operand : Op::kOperands) {
    if (operand.presence == kRequired) continue;
    int number = 0;
    TF_RETURN_IF_ERROR(GetOptional(source, operand.name, &number));
    *num_operands += number;
  }
  return Attributes<Op>::Read(source, params);
}

// Judges a call and fills `params`. shape_of(i) is the shape of operand i; the
// gradient of the output, if there is one, follows the operands.
template <typename Op, typename ShapeOf>
Status Judge(int num_operands, bool has_gradient, const ShapeOf& shape_of,
             typename Op::Params* params) {
  Shape memory[std::size(Op::kOperands) + 1];
  typename Op::Shapes shapes;
  for (int i = 0; i < num_operands; ++i) {
    memory[i] = shape_of(i);
    shapes.*Op::kOperands[i].shape = &memory[i];
  }
  if (has_gradient) {
    memory[num_operands] = shape_of(num_operands);
    shapes.grad_output = &memory[num_operands];
  }
  return Validate(shapes, params);
}

// Returns the operands of a call, whose memory is data_of(i).
template <typename Op, typename DataOf>
typename Op::Inputs ToInputs(int num_operands, const DataOf& data_of) {
  typename Op::Inputs inputs;
  for (int i = 0; i < num_operands; ++i) {
    inputs.*Op::kOperands[i].data = data_of(i);
  }
  return inputs;
}

// Calls body(output, operand) for every output of a gradient op and the operand
// whose gradient the output is. Returns the number of outputs.
template <typename Op, typename Body>
int ForEachGradient(int num_operands, const Body& body) {
  int output = 0;
  for (int i = 0; i < num_operands; ++i) {
    if (Op::kOperands[i].gradient != nullptr) body(output++, i);
  }
  return output;
}

template <typename Op>
int NumGradients(int num_operands) {
  return ForEachGradient<Op>(num_operands, [](int, int) {});
}

// Calls the core on the CPU or, with the same signatures, on a GPU. `outputs`
// holds the output and the outputs named in Op::kExtraOutputs, which may be
// null.

template <typename Params>
int64_t WorkspaceBytes(const Params& params, DataType type,
                       const ParallelFor& parallel_for) {
  return cpu::WorkspaceBytes(params, type, parallel_for.num_workers);
}

template <typename Params, typename Gradients>
int64_t BackwardWorkspaceBytes(const Params& params, DataType type,
                               const Gradients& wanted,
                               const ParallelFor& parallel_for) {
  return cpu::BackwardWorkspaceBytes(params, type, wanted,
                                     parallel_for.num_workers);
}

// Return the bytes of memory that a kernel of `Op` may keep for the executor.
template <typename Op, typename Executor>
int64_t PackedBytes(const typename Op::Params& params, DataType type) {
  if constexpr (Op::kPacked != nullptr &&
                std::is_same_v<Executor, ParallelFor>) {
    return cpu::PackedBytes(params, type);
  }
  return 0;
}

template <typename Op, typename Executor>
int64_t BackwardPackedBytes(const typename Op::Params& params, DataType type,
                            const typename Op::Gradients& wanted) {
  if constexpr (Op::kPacked != nullptr &&
                std::is_same_v<Executor, ParallelFor>) {
    return cpu::BackwardPackedBytes(params, type, wanted);
  }
  return 0;
}

using cpu::Backward;
using cpu::Forward;

#ifdef TF_DEFORM_CUDA
template <typename Params>
int64_t WorkspaceBytes(const Params& params, DataType type, const CudaStream&) {
  return cuda::WorkspaceBytes(params, type);
}

using cuda::Backward;
using cuda::BackwardWorkspaceBytes;
using cuda::Forward;
#endif

template <typename Op, typename Executor, size_t... kExtra>
Status ForwardTo(const typename Op::Params& params, DataType type,
                 const typename Op::Inputs& operands, void* workspace,
                 void* const* outputs, const Executor& executor,
                 std::index_sequence<kExtra...>) {
  return Forward(params, type, operands, workspace, outputs[0],
                 static_cast<float*>(outputs[1 + kExtra])..., executor);
}

template <typename Op>
constexpr int kNumOutputs = 1 + static_cast<int>(Op::kExtraOutputs.size());

template <typename Op, typename Executor>
Status ForwardTo(const typename Op::Params& params, DataType type,
                 const typename Op::Inputs& operands, void* workspace,
                 void* const* outputs, const Executor& executor) {
  return ForwardTo<Op>(params, type, operands, workspace, outputs, executor,
                       std::make_index_sequence<kNumOutputs<Op> - 1>());
}

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_OPS_H_

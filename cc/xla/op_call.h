// SPDX-License-Identifier: Apache-2.0
// Makes an op inside XLA from its description.
//
// Inside tf.function(jit_compile=True) an op becomes a typed custom call of its
// own name: operands and results are the op's, and the workspace is an
// additional result, because XLA has no other scratch on the host. The call
// carries the op's parameters as they lie in memory, so nothing is parsed when
// it runs.

#ifndef TF_DEFORM_CC_XLA_OP_CALL_H_
#define TF_DEFORM_CC_XLA_OP_CALL_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <variant>
#include <vector>

#include "absl/types/span.h"
#include "cc/core/common.h"
#include "cc/tf/ops.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace tf_deform {

// The executor of a call: threads of XLA's pool, or XLA's stream.
#ifdef TF_DEFORM_CUDA
using XlaExecutor = std::variant<ParallelFor, CudaStream>;
#else
using XlaExecutor = std::variant<ParallelFor>;
#endif

// Memory of a call. A result without elements is null: nothing is to be
// computed. While XLA compiles, results tell only whether they are null.
struct XlaBuffers {
  std::vector<const void*> operands;
  std::vector<void*> results;
  void* workspace = nullptr;
};

// One call of an op. Bind comes first, then Judge; each keeps the values that
// later steps need.
class XlaCall {
 public:
  using Words = absl::Span<const int64_t>;

  virtual ~XlaCall() = default;

  // Reads the attributes of a node: the op's parameters and, of a gradient op,
  // which gradients are wanted.
  virtual tensorflow::Status Read(
      tensorflow::OpKernelConstruction* construction,
      std::vector<int64_t>* params, std::vector<int64_t>* wanted) const = 0;

  // Takes the words that Read returned. Any program may be the caller, so the
  // words are not trusted.
  virtual Status Bind(Words params, Words wanted) = 0;

  // Judges the operands' shapes, and returns the results' shapes.
  virtual Status Judge(const std::vector<Shape>& operands,
                       std::vector<Shape>* results) = 0;

  // Returns the bytes of scratch that Run needs with such an executor.
  virtual int64_t WorkspaceBytes(DataType type, const XlaBuffers& buffers,
                                 const XlaExecutor& executor) const = 0;

  // Writes the results.
  virtual Status Run(DataType type, const XlaBuffers& buffers,
                     const XlaExecutor& executor) const = 0;
};

template <typename Op, bool kIsGradient>
class OpCall final : public XlaCall {
 public:
  tensorflow::Status Read(tensorflow::OpKernelConstruction* construction,
                          std::vector<int64_t>* params,
                          std::vector<int64_t>* wanted) const override {
    int num_operands;
    Params attributes;
    TF_RETURN_IF_ERROR(ReadCall<Op>(construction, &num_operands, &attributes));
    params->resize(kWords);
    std::memcpy(params->data(), &attributes, sizeof(attributes));
    if (!kIsGradient) return tensorflow::Status();
    std::vector<bool> flags;
    TF_RETURN_IF_ERROR(
        GetWanted(construction, NumGradients<Op>(num_operands), &flags));
    wanted->assign(flags.begin(), flags.end());
    return tensorflow::Status();
  }

  Status Bind(Words params, Words wanted) override {
    if (params.size() != kWords) {
      return InvalidArgument(
          "Expected `params` of %s to be %d words, as this version of "
          "tf_deform writes them. Received: %d",
          Op::kName, static_cast<int>(kWords), static_cast<int>(params.size()));
    }
    std::memcpy(static_cast<void*>(&params_), params.data(), sizeof(params_));
    wanted_.assign(wanted.begin(), wanted.end());
    return Status();
  }

  Status Judge(const std::vector<Shape>& operands,
               std::vector<Shape>* results) override {
    constexpr int kMost = std::size(Op::kOperands);
    num_operands_ = static_cast<int>(operands.size()) - kIsGradient;
    if (num_operands_ < NumRequired<Op>() || num_operands_ > kMost) {
      return InvalidArgument("Expected %d or %d operands. Received: %d",
                             NumRequired<Op>() + kIsGradient,
                             kMost + kIsGradient,
                             static_cast<int>(operands.size()));
    }
    TF_DEFORM_RETURN_IF_ERROR(tf_deform::Judge<Op>(
        num_operands_, kIsGradient, [&](int i) { return operands[i]; },
        &params_));
    if (kIsGradient) return GradientShapes(operands, results);
    Shape output;
    output.rank = 0;
    for (const Dimension& dim : Op::OutputShape(params_)) {
      output.dims[output.rank++] = dim.size;
    }
    results->assign(kNumOutputs<Op>, output);
    return Status();
  }

  int64_t WorkspaceBytes(DataType type, const XlaBuffers& buffers,
                         const XlaExecutor& executor) const override {
    return std::visit(
        [&](const auto& runs_on) {
          if constexpr (kIsGradient) {
            return BackwardWorkspaceBytes(params_, type, Gradients(buffers),
                                          runs_on);
          } else {
            return tf_deform::WorkspaceBytes(params_, type, runs_on);
          }
        },
        executor);
  }

  Status Run(DataType type, const XlaBuffers& buffers,
             const XlaExecutor& executor) const override {
    auto operands =
        ToInputs<Op>(num_operands_, [&](int i) { return buffers.operands[i]; });
    // XLA gives the same results on every device: no device judges values.
    if constexpr (Op::kBadRoisArePadding != nullptr) {
      operands.*Op::kBadRoisArePadding = true;
    }
    return std::visit(
        [&](const auto& runs_on) {
          if constexpr (kIsGradient) {
            return Backward(params_, type, operands, buffers.operands.back(),
                            buffers.workspace, Gradients(buffers), runs_on);
          } else {
            if (buffers.results[0] == nullptr) return Status();
            return ForwardTo<Op>(params_, type, operands, buffers.workspace,
                                 buffers.results.data(), runs_on);
          }
        },
        executor);
  }

 private:
  using Params = typename Op::Params;
  static constexpr size_t kWords = sizeof(Params) / sizeof(int64_t);
  static_assert(std::is_trivially_copyable_v<Params> &&
                sizeof(Params) == kWords * sizeof(int64_t));

  // An unwanted gradient is empty.
  Status GradientShapes(const std::vector<Shape>& operands,
                        std::vector<Shape>* results) const {
    const int number = NumGradients<Op>(num_operands_);
    if (static_cast<int>(wanted_.size()) != number) {
      return InvalidArgument(
          "Expected `wanted` to have an entry for each of the %d gradients. "
          "Received: %d",
          number, static_cast<int>(wanted_.size()));
    }
    Shape empty;
    empty.rank = 1;
    results->clear();
    ForEachGradient<Op>(num_operands_, [&](int output, int operand) {
      results->push_back(wanted_[output] ? operands[operand] : empty);
    });
    return Status();
  }

  typename Op::Gradients Gradients(const XlaBuffers& buffers) const {
    typename Op::Gradients gradients;
    ForEachGradient<Op>(num_operands_, [&](int output, int operand) {
      gradients.*Op::kOperands[operand].gradient = buffers.results[output];
    });
    return gradients;
  }

  Params params_;
  std::vector<bool> wanted_;
  int num_operands_ = 0;
};

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_XLA_OP_CALL_H_

// SPDX-License-Identifier: Apache-2.0
// Deformable convolution inside XLA.

#include <cstdint>
#include <memory>
#include <vector>

#include "cc/core/deformable_conv2d.h"
#include "cc/tf/deformable_conv2d_op.h"
#include "cc/xla/glue.h"

namespace tf_deform {
namespace {

// What the calls of both ops have in common.
class DeformableConv2DCall : public XlaCall {
 protected:
  // Judges the operands; the gradient of the output follows the others.
  tensorflow::Status Prepare(const XlaAttributes& attributes,
                             const std::vector<Shape>& operands,
                             bool has_gradient) {
    TF_RETURN_IF_ERROR(GetOptional(&attributes, "mask", &num_mask_));
    TF_RETURN_IF_ERROR(ReadAttributes(&attributes, &params_));
    TF_RETURN_IF_ERROR(
        CheckOperands(operands, 3 + num_mask_ + (has_gradient ? 1 : 0)));
    DeformableConv2DShapes shapes;
    shapes.inputs = operands[0];
    shapes.kernel = operands[1];
    shapes.offset = operands[2];
    if (num_mask_ == 1) shapes.mask = &operands[3];
    if (has_gradient) shapes.grad_output = &operands[3 + num_mask_];
    return ToTensorFlow(Validate(shapes, &params_));
  }

  DeformableConv2DInputs Operands(const XlaBuffers& buffers) const {
    DeformableConv2DInputs operands;
    operands.inputs = buffers.operands[0];
    operands.kernel = buffers.operands[1];
    operands.offset = buffers.operands[2];
    if (num_mask_ == 1) operands.mask = buffers.operands[3];
    return operands;
  }

  int num_mask_ = 0;
  DeformableConv2DParams params_;
};

class ForwardCall final : public DeformableConv2DCall {
 public:
  tensorflow::Status Judge(const XlaAttributes& attributes,
                           const std::vector<Shape>& operands,
                           std::vector<Shape>* results) override {
    TF_RETURN_IF_ERROR(Prepare(attributes, operands, false));
    *results = {KnownShape(
        {params_.batch, params_.out_h, params_.out_w, params_.filters})};
    return tensorflow::Status();
  }

  int64_t WorkspaceBytes(DataType type, const XlaBuffers&,
                         const XlaExecutor& executor) const override {
    return std::visit(
        [&](const auto& runs_on) {
          return tf_deform::WorkspaceBytes(params_, type, runs_on);
        },
        executor);
  }

  Status Run(DataType type, const XlaBuffers& buffers,
             const XlaExecutor& executor) const override {
    if (buffers.results[0] == nullptr) return Status();
    return std::visit(
        [&](const auto& runs_on) {
          return Forward(params_, type, Operands(buffers), buffers.workspace,
                         buffers.results[0], runs_on);
        },
        executor);
  }
};

class BackwardCall final : public DeformableConv2DCall {
 public:
  tensorflow::Status Judge(const XlaAttributes& attributes,
                           const std::vector<Shape>& operands,
                           std::vector<Shape>* results) override {
    TF_RETURN_IF_ERROR(Prepare(attributes, operands, true));
    results->assign(operands.begin(), operands.end() - 1);
    return KeepWanted(attributes, results);
  }

  int64_t WorkspaceBytes(DataType type, const XlaBuffers& buffers,
                         const XlaExecutor& executor) const override {
    return std::visit(
        [&](const auto& runs_on) {
          return BackwardWorkspaceBytes(params_, type, Gradients(buffers),
                                        runs_on);
        },
        executor);
  }

  Status Run(DataType type, const XlaBuffers& buffers,
             const XlaExecutor& executor) const override {
    return std::visit(
        [&](const auto& runs_on) {
          return Backward(params_, type, Operands(buffers),
                          buffers.operands.back(), buffers.workspace,
                          Gradients(buffers), runs_on);
        },
        executor);
  }

 private:
  DeformableConv2DGradients Gradients(const XlaBuffers& buffers) const {
    DeformableConv2DGradients gradients;
    gradients.inputs = buffers.results[0];
    gradients.kernel = buffers.results[1];
    gradients.offset = buffers.results[2];
    if (num_mask_ == 1) gradients.mask = buffers.results[3];
    return gradients;
  }
};

const XlaRegistrar forward =
    RegisterXla<ForwardCall>("TfDeform>DeformableConv2D");
const XlaRegistrar backward =
    RegisterXla<BackwardCall>("TfDeform>DeformableConv2DGrad");

}  // namespace
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Deformable position-sensitive ROI pooling inside XLA.

#include <cstdint>
#include <memory>
#include <vector>

#include "cc/core/deformable_psroi_pool.h"
#include "cc/tf/deformable_psroi_pool_op.h"
#include "cc/xla/glue.h"

namespace tf_deform {
namespace {

// What the calls of both ops have in common.
class DeformablePSROIPoolCall : public XlaCall {
 protected:
  // Judges the operands; the gradient of the output follows the others.
  tensorflow::Status Prepare(const XlaAttributes& attributes,
                             const std::vector<Shape>& operands,
                             bool has_gradient) {
    TF_RETURN_IF_ERROR(GetOptional(&attributes, "trans", &num_trans_));
    TF_RETURN_IF_ERROR(ReadAttributes(&attributes, &params_));
    TF_RETURN_IF_ERROR(
        CheckOperands(operands, 2 + num_trans_ + (has_gradient ? 1 : 0)));
    DeformablePSROIPoolShapes shapes;
    shapes.inputs = operands[0];
    shapes.rois = operands[1];
    if (num_trans_ == 1) shapes.trans = &operands[2];
    if (has_gradient) shapes.grad_output = &operands[2 + num_trans_];
    return ToTensorFlow(Validate(shapes, &params_));
  }

  DeformablePSROIPoolInputs Operands(const XlaBuffers& buffers) const {
    DeformablePSROIPoolInputs operands;
    operands.inputs = buffers.operands[0];
    operands.rois = buffers.operands[1];
    if (num_trans_ == 1) operands.trans = buffers.operands[2];
    // The same on every device that XLA compiles for.
    operands.bad_rois_are_padding = true;
    return operands;
  }

  int num_trans_ = 0;
  DeformablePSROIPoolParams params_;
};

class ForwardCall final : public DeformablePSROIPoolCall {
 public:
  tensorflow::Status Judge(const XlaAttributes& attributes,
                           const std::vector<Shape>& operands,
                           std::vector<Shape>* results) override {
    TF_RETURN_IF_ERROR(Prepare(attributes, operands, false));
    const Shape output = KnownShape({params_.num_rois, params_.pooled_h,
                                     params_.pooled_w, params_.output_dim});
    *results = {output, output};
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
    return std::visit(
        [&](const auto& runs_on) {
          return Forward(params_, type, Operands(buffers), buffers.workspace,
                         buffers.results[0],
                         static_cast<float*>(buffers.results[1]), runs_on);
        },
        executor);
  }
};

class BackwardCall final : public DeformablePSROIPoolCall {
 public:
  tensorflow::Status Judge(const XlaAttributes& attributes,
                           const std::vector<Shape>& operands,
                           std::vector<Shape>* results) override {
    TF_RETURN_IF_ERROR(Prepare(attributes, operands, true));
    *results = {operands[0]};
    if (num_trans_ == 1) results->push_back(operands[2]);
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
  DeformablePSROIPoolGradients Gradients(const XlaBuffers& buffers) const {
    DeformablePSROIPoolGradients gradients;
    gradients.inputs = buffers.results[0];
    if (num_trans_ == 1) gradients.trans = buffers.results[1];
    return gradients;
  }
};

const XlaRegistrar forward =
    RegisterXla<ForwardCall>("TfDeform>DeformablePSROIPool");
const XlaRegistrar backward =
    RegisterXla<BackwardCall>("TfDeform>DeformablePSROIPoolGrad");

}  // namespace
}  // namespace tf_deform

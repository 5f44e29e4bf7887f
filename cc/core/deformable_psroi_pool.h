// SPDX-License-Identifier: Apache-2.0
// Computes deformable position-sensitive ROI pooling on plain pointers, forward
// and backward.
//
// With one group cell (group_h = group_w = 1) it is deformable ROI pooling. For
// ROI (n, x1, y1, x2, y2), bin (ph, pw) and output channel o, along y (x
// likewise):
//   start = round(y1) * spatial_scale - 0.5      round: half away from zero
//   end   = (round(y2) + 1) * spatial_scale - 0.5
//   size  = max(end - start, 0.1),  bin = size / pooled_h
//   y_i   = ph * bin + start + dy + i * bin / sample_per_part
// for i in [0, sample_per_part), with
//   dy = trans[r, ph * part_h // pooled_h, pw * part_w // pooled_w, 2 * class]
//        * trans_std * size            (dx: 2 * class + 1)
//   class = o // (output_dim // num_classes)
// A sample counts if -0.5 <= y <= height - 0.5 (x likewise). Its coordinates
// are clamped to [0, height - 1], and it is read bilinearly from input channel
//   (o * group_h + ph * group_h // pooled_h) * group_w
//       + pw * group_w // pooled_w
// The output is the mean over the samples that count, or 0 if no sample counts.
// Dai et al. 2017, arXiv:1703.06211, Eq. 5 and 6.
//
// A ROI with a negative batch index (padding) or a corner that is not finite
// gives 0, count 0 and no gradient. At integers the derivative is the
// right-hand one; it is 0 where a coordinate is clamped.
//
// All tensors are dense, row major, and aligned to their element; T is the
// element type of inputs and output, and the coordinate type is float (double
// when T is double):
//   inputs  (batch, height, width, output_dim * group_h * group_w)  T
//   rois    (num_rois, 5), see rois.h                               coordinate
//   trans   (num_rois, part_h, part_w, num_classes * 2)             coordinate
//           (dy, dx) of each class, in fractions of the ROI; null: none
//   output  (num_rois, pooled_h, pooled_w, output_dim)              T
//   count   (num_rois, pooled_h, pooled_w, output_dim)              float
//           samples that count

#ifndef TF_DEFORM_CC_CORE_DEFORMABLE_PSROI_POOL_H_
#define TF_DEFORM_CC_CORE_DEFORMABLE_PSROI_POOL_H_

#include <array>

#include "cc/core/common.h"
#include "cc/core/op.h"

namespace tf_deform {

// Holds the parameters of a call. The caller sets the first part; Validate
// checks it and fills the second part. The C entry points take the fields in
// this order.
struct DeformablePSROIPoolParams {
  double spatial_scale = 1;  // map pixels per image pixel
  double trans_std = 0.1;
  int64_t output_dim = 1;
  int64_t pooled_h = 1, pooled_w = 1;
  int64_t group_h = 1, group_w = 1;
  int64_t part_h = 1, part_w = 1;
  int64_t sample_per_part = 4;  // along each axis

  // Validate sets these sizes; -1 if no shape tells the size.
  int64_t batch = -1, height = -1, width = -1, channels = -1;
  int64_t num_rois = -1, num_classes = -1;  // 1 without displacements
};

// Holds the shapes of one call. `trans` and `grad_output` may be null.
struct DeformablePSROIPoolShapes {
  const Shape* inputs = nullptr;
  const Shape* rois = nullptr;
  const Shape* trans = nullptr;
  const Shape* grad_output = nullptr;
};

// Checks attributes and shapes and fills `params`. Unknown ranks and dimensions
// fit. If all dimensions are known, ok means that every size and byte count
// fits in int64_t.
TF_DEFORM_API Status Validate(const DeformablePSROIPoolShapes& shapes,
                              DeformablePSROIPoolParams* params);

// Holds the operands of the forward pass.
struct DeformablePSROIPoolInputs {
  const void* inputs = nullptr;
  const void* rois = nullptr;
  const void* trans = nullptr;  // null: no displacement
  // If true, a ROI whose batch index is not an integer below batch counts as
  // padding, as it always does on a GPU; otherwise it is an error.
  bool bad_rois_are_padding = false;
};

// Checks the type, that Validate filled `params` from shapes without unknown
// dimensions and, unless bad ROIs are padding, the batch indices.
Status CheckOperands(const DeformablePSROIPoolParams& params, DataType type,
                     const DeformablePSROIPoolInputs& operands);

// Holds memory for the gradients. Each gradient has its operand's shape and
// type, and is overwritten as a whole. A gradient that is null is not computed.
// ROIs have no gradient.
struct DeformablePSROIPoolGradients {
  void* inputs = nullptr;
  void* trans = nullptr;
};

// Describes the op for the templates that make its glue; see op.h.
struct DeformablePSROIPool
    : OpTypes<DeformablePSROIPoolParams, DeformablePSROIPoolShapes,
              DeformablePSROIPoolInputs, DeformablePSROIPoolGradients> {
  static constexpr char kName[] = "DeformablePSROIPool";
  enum : int { kInputs, kRois, kTrans };
  static constexpr Operand kOperands[] = {
      {"inputs", kValue, kRequired, &Shapes::inputs, &Inputs::inputs,
       &Gradients::inputs},
      {"rois", kCoordinate, kRequired, &Shapes::rois, &Inputs::rois, nullptr},
      {"trans", kCoordinate, kOptional, &Shapes::trans, &Inputs::trans,
       &Gradients::trans},
  };
  static constexpr std::array<const char*, 1> kExtraOutputs = {"count"};
  static constexpr bool Inputs::* kBadRoisArePadding =
      &Inputs::bad_rois_are_padding;

  static std::array<Dimension, 4> OutputShape(const Params& p) {
    return {
        {{p.num_rois, kRois, 0}, {p.pooled_h}, {p.pooled_w}, {p.output_dim}}};
  }
};

namespace cpu {

// Returns the bytes of scratch memory that Forward needs: less than 4 MiB for
// each worker, and never less for more workers. With more than one group cell
// it adds the repacked images, in which a cell's channels lie side by side: as
// many images as fit in 4 MiB for each worker, but at least one. `params` must
// be validated.
TF_DEFORM_API int64_t WorkspaceBytes(const DeformablePSROIPoolParams& params,
                                     DataType type, int num_workers);

// Returns the bytes of scratch memory that Backward needs for the gradients
// that are non-null in `wanted`. The images are then the repacked images or
// their gradients (float32 for 16-bit types).
TF_DEFORM_API int64_t BackwardWorkspaceBytes(
    const DeformablePSROIPoolParams& params, DataType type,
    const DeformablePSROIPoolGradients& wanted, int num_workers);

// Writes `output` and, if it is not null, `count`. `workspace` is aligned to 64
// bytes and has WorkspaceBytes(params, type, parallel_for.num_workers) bytes.
// The result is the same to the bit for any number of workers. Returns an error
// if a batch index is not an integer below batch, unless such ROIs are padding.
TF_DEFORM_API Status Forward(const DeformablePSROIPoolParams& params,
                             DataType type,
                             const DeformablePSROIPoolInputs& operands,
                             void* workspace, void* output, float* count,
                             const ParallelFor& parallel_for);

// Writes the wanted gradients of sum(grad_output * output). Workspace,
// determinism and errors are as in Forward.
TF_DEFORM_API Status Backward(const DeformablePSROIPoolParams& params,
                              DataType type,
                              const DeformablePSROIPoolInputs& operands,
                              const void* grad_output, void* workspace,
                              const DeformablePSROIPoolGradients& gradients,
                              const ParallelFor& parallel_for);

}  // namespace cpu

// Contains the entry points on a GPU, only in a build with nvcc
// (TF_DEFORM_CUDA). A ROI whose batch index is not an integer below batch
// counts as padding, as the host cannot check values without waiting for the
// device. An error of the device, or a driver that is too old, is kInternal.
namespace cuda {

// Returns the bytes of scratch memory that Forward needs.
TF_DEFORM_API int64_t WorkspaceBytes(const DeformablePSROIPoolParams& params,
                                     DataType type);

// Returns the bytes of scratch memory that Backward needs: at most 64 MiB; for
// 16-bit types it adds the float32 image of the inputs' gradient, or of one
// image's gradient if all images need more than that.
TF_DEFORM_API int64_t BackwardWorkspaceBytes(
    const DeformablePSROIPoolParams& params, DataType type,
    const DeformablePSROIPoolGradients& wanted, const CudaStream& stream);

// Writes `output` and `count`. `workspace` is aligned to 256 bytes.
TF_DEFORM_API Status Forward(const DeformablePSROIPoolParams& params,
                             DataType type,
                             const DeformablePSROIPoolInputs& operands,
                             void* workspace, void* output, float* count,
                             const CudaStream& stream);

// Writes the wanted gradients. The gradient of the inputs is summed up in no
// fixed order unless stream.deterministic is set; the gradient of trans always
// has a fixed order.
TF_DEFORM_API Status Backward(const DeformablePSROIPoolParams& params,
                              DataType type,
                              const DeformablePSROIPoolInputs& operands,
                              const void* grad_output, void* workspace,
                              const DeformablePSROIPoolGradients& gradients,
                              const CudaStream& stream);

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_DEFORMABLE_PSROI_POOL_H_

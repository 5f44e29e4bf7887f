// SPDX-License-Identifier: Apache-2.0
// Computes deformable ROIAlign on plain pointers, forward and backward.
//
// Without displacements it is ROIAlign. For ROI (n, x1, y1, x2, y2) and bin
// (ph, pw), along y (x likewise):
//   start = y1 * spatial_scale - 0.5,  size = (y2 - y1) * spatial_scale
//   bin   = size / pooled_h
//   y_i   = ph * bin + start + gamma * size * offset[r, ph, pw, 0]
//           + (i + 0.5) * bin / n          (dx: offset[r, ph, pw, 1])
// for i in [0, n), where n is sampling_ratio or, if that is not positive,
// ceil(size / pooled_h) but at most ceil(2 * height / pooled_h). A sample
// outside of [-1, height] is 0; the coordinates of other samples are clamped to
// [0, height - 1], and the samples are read bilinearly. The output is the mean
// over all samples, or 0 if there is no sample. He et al. 2017, "Mask R-CNN",
// arXiv:1703.06870, section 3; displacements: Dai et al. 2017,
// arXiv:1703.06211, Eq. 6.
//
// A ROI with a negative batch index (padding) or a corner that is not finite
// gives 0 and no gradient. At integers the derivative is the right-hand one; it
// is 0 where a coordinate is clamped.
//
// All tensors are dense, row major, and aligned to their element; T is the
// element type of inputs and output, and the coordinate type is float (double
// when T is double):
//   inputs  (batch, height, width, channels)         T
//   rois    (num_rois, 5), see rois.h                coordinate
//   offset  (num_rois, pooled_h, pooled_w, 2)        coordinate
//           (dy, dx), in fractions of the ROI; null: none
//   output  (num_rois, pooled_h, pooled_w, channels) T

#ifndef TF_DEFORM_CC_CORE_DEFORMABLE_ROI_ALIGN_H_
#define TF_DEFORM_CC_CORE_DEFORMABLE_ROI_ALIGN_H_

#include <array>

#include "cc/core/common.h"
#include "cc/core/op.h"

namespace tf_deform {

// Holds the parameters of a call. The caller sets the first part; Validate
// checks it and fills the second part. The C entry points take the fields in
// this order.
struct DeformableROIAlignParams {
  double spatial_scale = 1;  // map pixels per image pixel
  double gamma = 0.1;
  int64_t pooled_h = 1, pooled_w = 1;
  int64_t sampling_ratio = 0;  // samples along an axis of a bin; 0: by its size

  // Validate sets these sizes; -1 if no shape tells the size.
  int64_t batch = -1, height = -1, width = -1, channels = -1;
  int64_t num_rois = -1;
};

// Holds the shapes of one call. `offset` and `grad_output` may be null.
struct DeformableROIAlignShapes {
  const Shape* inputs = nullptr;
  const Shape* rois = nullptr;
  const Shape* offset = nullptr;
  const Shape* grad_output = nullptr;
};

// Checks attributes and shapes and fills `params`. Unknown ranks and dimensions
// fit. If all dimensions are known, ok means that every size and byte count
// fits in int64_t.
TF_DEFORM_API Status Validate(const DeformableROIAlignShapes& shapes,
                              DeformableROIAlignParams* params);

// Holds the operands of the forward pass.
struct DeformableROIAlignInputs {
  const void* inputs = nullptr;
  const void* rois = nullptr;
  const void* offset = nullptr;  // null: no displacement
  // If true, a ROI whose batch index is not an integer below batch counts as
  // padding, as it always does on a GPU; otherwise it is an error.
  bool bad_rois_are_padding = false;
};

// Checks the type, that Validate filled `params` from shapes without unknown
// dimensions and, unless bad ROIs are padding, the batch indices.
Status CheckOperands(const DeformableROIAlignParams& params, DataType type,
                     const DeformableROIAlignInputs& operands);

// Holds memory for the gradients. Each gradient has its operand's shape and
// type, and is overwritten as a whole. A gradient that is null is not computed.
// ROIs have no gradient.
struct DeformableROIAlignGradients {
  void* inputs = nullptr;
  void* offset = nullptr;
};

// Describes the op for the templates that make its glue; see op.h.
struct DeformableROIAlign
    : OpTypes<DeformableROIAlignParams, DeformableROIAlignShapes,
              DeformableROIAlignInputs, DeformableROIAlignGradients> {
  static constexpr char kName[] = "DeformableROIAlign";
  enum : int { kInputs, kRois, kOffset };
  static constexpr Operand kOperands[] = {
      {"inputs", kValue, kRequired, &Shapes::inputs, &Inputs::inputs,
       &Gradients::inputs},
      {"rois", kCoordinate, kRequired, &Shapes::rois, &Inputs::rois, nullptr},
      {"offset", kCoordinate, kOptional, &Shapes::offset, &Inputs::offset,
       &Gradients::offset},
  };
  static constexpr bool Inputs::* kBadRoisArePadding =
      &Inputs::bad_rois_are_padding;

  static std::array<Dimension, 4> OutputShape(const Params& p) {
    return {{{p.num_rois, kRois, 0},
             {p.pooled_h},
             {p.pooled_w},
             {p.channels, kInputs, 3}}};
  }
};

namespace cpu {

// Returns the bytes of scratch memory that Forward needs: less than 4 MiB for
// each worker, for maps of at most 250000 channels and bins of at most 20000
// samples along an axis; never less for more workers. `params` must be
// validated.
TF_DEFORM_API int64_t WorkspaceBytes(const DeformableROIAlignParams& params,
                                     DataType type, int num_workers);

// Returns the bytes of scratch memory that Backward needs for the gradients
// that are non-null in `wanted`. For 16-bit types it adds float32 images of the
// inputs' gradient: as many images as fit in 4 MiB for each worker, but at
// least one.
TF_DEFORM_API int64_t BackwardWorkspaceBytes(
    const DeformableROIAlignParams& params, DataType type,
    const DeformableROIAlignGradients& wanted, int num_workers);

// Writes `output`. `workspace` is aligned to 64 bytes and has
// WorkspaceBytes(params, type, parallel_for.num_workers) bytes. The result is
// the same to the bit for any number of workers. Returns an error if a batch
// index is not an integer below batch, unless such ROIs are padding.
TF_DEFORM_API Status Forward(const DeformableROIAlignParams& params,
                             DataType type,
                             const DeformableROIAlignInputs& operands,
                             void* workspace, void* output,
                             const ParallelFor& parallel_for);

// Writes the wanted gradients of sum(grad_output * output). Workspace,
// determinism and errors are as in Forward.
TF_DEFORM_API Status Backward(const DeformableROIAlignParams& params,
                              DataType type,
                              const DeformableROIAlignInputs& operands,
                              const void* grad_output, void* workspace,
                              const DeformableROIAlignGradients& gradients,
                              const ParallelFor& parallel_for);

}  // namespace cpu

// Contains the entry points on a GPU, only in a build with nvcc
// (TF_DEFORM_CUDA). A ROI whose batch index is not an integer below batch
// counts as padding, as the host cannot check values without waiting for the
// device. An error of the device, or a driver that is too old, is kInternal.
namespace cuda {

// Returns the bytes of scratch memory that Forward needs.
TF_DEFORM_API int64_t WorkspaceBytes(const DeformableROIAlignParams& params,
                                     DataType type);

// Returns the bytes of scratch memory that Backward needs: at most 64 MiB; for
// 16-bit types it adds the float32 image of the inputs' gradient, or of one
// image's gradient if all images need more than that.
TF_DEFORM_API int64_t BackwardWorkspaceBytes(
    const DeformableROIAlignParams& params, DataType type,
    const DeformableROIAlignGradients& wanted, const CudaStream& stream);

// Writes `output`. `workspace` is aligned to 256 bytes.
TF_DEFORM_API Status Forward(const DeformableROIAlignParams& params,
                             DataType type,
                             const DeformableROIAlignInputs& operands,
                             void* workspace, void* output,
                             const CudaStream& stream);

// Writes the wanted gradients. The gradient of the inputs is summed up in no
// fixed order unless stream.deterministic is set; the gradient of offset always
// has a fixed order.
TF_DEFORM_API Status Backward(const DeformableROIAlignParams& params,
                              DataType type,
                              const DeformableROIAlignInputs& operands,
                              const void* grad_output, void* workspace,
                              const DeformableROIAlignGradients& gradients,
                              const CudaStream& stream);

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_DEFORMABLE_ROI_ALIGN_H_

// SPDX-License-Identifier: Apache-2.0
// Deformable ROIAlign on plain pointers: forward and backward.
//
// Without displacements: ROIAlign. For ROI (n, x1, y1, x2, y2) and bin (ph,
// pw), along y (x likewise):
//   start = y1 * spatial_scale - 0.5,  size = (y2 - y1) * spatial_scale
//   bin   = size / pooled_h
//   y_i   = ph * bin + start + gamma * size * offset[r, ph, pw, 0]
//           + (i + 0.5) * bin / n          (dx: offset[r, ph, pw, 1])
// for i in [0, n), n = sampling_ratio or, where that is not positive,
// ceil(size / pooled_h) but at most ceil(2 * height / pooled_h). A sample
// outside of [-1, height] is 0; the others are clamped to [0, height - 1] and
// read bilinearly. The output is the mean over all samples, 0 if there is none.
// He et al. 2017, "Mask R-CNN", arXiv:1703.06870, section 3; displacements: Dai
// et al. 2017, arXiv:1703.06211, Eq. 6.
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

// The parameters of a call. The caller sets the first part; Validate checks it
// and fills the second. The fields, in this order, are what the C entry points
// take.
struct DeformableROIAlignParams {
  double spatial_scale = 1;  // map pixels per image pixel
  double gamma = 0.1;
  int64_t pooled_h = 1, pooled_w = 1;
  int64_t sampling_ratio = 0;  // samples along each axis of a bin

  // Set by Validate; -1 where a shape did not tell.
  int64_t batch = -1, height = -1, width = -1, channels = -1;
  int64_t num_rois = -1;
};

// The shapes of one call. `offset` and `grad_output` are null when there is
// none.
struct DeformableROIAlignShapes {
  const Shape* inputs = nullptr;
  const Shape* rois = nullptr;
  const Shape* offset = nullptr;
  const Shape* grad_output = nullptr;
};

// Judges attributes and shapes and fills `params`. Unknown ranks and dimensions
// are taken to fit; with all known, ok means that every size and byte count
// fits in int64_t.
Status Validate(const DeformableROIAlignShapes& shapes,
                DeformableROIAlignParams* params);

// Operands of the forward pass.
struct DeformableROIAlignInputs {
  const void* inputs = nullptr;
  const void* rois = nullptr;
  const void* offset = nullptr;  // null: no displacement
  // A ROI whose batch index is no integer or not below batch counts as padding,
  // as always on a GPU; otherwise it is an error.
  bool bad_rois_are_padding = false;
};

// Judges the type, that Validate filled `params` from shapes that were all
// known and, unless bad ROIs are padding, the batch indices.
Status CheckOperands(const DeformableROIAlignParams& params, DataType type,
                     const DeformableROIAlignInputs& operands);

// Memory for the gradients, each shaped and typed like its operand and
// overwritten whole. Null: not wanted, not computed. ROIs have none.
struct DeformableROIAlignGradients {
  void* inputs = nullptr;
  void* offset = nullptr;
};

// The op, from which glue is made; see op.h.
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

// Bytes of scratch that Forward needs: less than 4 MiB a worker unless bins
// have more than 100000 samples along an axis; never less for more workers.
// `params` validated.
int64_t WorkspaceBytes(const DeformableROIAlignParams& params, DataType type,
                       int num_workers);

// Bytes of scratch that Backward needs for the gradients that are non-null in
// `wanted`; for 16-bit types also as many float32 images of the inputs'
// gradient as fit in 4 MiB a worker, but at least one.
int64_t BackwardWorkspaceBytes(const DeformableROIAlignParams& params,
                               DataType type,
                               const DeformableROIAlignGradients& wanted,
                               int num_workers);

// Writes `output`. `workspace` is aligned to 64 bytes and as large as
// WorkspaceBytes(params, type, parallel_for.num_workers) says. The result does
// not depend on the number of workers, to the bit. An error if a batch index is
// no integer or not below batch, unless such ROIs are padding.
Status Forward(const DeformableROIAlignParams& params, DataType type,
               const DeformableROIAlignInputs& operands, void* workspace,
               void* output, const ParallelFor& parallel_for);

// Writes the wanted gradients of sum(grad_output * output). Workspace,
// determinism and errors as above.
Status Backward(const DeformableROIAlignParams& params, DataType type,
                const DeformableROIAlignInputs& operands,
                const void* grad_output, void* workspace,
                const DeformableROIAlignGradients& gradients,
                const ParallelFor& parallel_for);

}  // namespace cpu

// The entry points on a GPU, only in a build with nvcc (TF_DEFORM_CUDA). A ROI
// whose batch index is no integer or not below batch counts as padding: values
// cannot be judged in time. An error of the device, or a driver that is too
// old, is kInternal.
namespace cuda {

// Bytes of scratch that Forward needs.
int64_t WorkspaceBytes(const DeformableROIAlignParams& params, DataType type);

// Bytes of scratch that Backward needs: at most 64 MiB; for 16-bit types also
// the float32 image of the inputs' gradient, of one image if that of all is
// larger.
int64_t BackwardWorkspaceBytes(const DeformableROIAlignParams& params,
                               DataType type,
                               const DeformableROIAlignGradients& wanted,
                               const CudaStream& stream);

// `workspace` is aligned to 256 bytes.
Status Forward(const DeformableROIAlignParams& params, DataType type,
               const DeformableROIAlignInputs& operands, void* workspace,
               void* output, const CudaStream& stream);

// The gradient of the inputs is summed in no fixed order unless
// stream.deterministic; that of offset always is.
Status Backward(const DeformableROIAlignParams& params, DataType type,
                const DeformableROIAlignInputs& operands,
                const void* grad_output, void* workspace,
                const DeformableROIAlignGradients& gradients,
                const CudaStream& stream);

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_DEFORMABLE_ROI_ALIGN_H_

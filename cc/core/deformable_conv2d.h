// SPDX-License-Identifier: Apache-2.0
// Deformable convolution on plain pointers: forward and backward.
//
// For output pixel (i, j), tap (kh, kw), and input channel c in offset group g:
//   y = i * stride_h - pad_top + kh * dilation_h + dy,   x likewise,
//   output[n, i, j, f] = sum over taps and channels of
//                        kernel[kh, kw, c, f] * mask[g, kh, kw] * X_c(y, x)
// with X_c(y, x) the bilinear sample of inputs[n, :, :, c]. Dai et al. 2017,
// arXiv:1703.06211, Eq. 2-4; the mask is Zhu et al. 2018, arXiv:1811.11168,
// Eq. 1.
//
// All tensors are dense, row major, and aligned to their element; T is the
// element type of inputs, kernel and output, and the coordinate type is float
// (double when T is double):
//   inputs  (batch, height, width, channels)                    T
//   kernel  (kernel_h, kernel_w, channels / groups, filters)    T
//   offset  (batch, out_h, out_w,
//            offset_groups * kernel_h * kernel_w * 2)           coordinate
//           [group][kh][kw][(dy, dx)], in input pixels
//   mask    (batch, out_h, out_w,
//            offset_groups * kernel_h * kernel_w)               coordinate
//           null: all ones
//   output  (batch, out_h, out_w, filters)                      T

#ifndef TF_DEFORM_CC_CORE_DEFORMABLE_CONV2D_H_
#define TF_DEFORM_CC_CORE_DEFORMABLE_CONV2D_H_

#include <array>

#include "cc/core/common.h"
#include "cc/core/op.h"

namespace tf_deform {

enum class Padding : int { kValid = 0, kSame = 1, kExplicit = 2 };

// kZeros: a sample counts where -1 < y < height and -1 < x < width, and pixels
// outside the image are 0.
// kClamp: a sample counts where 0 <= y < height and 0 <= x < width, and the last
// row and column are held.
enum class Boundary : int { kZeros = 0, kClamp = 1 };

// The parameters of a call. The caller sets the first part; Validate checks it
// and fills the second. Plain int64 fields, in this order, are what the C entry
// points take.
struct DeformableConv2DParams {
  int64_t stride_h = 1, stride_w = 1;
  int64_t dilation_h = 1, dilation_w = 1;
  // The caller sets the padding for kExplicit, Validate for kValid and kSame.
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t offset_groups = 1;
  Padding padding = Padding::kValid;
  Boundary boundary = Boundary::kZeros;

  // Set by Validate; -1 where a shape did not tell.
  int64_t batch = -1, height = -1, width = -1, channels = -1;
  int64_t kernel_h = -1, kernel_w = -1, filters = -1, groups = -1;
  int64_t out_h = -1, out_w = -1;
};

// The shapes of one call. `mask` and `grad_output` are null when there is none.
struct DeformableConv2DShapes {
  const Shape* inputs = nullptr;
  const Shape* kernel = nullptr;
  const Shape* offset = nullptr;
  const Shape* mask = nullptr;
  const Shape* grad_output = nullptr;
};

// Judges attributes and shapes and fills `params`. Unknown ranks and dimensions
// are taken to fit; with all known, ok means that every size and byte count
// below fits in int64_t.
Status Validate(const DeformableConv2DShapes& shapes,
                DeformableConv2DParams* params);

// Operands of the forward pass.
struct DeformableConv2DInputs {
  const void* inputs = nullptr;
  const void* kernel = nullptr;
  const void* offset = nullptr;
  const void* mask = nullptr;  // null: all ones
};

// Judges the type, and that Validate filled `params` from shapes that were all
// known.
Status CheckOperands(const DeformableConv2DParams& params, DataType type,
                     const DeformableConv2DInputs& operands);

// Memory for the gradients, each shaped and typed like its operand and
// overwritten whole. Null: not wanted, not computed.
struct DeformableConv2DGradients {
  void* inputs = nullptr;
  void* kernel = nullptr;
  void* offset = nullptr;
  void* mask = nullptr;
};

// The op, from which glue is made; see op.h.
struct DeformableConv2D
    : OpTypes<DeformableConv2DParams, DeformableConv2DShapes,
              DeformableConv2DInputs, DeformableConv2DGradients> {
  static constexpr char kName[] = "DeformableConv2D";
  enum : int { kInputs, kKernel, kOffset, kMask };
  static constexpr Operand kOperands[] = {
      {"inputs", kValue, kRequired, &Shapes::inputs, &Inputs::inputs,
       &Gradients::inputs},
      {"kernel", kValue, kRequired, &Shapes::kernel, &Inputs::kernel,
       &Gradients::kernel},
      {"offset", kCoordinate, kRequired, &Shapes::offset, &Inputs::offset,
       &Gradients::offset},
      {"mask", kCoordinate, kOptional, &Shapes::mask, &Inputs::mask,
       &Gradients::mask},
  };

  static std::array<Dimension, 4> OutputShape(const Params& p) {
    return {{{p.batch, kInputs, 0},
             {p.out_h, kOffset, 1},
             {p.out_w, kOffset, 2},
             {p.filters, kKernel, 3}}};
  }
};

namespace cpu {

// Bytes of scratch that Forward needs: at most 4 MiB a worker, and never less
// for more workers. `params` validated.
int64_t WorkspaceBytes(const DeformableConv2DParams& params, DataType type,
                       int num_workers);

// Bytes of scratch that Backward needs for the gradients that are non-null in
// `wanted`, which also needs one packed copy of the kernel; for 16-bit types
// also the float32 image of one accumulated gradient (the kernel's, or one
// image of the inputs').
int64_t BackwardWorkspaceBytes(const DeformableConv2DParams& params,
                               DataType type,
                               const DeformableConv2DGradients& wanted,
                               int num_workers);

// Writes `output`. `workspace` is aligned to 64 bytes and as large as
// WorkspaceBytes(params, type, parallel_for.num_workers) says. The result does
// not depend on the number of workers, to the bit.
Status Forward(const DeformableConv2DParams& params, DataType type,
               const DeformableConv2DInputs& operands, void* workspace,
               void* output, const ParallelFor& parallel_for);

// Writes the wanted gradients of sum(grad_output * output). Nothing is read or
// computed for the others. Workspace and determinism as above.
Status Backward(const DeformableConv2DParams& params, DataType type,
                const DeformableConv2DInputs& operands, const void* grad_output,
                void* workspace, const DeformableConv2DGradients& gradients,
                const ParallelFor& parallel_for);

}  // namespace cpu

// The entry points on a GPU, only in a build with nvcc (TF_DEFORM_CUDA). Sums
// are made in float, in double for double. An error of the device, or a driver
// that is too old, is kInternal.
namespace cuda {

int64_t WorkspaceBytes(const DeformableConv2DParams& params, DataType type);

// At most 64 MiB; for 16-bit types also the float32 image of the inputs'
// gradient, of one image if that of all is larger.
int64_t BackwardWorkspaceBytes(const DeformableConv2DParams& params,
                               DataType type,
                               const DeformableConv2DGradients& wanted,
                               const CudaStream& stream);

// `workspace` is aligned to 256 bytes.
Status Forward(const DeformableConv2DParams& params, DataType type,
               const DeformableConv2DInputs& operands, void* workspace,
               void* output, const CudaStream& stream);

// The gradient of the inputs is summed in no fixed order unless
// stream.deterministic; all others always are.
Status Backward(const DeformableConv2DParams& params, DataType type,
                const DeformableConv2DInputs& operands, const void* grad_output,
                void* workspace, const DeformableConv2DGradients& gradients,
                const CudaStream& stream);

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_DEFORMABLE_CONV2D_H_

// SPDX-License-Identifier: Apache-2.0
// Computes deformable convolution on plain pointers, forward and backward.
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
//           See Modulation for an offset that holds more, without a mask.
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
// kClamp: a sample counts where 0 <= y < height and 0 <= x < width, and samples
// behind the last row and column read the last row and column.
enum class Boundary : int { kZeros = 0, kClamp = 1 };

// Tells where the factors of samples come from. kMask: the operand `mask`. In
// all other cases there is no operand `mask`, and the offset holds what a
// branch of a layer predicts, of offset_groups * kernel_h * kernel_w * 2 or 3
// channels: all displacements, and behind them [group][kh][kw] a number m for
// each sample (not for kNone). The factor is 1 (kNone), sigmoid(m) or
// 2 * sigmoid(m), and an output pixel is NaN, in all filters, if any of its
// predictions is NaN. The gradient of an m that is NaN is NaN.
enum class Modulation : int64_t {
  kMask = 0,
  kNone = 1,
  kSigmoid = 2,
  kTwoSigmoid = 3
};

// Holds the parameters of a call. The caller sets the first part; Validate
// checks it and fills the second part. The C entry points take the parameters
// as int64 numbers in this order.
struct DeformableConv2DParams {
  int64_t stride_h = 1, stride_w = 1;
  int64_t dilation_h = 1, dilation_w = 1;
  // The caller sets the padding for kExplicit, Validate for kValid and kSame.
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t offset_groups = 1;
  Padding padding = Padding::kValid;
  Boundary boundary = Boundary::kZeros;
  Modulation modulation = Modulation::kMask;

  // Validate sets these sizes; -1 if no shape tells the size.
  int64_t batch = -1, height = -1, width = -1, channels = -1;
  int64_t kernel_h = -1, kernel_w = -1, filters = -1, groups = -1;
  int64_t out_h = -1, out_w = -1;
};

// Holds the shapes of one call. `mask` and `grad_output` may be null.
struct DeformableConv2DShapes {
  const Shape* inputs = nullptr;
  const Shape* kernel = nullptr;
  const Shape* offset = nullptr;
  const Shape* mask = nullptr;
  const Shape* grad_output = nullptr;
};

// Checks attributes and shapes and fills `params`. Unknown ranks and dimensions
// fit. If all dimensions are known, ok means that every size and byte count
// below fits in int64_t.
TF_DEFORM_API Status Validate(const DeformableConv2DShapes& shapes,
                              DeformableConv2DParams* params);

// Holds the operands of the forward pass.
struct DeformableConv2DInputs {
  const void* inputs = nullptr;
  const void* kernel = nullptr;
  const void* offset = nullptr;
  const void* mask = nullptr;  // null: all ones
  // Memory for one packed copy of the kernel, aligned to 64 bytes: a caller
  // that keeps it from call to call saves the time in which fresh pages come
  // into being. Null: a part of the workspace. Used on the CPU alone.
  void* packed = nullptr;
};

// Checks the type, and that Validate filled `params` from shapes without
// unknown dimensions.
Status CheckOperands(const DeformableConv2DParams& params, DataType type,
                     const DeformableConv2DInputs& operands);

// Holds memory for the gradients. Each gradient has its operand's shape and
// type, and is overwritten as a whole. A gradient that is null is not computed.
struct DeformableConv2DGradients {
  void* inputs = nullptr;
  void* kernel = nullptr;
  void* offset = nullptr;
  void* mask = nullptr;
};

// Describes the op for the templates that make its glue; see op.h.
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

  static constexpr void* Inputs::* kPacked = &Inputs::packed;

  static std::array<Dimension, 4> OutputShape(const Params& p) {
    return {{{p.batch, kInputs, 0},
             {p.out_h, kOffset, 1},
             {p.out_w, kOffset, 2},
             {p.filters, kKernel, 3}}};
  }
};

namespace cpu {

// Returns the bytes of scratch memory that Forward needs: at most 4 MiB for
// each worker and one packed copy of the kernel, and never less for more
// workers. `params` must be validated.
TF_DEFORM_API int64_t WorkspaceBytes(const DeformableConv2DParams& params,
                                     DataType type, int num_workers);

// Returns the bytes of scratch memory that Backward needs for the gradients
// that are non-null in `wanted`. Backward also needs one packed copy of the
// kernel and, for 16-bit types, the float32 image of one gradient that is
// summed up (the kernel's, or the inputs' of one image).
TF_DEFORM_API int64_t BackwardWorkspaceBytes(
    const DeformableConv2DParams& params, DataType type,
    const DeformableConv2DGradients& wanted, int num_workers);

// Return the bytes of DeformableConv2DInputs::packed for Forward and Backward:
// at most one packed copy of the kernel. The workspace of a call with such
// memory may be smaller by as many bytes.
TF_DEFORM_API int64_t PackedBytes(const DeformableConv2DParams& params,
                                  DataType type);
TF_DEFORM_API int64_t
BackwardPackedBytes(const DeformableConv2DParams& params, DataType type,
                    const DeformableConv2DGradients& wanted);

// Writes `output`. `workspace` is aligned to 64 bytes and has
// WorkspaceBytes(params, type, parallel_for.num_workers) bytes. The result is
// the same to the bit for any number of workers.
TF_DEFORM_API Status Forward(const DeformableConv2DParams& params,
                             DataType type,
                             const DeformableConv2DInputs& operands,
                             void* workspace, void* output,
                             const ParallelFor& parallel_for);

// Writes the wanted gradients of sum(grad_output * output), and neither reads
// nor computes anything for other gradients. Workspace and determinism are as
// in Forward.
TF_DEFORM_API Status Backward(const DeformableConv2DParams& params,
                              DataType type,
                              const DeformableConv2DInputs& operands,
                              const void* grad_output, void* workspace,
                              const DeformableConv2DGradients& gradients,
                              const ParallelFor& parallel_for);

}  // namespace cpu

// Contains the entry points on a GPU, only in a build with nvcc
// (TF_DEFORM_CUDA). Sums are computed in float, for double in double. An error
// of the device, or a driver that is too old, is kInternal.
namespace cuda {

TF_DEFORM_API int64_t WorkspaceBytes(const DeformableConv2DParams& params,
                                     DataType type);

// Returns at most 64 MiB; for 16-bit types it adds the float32 image of the
// inputs' gradient, or of one image's gradient if all images need more than
// that.
TF_DEFORM_API int64_t BackwardWorkspaceBytes(
    const DeformableConv2DParams& params, DataType type,
    const DeformableConv2DGradients& wanted, const CudaStream& stream);

// Writes `output`. `workspace` is aligned to 256 bytes.
TF_DEFORM_API Status Forward(const DeformableConv2DParams& params,
                             DataType type,
                             const DeformableConv2DInputs& operands,
                             void* workspace, void* output,
                             const CudaStream& stream);

// Writes the wanted gradients. The gradient of the inputs is summed up in no
// fixed order unless stream.deterministic is set; all other gradients always
// have a fixed order.
TF_DEFORM_API Status Backward(const DeformableConv2DParams& params,
                              DataType type,
                              const DeformableConv2DInputs& operands,
                              const void* grad_output, void* workspace,
                              const DeformableConv2DGradients& gradients,
                              const CudaStream& stream);

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_DEFORMABLE_CONV2D_H_

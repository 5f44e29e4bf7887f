// SPDX-License-Identifier: Apache-2.0
// Finds the places where the taps of a deformable convolution read, on a GPU:
// the same as cpu/conv2d_sampling-inl.h, element by element.

#ifndef TF_DEFORM_CC_CORE_CUDA_CONV2D_SAMPLING_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_CONV2D_SAMPLING_INL_H_

#include <cmath>

#include "cc/core/cuda/device-inl.h"
#include "cc/core/deformable_conv2d.h"

namespace tf_deform {
namespace cuda {

// The parameters that kernels need and sizes derived from them, in elements.
struct Geometry {
  int64_t height, width, channels, filters, groups, offset_groups;
  int64_t kernel_w, out_w;
  int64_t stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int64_t taps;             // of the kernel
  int64_t group_channels;   // of one group of the convolution
  int64_t group_filters;    // of one group
  int64_t offset_channels;  // of one offset group
  int64_t fields;           // offset pairs (or masks) of one output pixel
  float most;               // factors are most * sigmoid(mask); if it is 0,
                            // they are the mask
  int64_t offset_step;      // from a pixel's first offset to the next pixel's
  int64_t mask_step;        // the same of masks
  int64_t row;              // elements of one row of an input image
  int64_t image;            // elements of one input image
  int64_t pixels;           // of one image's output
  int64_t total_pixels;     // of the batch's output
  bool clamp;               // the boundary

  explicit Geometry(const DeformableConv2DParams& p)
      : height(p.height),
        width(p.width),
        channels(p.channels),
        filters(p.filters),
        groups(p.groups),
        offset_groups(p.offset_groups),
        kernel_w(p.kernel_w),
        out_w(p.out_w),
        stride_h(p.stride_h),
        stride_w(p.stride_w),
        dilation_h(p.dilation_h),
        dilation_w(p.dilation_w),
        pad_top(p.pad_top),
        pad_left(p.pad_left),
        taps(p.kernel_h * p.kernel_w),
        group_channels(p.channels / p.groups),
        group_filters(p.filters / p.groups),
        offset_channels(p.channels / p.offset_groups),
        fields(p.offset_groups * p.kernel_h * p.kernel_w),
        most(p.modulation == Modulation::kSigmoid      ? 1.0f
             : p.modulation == Modulation::kTwoSigmoid ? 2.0f
                                                       : 0.0f),
        offset_step(most > 0 ? 3 * fields : 2 * fields),
        mask_step(most > 0 ? 3 * fields : fields),
        row(p.width * p.channels),
        image(p.height * p.width * p.channels),
        pixels(p.out_h * p.out_w),
        total_pixels(p.batch * p.out_h * p.out_w),
        clamp(p.boundary == Boundary::kClamp) {}
};

// Returns the quotient of numbers that are not negative. With I = uint32_t both
// must fit in 32 bits: a division of 64 bits takes a subroutine, which costs
// time and registers. Use uint64_t, with the subroutine, for numbers that do
// not fit.
template <typename I>
__host__ __device__ __forceinline__ int64_t Quotient(int64_t a, int64_t b) {
  if (sizeof(I) == 4 || (a | b) >> 32 == 0) {
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  }
  return a / b;
}

// An output pixel of the batch.
template <typename E>
struct Pixel {
  E y, x;         // input coordinates of tap (0, 0) at zero offset
  int64_t image;  // element of `inputs` where its image begins
  int64_t index;  // among the output pixels; negative: not a pixel

  template <typename I>
  __host__ __device__ static Pixel At(const Geometry& g, int64_t index) {
    if (index >= g.total_pixels) return {0, 0, 0, -1};
    const int64_t n = Quotient<I>(index, g.pixels);
    const int64_t in_image = index - n * g.pixels;
    const int64_t row = Quotient<I>(in_image, g.out_w);
    const int64_t column = in_image - row * g.out_w;
    return {static_cast<E>(row * g.stride_h - g.pad_top),
            static_cast<E>(column * g.stride_w - g.pad_left), n * g.image,
            index};
  }
};

// Corners of a sample that lie inside the image, and axes along which the edge
// is held (no derivative there). No flag at all: the sample lies outside and
// counts 0.
constexpr uint32_t kTopLeft = 1;
constexpr uint32_t kTopRight = 2;
constexpr uint32_t kBottomLeft = 4;
constexpr uint32_t kBottomRight = 8;
constexpr uint32_t kHeldY = 16;
constexpr uint32_t kHeldX = 32;

// Returns 1 / (1 + e^-x). In float the quotient comes without the subroutine of
// a division, which takes registers that the products need: a quotient that is
// off by a few units of the last place (0 of divisors beyond 2^126) and a step
// of Newton's method, after which Sigmoid(0) is exactly 0.5.
__device__ __forceinline__ float Sigmoid(float x) {
  const float divisor = 1 + expf(-x);
  const float near = __fdividef(1, divisor);
  const float nearer = fmaf(near, fmaf(-divisor, near, 1), near);
  return divisor < 8e37f ? nearer : near;
}
__device__ __forceinline__ double Sigmoid(double x) {
  return 1 / (1 + exp(-x));
}

// Returns the factor of a sample of this mask.
template <typename E>
__device__ __forceinline__ E Factor(const Geometry& g, E mask) {
  return g.most > 0 ? static_cast<E>(g.most) * Sigmoid(mask) : mask;
}

// Returns the derivative of a factor by its mask, where factors are sigmoids.
template <typename E>
__device__ __forceinline__ E FactorSlope(const Geometry& g, E mask) {
  const E sigmoid = Sigmoid(mask);
  return static_cast<E>(g.most) * sigmoid * (1 - sigmoid);
}

// An offset pair and its mask, as they are in memory.
template <typename E>
struct Displacement {
  E dy, dx, mask;

  // Reads pair `field` of a pixel; nothing where there is no pixel. `mask` may
  // be null, for 1.
  __host__ __device__ static Displacement Read(const Geometry& g,
                                               const Pixel<E>& pixel,
                                               int64_t field, const E* offset,
                                               const E* mask) {
    if (pixel.index < 0) return {0, 0, 0};
    const E* const pair = offset + pixel.index * g.offset_step + 2 * field;
    return {pair[0], pair[1],
            mask == nullptr ? 1 : mask[pixel.index * g.mask_step + field]};
  }
};

// The sample of one tap at one output pixel: its place and weights, which all
// channels of an offset group share.
template <typename E>
struct Sample {
  E ly, lx;  // distance from the top left corner, in [0, 1)
  E mask;    // the factor; 0 for a sample outside
  uint32_t flags;
  int64_t corner;  // element of the top left corner's channel 0 in `inputs`

  template <typename I>
  __device__ static Sample Locate(const Geometry& g, const Pixel<E>& pixel,
                                  int64_t tap, const Displacement<E>& d) {
    const int64_t kh = Quotient<I>(tap, g.kernel_w);
    const int64_t kw = tap - kh * g.kernel_w;
    const E y = pixel.y + static_cast<E>(kh * g.dilation_h) + d.dy;
    const E x = pixel.x + static_cast<E>(kw * g.dilation_w) + d.dx;
    // Written so that NaN lies outside.
    const bool counts = pixel.index >= 0 && (g.clamp ? y >= 0 : y > -1) &&
                        (g.clamp ? x >= 0 : x > -1) &&
                        y < static_cast<E>(g.height) &&
                        x < static_cast<E>(g.width);
    if (!counts) return {0, 0, 0, 0, 0};
    Sample s;
    s.flags = 0;
    // Not where the mask is read, which would wait for memory there.
    s.mask = Factor(g, d.mask);
    int32_t top, left;
    const bool held_y = Split(y, g.height, g.clamp, &top, &s.ly);
    const bool held_x = Split(x, g.width, g.clamp, &left, &s.lx);
    const bool has_top = top >= 0, has_bottom = top + 1 < g.height;
    const bool has_left = left >= 0, has_right = left + 1 < g.width;
    if (has_top && has_left) s.flags |= kTopLeft;
    if (has_top && has_right) s.flags |= kTopRight;
    if (has_bottom && has_left) s.flags |= kBottomLeft;
    if (has_bottom && has_right) s.flags |= kBottomRight;
    if (s.flags == 0) return {0, 0, 0, 0, 0};  // an image without pixels
    if (held_y) s.flags |= kHeldY;
    if (held_x) s.flags |= kHeldX;
    s.corner = pixel.image + (top * g.width + left) * g.channels;
    return s;
  }

 private:
  // Finds the pixel at or before a position, and the distance from that pixel.
  // Returns whether the edge is held there.
  __host__ __device__ static bool Split(E position, int64_t size, bool clamp,
                                        int32_t* pixel, E* distance) {
    int32_t at = static_cast<int32_t>(position);  // sizes are below 2^31
    if (position < static_cast<E>(at)) --at;
    const bool held = clamp && at >= size - 1;
    *pixel = at;
    *distance = held ? 0 : position - static_cast<E>(at);
    return held;
  }
};

// Bilinear weights of the four corners, and the number of elements from the
// first corner to each corner.
template <typename E>
struct Corners {
  E weights[4];
  int64_t steps[4];

  __host__ __device__ Corners(const Geometry& g, const Sample<E>& s)
      : weights{(1 - s.ly) * (1 - s.lx), (1 - s.ly) * s.lx, s.ly * (1 - s.lx),
                s.ly * s.lx},
        steps{0, g.channels, g.row, g.row + g.channels} {}
};

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_CONV2D_SAMPLING_INL_H_

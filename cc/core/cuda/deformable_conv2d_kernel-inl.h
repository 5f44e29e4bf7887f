// SPDX-License-Identifier: Apache-2.0
// Computes the gradient of the kernel of a deformable convolution on a GPU.

#ifndef TF_DEFORM_CC_CORE_CUDA_DEFORMABLE_CONV2D_KERNEL_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_DEFORMABLE_CONV2D_KERNEL_INL_H_

#include "cc/core/cuda/conv2d_columns-inl.h"
#include "cc/core/cuda/deformable_conv2d_data-inl.h"

namespace tf_deform {
namespace cuda {

constexpr int kKernelChannels = 128;  // rows of a block's sums

// The division of the output pixels into parts, whose shares of the gradient
// are summed in order afterwards. It depends on shapes alone, and so do the
// sums.
struct KernelParts {
  int64_t pixels;  // of a part, a multiple of 32
  int64_t count;

  // `blocks` blocks work on a part. A single part needs no sum afterwards.
  KernelParts(const Geometry& g, int64_t blocks, int64_t element_bytes) {
    // At most two rounds of the largest GPUs, which work on 132 blocks at once.
    constexpr int64_t kBlocks = 264;
    constexpr int64_t kLeast = 512;  // pixels
    constexpr int64_t kWorkspace = int64_t{64} << 20;
    const int64_t bytes = g.taps * g.group_channels * g.filters * element_bytes;
    const int64_t parts = Min(Min(kBlocks / blocks, kWorkspace / bytes),
                              CeilDiv(g.total_pixels, kLeast));
    pixels = RoundUp(CeilDiv(g.total_pixels, Max(1, parts)), 32);
    count = CeilDiv(g.total_pixels, pixels);
  }

  int64_t WorkspaceBytes(const Geometry& g, int64_t element_bytes) const {
    return count == 1
               ? 0
               : count * g.taps * g.group_channels * g.filters * element_bytes;
  }
};

// Returns the number of pieces of all channels. Each piece belongs to one group
// and one offset group.
__host__ __device__ inline int64_t CountChannelPieces(const Geometry& g) {
  int64_t pieces = 0;
  for (int64_t c = 0; c < g.channels; ++pieces) {
    c += ChannelPiece::At<uint32_t>(g, c, g.channels, kKernelChannels).count;
  }
  return pieces;
}

// A step of the gradient of the kernel: the next pixels, the same tap and
// channels.
template <typename T, typename Sums>
struct KernelCursor {
  const Geometry* g;
  const T* grad_output;  // at the block's first filter
  int64_t pixel, end;    // output pixels
  int in_plan;           // the step's first pixel, in the plan
  int tap, field, channel, count;
  int64_t filters;  // of the block
  bool packed;

  __device__ bool Done() const { return pixel >= end; }
  static constexpr int kPlan = Sums::kThreads;
  static constexpr bool kKeepsRows = false;
  __device__ void Next() {
    pixel += kInner<T>;
    in_plan = (in_plan + kInner<T>) % kPlan;
  }
  __device__ bool IsNewPlan() const { return in_plan == 0; }
  __device__ int PlanRow() const { return in_plan; }
  __device__ Pixel<float> PixelOf(int i) const {
    if (pixel - in_plan + i >= end) return {0, 0, 0, -1};
    return Pixel<float>::At<uint32_t>(*g, pixel - in_plan + i);
  }
  __device__ void CopyOther(T* to) const {
    CopyPanel<typename Sums::B, Sums::kThreads>(
        grad_output + pixel * g->filters, g->filters, end - pixel, filters,
        packed, to);
  }
};

// A block makes the sums of kKernelChannels channels of one tap and kN filters
// over a part of the pixels, the inner dimension. `parts` has room for the sums
// of every part, [part][tap][channel][filter]; null: the sums of the only part
// are written to `gradient`.
template <typename T, bool kTf32, int kN>
using KernelSums = Product<T, kTf32, kKernelChannels, kN, false, false, true>;
template <typename T, bool kTf32, int kN>
using KernelBuffers = ColumnBuffers<T, KernelSums<T, kTf32, kN>,
                                    KernelSums<T, kTf32, kN>::kThreads>;

template <typename T, bool kTf32, int kN>
__global__ void __launch_bounds__(KernelSums<T, kTf32, kN>::kThreads)
    KernelGradientKernel(const Geometry g, const Operands<T> in,
                         const T* grad_output, const KernelParts work,
                         int64_t pieces, float* parts, T* gradient) {
  using Sums = KernelSums<T, kTf32, kN>;
  auto* const shared =
      reinterpret_cast<KernelBuffers<T, kTf32, kN>*>(SharedMemory());
  int64_t rest = blockIdx.x;
  const auto take = [&rest](int64_t size) {
    const int64_t quotient = Quotient<uint32_t>(rest, size);
    const int64_t remainder = rest - quotient * size;
    rest = quotient;
    return remainder;
  };
  const int64_t filter = take(CeilDiv(g.group_filters, kN)) * kN;
  const int64_t tap = take(g.taps);
  int64_t skip = take(pieces);
  const int64_t part = rest;
  ChannelPiece piece =
      ChannelPiece::At<uint32_t>(g, 0, g.channels, kKernelChannels);
  for (; skip > 0; --skip) {
    piece = ChannelPiece::At<uint32_t>(g, piece.channel + piece.count,
                                       g.channels, kKernelChannels);
  }
  const int64_t group = Quotient<uint32_t>(piece.channel, g.group_channels);
  const int64_t first_filter = group * g.group_filters + filter;

  KernelCursor<T, Sums> at;
  at.g = &g;
  at.grad_output = grad_output + first_filter;
  at.pixel = part * work.pixels;
  at.end = Min(at.pixel + work.pixels, g.total_pixels);
  at.in_plan = 0;
  at.tap = static_cast<int>(tap);
  at.field = static_cast<int>(
      Quotient<uint32_t>(piece.channel, g.offset_channels) * g.taps + tap);
  at.channel = static_cast<int>(piece.channel);
  at.count = static_cast<int>(piece.count);
  at.filters = Min(kN, g.group_filters - filter);
  at.packed = in.packed_filters;
  Sums sums;
  sums.Clear();
  MultiplyColumns(g, in, at, shared, &sums);

  const int64_t first_row =
      tap * g.group_channels + piece.channel - group * g.group_channels;
  const int64_t kernel = g.taps * g.group_channels * g.filters;
  sums.ForEachPair([&](int row, int column, int next, float a, float b) {
    if (row >= piece.count) return;
    const int64_t to = (first_row + row) * g.filters + first_filter;
    const auto write = [&](int f, float sum) {
      if (f >= at.filters) return;
      if (parts != nullptr) {
        parts[part * kernel + to + f] = sum;
      } else {
        Narrow(sum, gradient + to + f);
      }
    };
    write(column, a);
    write(next, b);
  });
}

// Does the same without a matrix product: a thread computes one element of a
// part.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    DirectKernelGradientKernel(const Geometry g, const Operands<T> in,
                               const T* grad_output, const KernelParts work,
                               Accumulator<T>* parts, T* gradient) {
  using E = Accumulator<T>;
  const int64_t kernel = g.taps * g.group_channels * g.filters;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t part = Quotient<uint64_t>(index, kernel);
  if (part >= work.count) return;
  const int64_t element = index - part * kernel;
  const int64_t row = Quotient<uint64_t>(element, g.filters);
  const int64_t f = element - row * g.filters;
  const int64_t tap = Quotient<uint64_t>(row, g.group_channels);
  const int64_t channel =
      row - tap * g.group_channels +
      Quotient<uint64_t>(f, g.group_filters) * g.group_channels;
  const int64_t field =
      Quotient<uint64_t>(channel, g.offset_channels) * g.taps + tap;
  const int64_t end = Min((part + 1) * work.pixels, g.total_pixels);
  E sum = 0;
  for (int64_t p = part * work.pixels; p < end; ++p) {
    const Pixel<E> pixel = Pixel<E>::template At<uint64_t>(g, p);
    const Sample<E> s = Sample<E>::template Locate<uint64_t>(
        g, pixel, tap,
        Displacement<E>::Read(g, pixel, field, in.offset, in.mask));
    sum += ColumnAt(g, in, s, channel) * Widen(grad_output[p * g.filters + f]);
  }
  if (parts != nullptr) {
    parts[index] = sum;
  } else {
    Narrow(sum, gradient + index);
  }
}

// Writes the sums of all parts, in order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    SumPartsKernel(const Accumulator<T>* parts, int64_t count, int64_t elements,
                   T* gradient) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= elements) return;
  Accumulator<T> sum = 0;
  for (int64_t part = 0; part < count; ++part) {
    sum += parts[part * elements + i];
  }
  Narrow(sum, gradient + i);
}

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_DEFORMABLE_CONV2D_KERNEL_INL_H_

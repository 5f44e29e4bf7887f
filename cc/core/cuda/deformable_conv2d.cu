// SPDX-License-Identifier: Apache-2.0
// Runs deformable convolution on a GPU: divides the work and chooses kernels.
//
// The convolution is a matrix product of columns (a row for every output pixel;
// an entry for every tap and channel: the sample there times its mask) and the
// kernel, as on the CPU (cpu/deformable_conv2d-inl.h). The columns are never in
// device memory.
//
//   Sample        The place where one tap reads at one pixel, worked out once
//                 and shared by all channels of an offset group
//                 (conv2d_sampling-inl.h).
//   columns       A panel of pixels by channels of one tap: four loads of 16
//                 bytes a pack of channels, mixed in registers, written to
//                 shared memory while the panel before is multiplied
//                 (conv2d_columns-inl.h).
//   Product       Panels in shared memory, sums in registers, on the tensor
//                 cores or (float without tf32) in multiply-adds
//                 (matrix-inl.h).
//
//   ForwardKernel A block makes 128 pixels by up to 256 filters.
//   HandOnNanKernel
//                 Makes outputs NaN whose predictions are (see Modulation).
//   DataKernel    A block makes the gradient of the columns of 128 pixels and
//                 one tap, some channels at a time, and passes it on: with
//                 atomic additions to the gradient of the inputs, summed over
//                 channels to those of offset and mask. If the order must
//                 always be the same, the columns' gradients go to memory, some
//                 pixels at a time, and OrderedAdditionKernel adds them
//                 (deformable_conv2d_data-inl.h).
//   KernelGradientKernel
//                 Like ForwardKernel, with the pixels as inner dimension,
//                 divided into parts (deformable_conv2d_kernel-inl.h).
//
// Direct...Kernel do the same without a matrix product: for double, and for
// groups so small that products would be mostly zeros (depthwise). They are
// also the plain version with which the other kernels are compared in tests.

#include <type_traits>

#include "cc/core/checks.h"
#include "cc/core/cuda/conv2d_columns-inl.h"
#include "cc/core/cuda/deformable_conv2d_data-inl.h"
#include "cc/core/cuda/deformable_conv2d_kernel-inl.h"

namespace tf_deform {
namespace cuda {
// It has a name, as nvcc writes the folder of the sources into the names of
// nameless ones: the same sources make the same bytes anywhere.
namespace deformable_conv2d_cu {

constexpr int kForwardPixels = 128;  // of a block

// A step of the forward pass: a tap and channels of the block's group. Its
// integers have 32 bits (see IsDirect).
template <typename T, typename Sums>
struct ForwardCursor {
  const Geometry* g;
  const Pixel<float>* pixels;  // of the block
  const T* panel;              // the step's rows, at the block's first filter
  int filters;                 // of the block
  bool packed;
  int taps, offset_channels;
  int first_channel, end_channel;  // of the group
  int tap, offset_group, channel, count;
  int run_end;  // of the channels that share an offset group
  bool is_new;  // the step has the first of these channels
  int field;

  // Moves to the channels of an offset group, inside the group.
  __device__ void Enter(int to_tap, int to_offset_group, int to_channel) {
    tap = to_tap;
    offset_group = to_offset_group;
    channel = to_channel;
    is_new = true;
    field = offset_group * taps + tap;
    run_end = static_cast<int>(
        Min((offset_group + 1) * offset_channels, end_channel));
    count = Count();
  }
  __device__ int Count() const {
    return run_end - channel < kInner<T> ? run_end - channel : kInner<T>;
  }

  static constexpr int kPlan = kForwardPixels;
  static constexpr bool kKeepsRows = true;
  __device__ int PlanRow() const { return 0; }
  __device__ bool Done() const { return tap == taps; }
  __device__ void Next() {
    if (Done()) return;
    panel += count * g->filters;
    channel += count;
    if (channel < run_end) {
      is_new = false;
      count = Count();
    } else if (channel < end_channel) {
      Enter(tap, offset_group + 1, channel);
    } else if (tap + 1 < taps) {
      Enter(tap + 1, first_channel / offset_channels, first_channel);
    } else {
      tap = taps;
    }
  }
  __device__ bool IsNewPlan() const { return is_new; }
  __device__ const Pixel<float>& PixelOf(int row) const { return pixels[row]; }
  __device__ void CopyOther(T* to) const {
    CopyPanel<typename Sums::B, Sums::kThreads>(
        panel, static_cast<int>(g->filters), count, filters, packed, to);
  }
};

template <typename T, typename Sums>
struct ForwardBuffers {
  ColumnBuffers<T, Sums, kForwardPixels> columns;
  Pixel<float> pixels[kForwardPixels];
};

// Stores two neighbouring elements, at once if `aligned`.
template <typename T>
__device__ __forceinline__ void StorePair(float first, float second,
                                          bool aligned, int64_t count, T* to) {
  if constexpr (Word<T>::kCount == 2) {
    if (aligned && count >= 2) {
      *reinterpret_cast<uint32_t*>(to) = Word<T>::Of(first, second);
      return;
    }
  }
  if (count >= 1) Narrow(first, to);
  if (count >= 2) Narrow(second, to + 1);
}

template <typename T, bool kTf32, int kN>
using ForwardSums = Product<T, kTf32, kForwardPixels, kN, true, false, true>;

template <typename T, bool kTf32, int kN>
__global__ void __launch_bounds__(ForwardSums<T, kTf32, kN>::kThreads)
    ForwardKernel(const Geometry g, const Operands<T> in, bool pairs,
                  T* output) {
  using Sums = ForwardSums<T, kTf32, kN>;
  auto* const shared =
      reinterpret_cast<ForwardBuffers<T, Sums>*>(SharedMemory());
  const int64_t filter_blocks = CeilDiv(g.group_filters, kN);
  const int64_t in_tile = Quotient<uint32_t>(blockIdx.x, filter_blocks);
  const int64_t filter = (blockIdx.x - in_tile * filter_blocks) * kN;
  const int64_t tile = Quotient<uint32_t>(in_tile, g.groups);
  const int64_t first = tile * kForwardPixels;

  ForwardCursor<T, Sums> at;
  at.g = &g;
  at.pixels = shared->pixels;
  const int64_t group = in_tile - tile * g.groups;
  const int64_t first_filter = group * g.group_filters + filter;
  at.panel = in.kernel + first_filter;
  at.filters = static_cast<int>(Min(kN, g.group_filters - filter));
  at.packed = in.packed_filters;
  at.taps = static_cast<int>(g.taps);
  at.offset_channels = static_cast<int>(g.offset_channels);
  at.first_channel = static_cast<int>(group * g.group_channels);
  at.end_channel = at.first_channel + static_cast<int>(g.group_channels);
  at.Enter(0, at.first_channel / at.offset_channels, at.first_channel);
  // Each pixel is read by the thread that writes the pixel.
  if (threadIdx.x < kForwardPixels) {
    shared->pixels[threadIdx.x] =
        Pixel<float>::At<uint32_t>(g, first + threadIdx.x);
  }
  Sums sums;
  sums.Clear();
  MultiplyColumns(g, in, at, &shared->columns, &sums);

  sums.ForEachPair([&](int row, int column, int next, float a, float b) {
    if (first + row >= g.total_pixels) return;
    T* const to = output + (first + row) * g.filters + first_filter;
    const int64_t filters = at.filters;
    if (next == column + 1) {
      StorePair(a, b, pairs, filters - column, to + column);
    } else {
      if (column < filters) Narrow(a, to + column);
      if (next < filters) Narrow(b, to + next);
    }
  });
}

// Each thread computes one element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    DirectForwardKernel(const Geometry g, const Operands<T> in, T* output) {
  using E = Accumulator<T>;
  const int64_t index =
      static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t p = Quotient<uint64_t>(index, g.filters);
  if (p >= g.total_pixels) return;
  const int64_t f = index - p * g.filters;
  const int64_t first =
      Quotient<uint64_t>(f, g.group_filters) * g.group_channels;
  const Pixel<E> pixel = Pixel<E>::template At<uint64_t>(g, p);
  E sum = 0;
  for (int64_t tap = 0; tap < g.taps; ++tap) {
    int64_t field = -1;
    Sample<E> s;
    for (int64_t i = 0; i < g.group_channels; ++i) {
      const int64_t channel = first + i;
      const int64_t of_channel =
          Quotient<uint64_t>(channel, g.offset_channels) * g.taps + tap;
      if (of_channel != field) {
        field = of_channel;
        s = Sample<E>::template Locate<uint64_t>(
            g, pixel, tap,
            Displacement<E>::Read(g, pixel, field, in.offset, in.mask));
      }
      sum += ColumnAt(g, in, s, channel) *
             Widen(in.kernel[(tap * g.group_channels + i) * g.filters + f]);
    }
  }
  Narrow(sum, output + index);
}

// Overwrites the outputs of pixels with NaN among their predictions. Warps
// search all predictions as one row of numbers, so that they read neighbours;
// only what they find is divided by the numbers of a pixel.
constexpr int kSearched = 8;  // numbers of a thread

template <typename T>
__global__ void __launch_bounds__(kThreads)
    HandOnNanKernel(const Geometry g, const Accumulator<T>* offset, T* output) {
  using E = Accumulator<T>;
  const int lane = threadIdx.x % 32;
  const int64_t count = g.total_pixels * g.offset_step;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * (kThreads * kSearched) + threadIdx.x;
  E numbers[kSearched];
#pragma unroll
  for (int j = 0; j < kSearched; ++j) {
    const int64_t i = first + j * kThreads;
    numbers[j] = i < count ? offset[i] : 0;
  }
#pragma unroll
  for (int j = 0; j < kSearched; ++j) {
    unsigned found = __ballot_sync(0xffffffffu, numbers[j] != numbers[j]);
    for (; found != 0; found &= found - 1) {
      const int64_t i = first - lane + j * kThreads + __ffs(found) - 1;
      T* const to = output + Quotient<uint64_t>(i, g.offset_step) * g.filters;
      for (int64_t f = lane; f < g.filters; f += 32) {
        Narrow(static_cast<E>(NAN), to + f);
      }
    }
  }
}

// -----------------------------------------------------------------------------
// The choice of kernels for a call.

constexpr int64_t kWorkspace = int64_t{64} << 20;

// Returns whether the call is made without products. Products need a few
// channels and filters in a group, and count pixels, channels, filters and
// fields of a pixel, and the elements of a panel (128 rows of filters at most)
// in 32 bits.
template <typename T>
bool IsDirect(const Geometry& g) {
  constexpr int64_t kMost = 0x7fffffff;
  return sizeof(T) == 8 ||
         (g.groups > 1 && (g.group_channels < 4 || g.group_filters < 8)) ||
         g.channels > kMost || g.filters > kMost / 128 || g.fields > kMost ||
         g.total_pixels > kMost;
}

// Calls body(tf32), a compile-time constant: whether `stream` allows tf32.
template <typename T, typename Body>
Status WithTf32(const CudaStream& stream, const Body& body) {
  if constexpr (sizeof(T) == 4) {
    if (stream.allow_tf32) return body(std::true_type());
  }
  return body(std::false_type());
}

// Calls body(N) for the filters of a block: 64, 128, or for 16-bit types 256,
// which samples half as often as 128 and so takes about 1.25 times as long (by
// instructions), not twice. There are `tiles` blocks for each N filters; the
// largest GPUs work on 132 at once.
template <int kValue>
using Int = std::integral_constant<int, kValue>;
template <typename T, typename Body>
Status WithFilters(int64_t filters, int64_t tiles, const Body& body) {
  const auto rounds = [=](int64_t n) {
    return CeilDiv(tiles * CeilDiv(filters, n), 132);
  };
  if (filters <= 64) return body(Int<64>());
  if constexpr (sizeof(T) == 2) {
    if (filters > 128 && 5 * rounds(256) <= 4 * rounds(128)) {
      return body(Int<256>());
    }
  }
  return body(Int<128>());
}

template <typename T>
Status ProductOf(const Geometry& g, const Operands<T>& in, T* to,
                 const CudaStream& stream) {
  if (IsDirect<T>(g)) {
    return Launch("DirectForwardKernel", DirectForwardKernel<T>,
                  CeilDiv(g.total_pixels * g.filters, kThreads), kThreads, 0,
                  stream, g, in, to);
  }
  if constexpr (sizeof(T) <= 4) {
    const int64_t tiles = CeilDiv(g.total_pixels, kForwardPixels) * g.groups;
    const bool pairs = IsAligned(to, 2 * sizeof(T)) && g.group_filters % 2 == 0;
    return WithTf32<T>(stream, [&](auto tf32) {
      return WithFilters<T>(g.group_filters, tiles, [&](auto filters) {
        constexpr int kN = decltype(filters)::value;
        constexpr bool kTf32 = decltype(tf32)::value;
        using Sums = ForwardSums<T, kTf32, kN>;
        return Launch("ForwardKernel", ForwardKernel<T, kTf32, kN>,
                      tiles * CeilDiv(g.group_filters, kN), Sums::kThreads,
                      sizeof(ForwardBuffers<T, Sums>), stream, g, in, pairs,
                      to);
      });
    });
  }
  return Status();
}

template <typename T>
Status ForwardOf(const DeformableConv2DParams& params,
                 const DeformableConv2DInputs& operands, void* output,
                 const CudaStream& stream) {
  const Geometry g(params);
  if (g.total_pixels == 0) return Status();
  const Operands<T> in(g, operands, nullptr, nullptr);
  T* const to = static_cast<T*>(output);
  TF_DEFORM_RETURN_IF_ERROR(ProductOf(g, in, to, stream));
  if (params.modulation == Modulation::kMask) return Status();
  return Launch("HandOnNanKernel", HandOnNanKernel<T>,
                CeilDiv(g.total_pixels * g.offset_step, kThreads * kSearched),
                kThreads, 0, stream, g, in.offset, to);
}

// The workspace for the gradients of inputs, offset and mask: it holds the
// gradient of some images in float, if T is narrower, and then the columns of
// some pixels, if their order matters.
template <typename T>
struct DataPlan {
  int64_t images = 0;        // at a time
  int64_t image_bytes = 0;   // of all these images
  int64_t pixels = 0;        // at a time
  int64_t column_bytes = 0;  // of all these pixels

  DataPlan(const DeformableConv2DParams& params, const Geometry& g,
           bool wants_inputs, const CudaStream& stream)
      : images(params.batch), pixels(g.total_pixels) {
    using E = Accumulator<T>;
    if (!wants_inputs) return;
    if (sizeof(T) < sizeof(E)) {
      const int64_t bytes = g.image * static_cast<int64_t>(sizeof(E));
      images = Min(images, Max(1, kWorkspace / Max(1, bytes)));
      image_bytes = RoundUp(images * bytes, 256);
    }
    if (stream.deterministic) {
      const int64_t bytes =
          g.taps * g.channels * static_cast<int64_t>(sizeof(E));
      pixels = Max(1, kWorkspace / bytes);
      if (pixels > kDataPixels) pixels = pixels / kDataPixels * kDataPixels;
      pixels = Min(pixels, images * g.pixels);
      column_bytes = pixels * bytes;
    }
  }
};

template <typename T>
Status DataOf(const DeformableConv2DParams& params, const Geometry& g,
              const Operands<T>& in, const T* grad_output, void* workspace,
              const DeformableConv2DGradients& gradients,
              const CudaStream& stream) {
  using E = Accumulator<T>;
  const bool wants_inputs = gradients.inputs != nullptr;
  const DataPlan<T> plan(params, g, wants_inputs, stream);
  E* image = static_cast<E*>(gradients.inputs);
  char* const columns = static_cast<char*>(workspace) + plan.image_bytes;
  const bool narrows = wants_inputs && sizeof(T) < sizeof(E);
  if (narrows) image = static_cast<E*>(workspace);

  for (int64_t n = 0; n < params.batch; n += plan.images) {
    const int64_t images = Min(plan.images, params.batch - n);
    const int64_t end = (n + images) * g.pixels;
    if (wants_inputs) {
      TF_DEFORM_RETURN_IF_ERROR(Clear(
          image, images * g.image * static_cast<int64_t>(sizeof(E)), stream));
    }
    for (int64_t first = n * g.pixels; first < end; first += plan.pixels) {
      DataGradients<E> out;
      out.first = first;
      out.end = Min(first + plan.pixels, end);
      out.origin = n * g.image;
      const bool ordered = plan.column_bytes > 0;
      out.inputs = ordered || !wants_inputs ? nullptr : image;
      out.columns = ordered ? reinterpret_cast<E*>(columns) : nullptr;
      out.offset = static_cast<E*>(gradients.offset);
      out.mask = static_cast<E*>(gradients.mask);
      if (g.most > 0 && out.offset != nullptr) {
        out.mask = out.offset + 2 * g.fields;
      }
      const int64_t count = out.end - first;
      if (IsDirect<T>(g)) {
        TF_DEFORM_RETURN_IF_ERROR(
            Launch("DirectDataKernel", DirectDataKernel<T>,
                   CeilDiv(count * g.fields, kThreads / 32), kThreads, 0,
                   stream, g, in, grad_output, out));
      } else if constexpr (sizeof(T) <= 4) {
        TF_DEFORM_RETURN_IF_ERROR(WithTf32<T>(stream, [&](auto tf32) {
          constexpr bool kTf32 = decltype(tf32)::value;
          return Launch("DataKernel", DataKernel<T, kTf32>,
                        CeilDiv(count, kDataPixels) * g.fields,
                        DataBuffers<T, kTf32>::Sums::kThreads,
                        sizeof(DataBuffers<T, kTf32>), stream, g, in,
                        grad_output, out);
        }));
      }
      if (!ordered) continue;
      OrderedAddition<E> work;
      work.columns = out.columns;
      work.inputs = image;
      work.first_image = n;
      work.images = images;
      work.first = first;
      work.end = out.end;
      work.slabs = CeilDiv(g.offset_channels, kOrderedThreads);
      // The number of blocks suffices for the largest GPUs, and does not affect
      // the sums.
      work.strips =
          Max(1, Min(g.height, 1024 / (images * g.offset_groups * work.slabs)));
      TF_DEFORM_RETURN_IF_ERROR(Launch(
          "OrderedAdditionKernel", OrderedAdditionKernel<E>, work.Blocks(g),
          kOrderedThreads, 0, stream, g, in.offset, in.mask, work));
    }
    if constexpr (sizeof(T) < sizeof(E)) {
      if (narrows) {
        TF_DEFORM_RETURN_IF_ERROR(
            Launch("NarrowKernel", NarrowKernel<T>,
                   CeilDiv(images * g.image, kThreads * kNarrowed), kThreads, 0,
                   stream, image, images * g.image,
                   static_cast<T*>(gradients.inputs) + n * g.image));
      }
    }
  }
  return Status();
}

// Calls body(parts, blocks, N) with the division of the gradient of the kernel;
// N is the number of filters of a block, 0 without a matrix product.
template <typename T, typename Body>
Status WithKernelParts(const Geometry& g, const Body& body) {
  const int64_t elements = g.taps * g.group_channels * g.filters;
  if (IsDirect<T>(g)) {
    const int64_t blocks = CeilDiv(elements, kThreads);
    const KernelParts parts(g, blocks, sizeof(Accumulator<T>));
    return body(parts, CeilDiv(elements * parts.count, kThreads), Int<0>());
  }
  const int64_t pieces = CountChannelPieces(g) * g.taps;
  return WithFilters<T>(g.group_filters, 1 << 20, [&](auto filters) {
    const int64_t blocks =
        pieces * CeilDiv(g.group_filters, decltype(filters)::value);
    const KernelParts parts(g, blocks, sizeof(Accumulator<T>));
    return body(parts, blocks * parts.count, filters);
  });
}

template <typename T>
Status KernelOf(const Geometry& g, const Operands<T>& in, const T* grad_output,
                void* workspace, void* gradient, const CudaStream& stream) {
  using E = Accumulator<T>;
  T* const to = static_cast<T*>(gradient);
  return WithKernelParts<T>(
      g, [&](const KernelParts& work, int64_t blocks, auto filters) -> Status {
        constexpr int kN = decltype(filters)::value;
        E* const parts = work.count > 1 ? static_cast<E*>(workspace) : nullptr;
        if constexpr (kN == 0) {
          TF_DEFORM_RETURN_IF_ERROR(Launch("DirectKernelGradientKernel",
                                           DirectKernelGradientKernel<T>,
                                           blocks, kThreads, 0, stream, g, in,
                                           grad_output, work, parts, to));
        } else if constexpr (sizeof(T) <= 4) {
          TF_DEFORM_RETURN_IF_ERROR(WithTf32<T>(stream, [&](auto tf32) {
            constexpr bool kTf32 = decltype(tf32)::value;
            using Sums = KernelSums<T, kTf32, kN>;
            return Launch("KernelGradientKernel",
                          KernelGradientKernel<T, kTf32, kN>, blocks,
                          Sums::kThreads, sizeof(KernelBuffers<T, kTf32, kN>),
                          stream, g, in, grad_output, work,
                          CountChannelPieces(g), parts, to);
          }));
        }
        if (work.count == 1) return Status();
        const int64_t elements = g.taps * g.group_channels * g.filters;
        return Launch("SumPartsKernel", SumPartsKernel<T>,
                      CeilDiv(elements, kThreads), kThreads, 0, stream, parts,
                      work.count, elements, to);
      });
}

}  // namespace deformable_conv2d_cu

using namespace deformable_conv2d_cu;

int64_t WorkspaceBytes(const DeformableConv2DParams&, DataType) { return 0; }

int64_t BackwardWorkspaceBytes(const DeformableConv2DParams& params,
                               DataType type,
                               const DeformableConv2DGradients& wanted,
                               const CudaStream& stream) {
  int64_t bytes = 0;
  const Geometry g(params);
  if (g.total_pixels == 0) return 0;
  const Status status = WithType(type, [&](auto zero) {
    using T = decltype(zero);
    const DataPlan<T> plan(params, g, wanted.inputs != nullptr, stream);
    bytes = plan.image_bytes + plan.column_bytes;
    if (wanted.kernel == nullptr) return Status();
    return WithKernelParts<T>(g, [&](const KernelParts& parts, int64_t, auto) {
      bytes = Max(bytes, parts.WorkspaceBytes(g, sizeof(Accumulator<T>)));
      return Status();
    });
  });
  return status.ok() ? bytes : 0;
}

Status Forward(const DeformableConv2DParams& params, DataType type,
               const DeformableConv2DInputs& operands, void*, void* output,
               const CudaStream& stream) {
  TF_DEFORM_RETURN_IF_ERROR(CheckOperands(params, type, operands));
  TF_DEFORM_RETURN_IF_ERROR(CheckDriver());
  return WithType(type, [&](auto zero) {
    return ForwardOf<decltype(zero)>(params, operands, output, stream);
  });
}

Status Backward(const DeformableConv2DParams& params, DataType type,
                const DeformableConv2DInputs& operands, const void* grad_output,
                void* workspace, const DeformableConv2DGradients& gradients,
                const CudaStream& stream) {
  TF_DEFORM_RETURN_IF_ERROR(CheckOperands(params, type, operands));
  TF_DEFORM_RETURN_IF_ERROR(CheckDriver());
  const Geometry g(params);
  return WithType(type, [&](auto zero) {
    using T = decltype(zero);
    const T* const gradient = static_cast<const T*>(grad_output);
    const Operands<T> in(g, operands, grad_output, gradients.inputs);
    if (g.total_pixels == 0) {
      if (gradients.inputs != nullptr) {
        TF_DEFORM_RETURN_IF_ERROR(Clear(
            gradients.inputs,
            params.batch * g.image * static_cast<int64_t>(sizeof(T)), stream));
      }
      if (gradients.kernel == nullptr) return Status();
      return Clear(gradients.kernel,
                   g.taps * g.group_channels * g.filters *
                       static_cast<int64_t>(sizeof(T)),
                   stream);
    }
    if (gradients.inputs != nullptr || gradients.offset != nullptr ||
        gradients.mask != nullptr) {
      TF_DEFORM_RETURN_IF_ERROR(
          DataOf<T>(params, g, in, gradient, workspace, gradients, stream));
    }
    if (gradients.kernel == nullptr) return Status();
    return KernelOf<T>(g, in, gradient, workspace, gradients.kernel, stream);
  });
}

}  // namespace cuda
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Computes the gradients of inputs, offset and mask of a deformable convolution
// on a GPU.

#ifndef TF_DEFORM_CC_CORE_CUDA_DEFORMABLE_CONV2D_DATA_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_DEFORMABLE_CONV2D_DATA_INL_H_

#include "cc/core/cuda/conv2d_columns-inl.h"

namespace tf_deform {
namespace cuda {

// The gradients to compute. Null: not wanted.
template <typename E>
struct DataGradients {
  E* inputs;       // of some images; added to
  E* columns;      // instead: gradients of the columns, [pixel][tap][channel],
                   // from `first` on
  E* offset;       // written
  E* mask;         // written
  int64_t origin;  // elements of all inputs before the first of these images
  int64_t first, end;  // output pixels
};

// Sums over the channels of one sample.
template <typename E>
struct SampleSums {
  E mask, y, x;  // y and x: derivatives by the coordinates, without the mask

  __device__ __forceinline__ void OfWarp() {
    mask = SumOfWarp(mask);
    y = SumOfWarp(y);
    x = SumOfWarp(x);
  }
};

// Passes on the gradients `column` of the columns of a lane's four channels at
// sample s: adds to the gradient of the inputs and to the lane's `sums`. The
// channels are neighbours if `packed`, else 32 apart. `at` is output pixel *
// taps + tap, from out.first on.
template <typename T>
__device__ __forceinline__ void PassOn(const Geometry& g, const Operands<T>& in,
                                       const DataGradients<Accumulator<T>>& out,
                                       const Sample<Accumulator<T>>& s,
                                       int64_t at, int64_t channel,
                                       int64_t count, bool packed,
                                       const Accumulator<T> (&column)[4],
                                       SampleSums<Accumulator<T>>* sums) {
  using E = Accumulator<T>;
  const int apart = packed ? 1 : 32;
  if (out.columns != nullptr) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j * apart < count) {
        out.columns[at * g.channels + channel + j * apart] = column[j];
      }
    }
  }
  const Corners<E> corners(g, s);
  // Reads before adding, because nothing waits for additions.
  const bool wants_sums = out.offset != nullptr || out.mask != nullptr;
  E values[4][4];  // [corner][channel]
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T* from = in.inputs + s.corner + corners.steps[i] + channel;
    const bool exists = wants_sums && (s.flags >> i & 1) != 0;
    if (packed) {
      Pack<T, 4> pack = {};
      if (exists && count > 0) {
        pack = *reinterpret_cast<const Pack<T, 4>*>(from);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] = Widen(pack.values[j]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[i][j] = exists && j * apart < count ? Widen(from[j * apart]) : 0;
      }
    }
  }
  if (out.inputs != nullptr) {
    E share[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) share[j] = s.mask * column[j];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((s.flags >> i & 1) == 0) continue;
      E* to = out.inputs + (s.corner - out.origin) + corners.steps[i] + channel;
      E parts[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) parts[j] = corners.weights[i] * share[j];
      if constexpr (sizeof(E) == 4) {
        if (packed) {
          if (count > 0) AddAtomically(to, parts);
          continue;
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j * apart < count) AddAtomically(to + j * apart, parts[j]);
      }
    }
  }
  if (!wants_sums) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j * apart >= count) continue;
    E sample = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sample += corners.weights[i] * values[i][j];
    const E down = (1 - s.lx) * (values[2][j] - values[0][j]) +
                   s.lx * (values[3][j] - values[1][j]);
    const E right = (1 - s.ly) * (values[1][j] - values[0][j]) +
                    s.ly * (values[3][j] - values[2][j]);
    sums->mask += column[j] * sample;
    sums->y += column[j] * down;
    sums->x += column[j] * right;
  }
}

// Writes the gradients of offset pair `field` of a pixel, and of its mask.
template <typename E>
__device__ __forceinline__ void WriteField(const Geometry& g, const E* mask,
                                           const DataGradients<E>& out,
                                           const Sample<E>& s, int64_t pixel,
                                           int64_t field,
                                           const SampleSums<E>& sums) {
  const bool counts = s.flags != 0;
  if (out.offset != nullptr) {
    E* const pair = out.offset + pixel * g.offset_step + 2 * field;
    pair[0] = counts && (s.flags & kHeldY) == 0 ? s.mask * sums.y : 0;
    pair[1] = counts && (s.flags & kHeldX) == 0 ? s.mask * sums.x : 0;
  }
  if (out.mask != nullptr) {
    const int64_t at = pixel * g.mask_step + field;
    E sum = counts ? sums.mask : 0;
    // Where the mask is NaN, so is its gradient, even of a sample outside.
    if (g.most > 0) sum *= FactorSlope(g, mask[at]);
    out.mask[at] = sum;
  }
}

// Runs of channels that belong to one group of the convolution and one offset
// group, cut into pieces.
struct ChannelPiece {
  int64_t channel, count;

  // The piece of at most `most` that starts at `channel`, before `end`.
  template <typename I>
  __host__ __device__ static ChannelPiece At(const Geometry& g, int64_t channel,
                                             int64_t end, int64_t most) {
    const int64_t of_group =
        (Quotient<I>(channel, g.group_channels) + 1) * g.group_channels;
    const int64_t of_offset_group =
        (Quotient<I>(channel, g.offset_channels) + 1) * g.offset_channels;
    return {channel,
            Min(most, Min(end, Min(of_group, of_offset_group)) - channel)};
  }
};

constexpr int kDataPixels = 128;    // of a block
constexpr int kDataChannels = 128;  // of a product: 4 for each lane of a warp

// Columns are padded so that what a warp writes at once, eight rows of four
// pairs, lies in different banks.
constexpr int kDataStride = kDataChannels + 8;

template <typename T, bool kTf32>
struct DataBuffers {
  using Sums = Product<T, kTf32, kDataPixels, kDataChannels, true, true, false>;

  union {
    struct {
      alignas(16) T a[3][Sums::A::kElements];  // grad_output
      alignas(16) T b[3][Sums::B::kElements];  // kernel
    } panels;
    alignas(16) float columns[kDataPixels * kDataStride];  // their gradients
  };
  Sample<float> plan[kDataPixels];
};

// Returns the sample of one tap at output pixel p; a sample outside the image
// if not `exists`.
template <typename T>
__device__ __forceinline__ Sample<float> LocateSample(const Geometry& g,
                                                      const Operands<T>& in,
                                                      int64_t p, bool exists,
                                                      int64_t tap,
                                                      int64_t field) {
  Pixel<float> pixel = {0, 0, 0, -1};
  if (exists) pixel = Pixel<float>::At<uint32_t>(g, p);
  return Sample<float>::Locate<uint32_t>(
      g, pixel, tap,
      Displacement<float>::Read(g, pixel, field, in.offset, in.mask));
}

// A block makes the gradient of the columns of kDataPixels pixels, one tap and
// one offset group: grad_output times the transposed kernel, some channels at a
// time. A warp then takes the gradients of one pixel and passes them on.
template <typename T, bool kTf32>
__global__ void __launch_bounds__(DataBuffers<T, kTf32>::Sums::kThreads)
    DataKernel(const Geometry g, const Operands<T> in, const T* grad_output,
               const DataGradients<float> out) {
  using Buffers = DataBuffers<T, kTf32>;
  using Sums = typename Buffers::Sums;
  Buffers* const shared = reinterpret_cast<Buffers*>(SharedMemory());
  constexpr int kBlock = Sums::kThreads, kWarps = kBlock / 32;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  const int64_t tile = Quotient<uint32_t>(blockIdx.x, g.fields);
  const int64_t field = blockIdx.x - tile * g.fields;
  const int64_t offset_group = Quotient<uint32_t>(field, g.taps);
  const int64_t tap = field - offset_group * g.taps;
  const int64_t first = out.first + tile * kDataPixels;
  const int64_t pixels = Min(kDataPixels, out.end - first);
  if (thread < kDataPixels) {
    shared->plan[thread] =
        LocateSample(g, in, first + thread, thread < pixels, tap, field);
  }

  constexpr int kRows = kDataPixels / kWarps;  // pixels of a warp
  SampleSums<float> totals = {0, 0, 0};        // of pixel `lane` of the warp's
  static_assert(kRows <= 32, "a lane keeps the sums of one pixel");
  const int64_t end = (offset_group + 1) * g.offset_channels;
  ChannelPiece piece{offset_group * g.offset_channels, 0};
  for (; piece.channel < end; piece.channel += piece.count) {
    piece = ChannelPiece::At<uint32_t>(g, piece.channel, end, kDataChannels);
    const int64_t group = Quotient<uint32_t>(piece.channel, g.group_channels);
    const T* const gradient =
        grad_output + first * g.filters + group * g.group_filters;
    const T* const kernel =
        in.kernel +
        (tap * g.group_channels + piece.channel - group * g.group_channels) *
            g.filters +
        group * g.group_filters;
    const auto copy = [&](int64_t filter, int stage) {
      if (filter < g.group_filters) {
        const int64_t filters = g.group_filters - filter;
        CopyPanel<typename Sums::A, kBlock>(gradient + filter, g.filters,
                                            pixels, filters, in.packed_filters,
                                            shared->panels.a[stage]);
        CopyPanel<typename Sums::B, kBlock>(
            kernel + filter, g.filters, piece.count, filters, in.packed_filters,
            shared->panels.b[stage]);
      }
      CommitCopies();
    };
    Sums sums;
    sums.Clear();
    __syncthreads();  // the columns before these have been read
    copy(0, 0);
    copy(kInner<T>, 1);
    int stage = 0;
    for (int64_t filter = 0; filter < g.group_filters; filter += kInner<T>) {
      WaitCopies<1>();
      __syncthreads();
      copy(filter + 2 * kInner<T>, stage == 0 ? 2 : stage - 1);
      sums.Step(shared->panels.a[stage], shared->panels.b[stage]);
      stage = stage == 2 ? 0 : stage + 1;
    }
    __syncthreads();
    sums.ForEachPair(
        [&](int row, int column, int next, float first_sum, float second_sum) {
          shared->columns[row * kDataStride + column] = first_sum;
          shared->columns[row * kDataStride + next] = second_sum;
        });
    __syncthreads();

    const bool packed = in.packed_channels && kAddsFour;
    const int mine = packed ? 4 * lane : lane;
    for (int i = 0; i < kRows; ++i) {
      const int row = i * kWarps + warp;
      const Sample<float> s = shared->plan[row];
      if (s.flags == 0) continue;
      const float* columns = shared->columns + row * kDataStride + mine;
      float column[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        column[j] = columns[packed ? j : 32 * j];
      }
      SampleSums<float> sample = {0, 0, 0};
      PassOn(g, in, out, s, (first + row - out.first) * g.taps + tap,
             piece.channel + mine, piece.count - mine, packed, column, &sample);
      if (out.offset == nullptr && out.mask == nullptr) continue;
      sample.OfWarp();
      if (lane == i) {
        totals.mask += sample.mask;
        totals.y += sample.y;
        totals.x += sample.x;
      }
    }
  }
  const int row = lane * kWarps + warp;
  if (lane < kRows && row < pixels) {
    WriteField(g, in.mask, out, shared->plan[row], first + row, field, totals);
  }
}

// Does the same without a matrix product: a warp computes the gradient of the
// columns of one pixel, tap and offset group.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    DirectDataKernel(const Geometry g, const Operands<T> in,
                     const T* grad_output,
                     const DataGradients<Accumulator<T>> out) {
  using E = Accumulator<T>;
  const int lane = threadIdx.x % 32;
  const int64_t index =
      (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int64_t position = Quotient<uint64_t>(index, g.fields);
  const int64_t field = index - position * g.fields;
  const int64_t first = out.first + position;
  if (first >= out.end) return;
  const int64_t offset_group = Quotient<uint64_t>(field, g.taps);
  const int64_t tap = field - offset_group * g.taps;
  const Pixel<E> pixel = Pixel<E>::template At<uint64_t>(g, first);
  const Sample<E> s = Sample<E>::template Locate<uint64_t>(
      g, pixel, tap,
      Displacement<E>::Read(g, pixel, field, in.offset, in.mask));
  SampleSums<E> sums = {0, 0, 0};
  if (s.flags != 0) {
    const int64_t end = (offset_group + 1) * g.offset_channels;
    for (int64_t channel = offset_group * g.offset_channels + lane;
         channel < end; channel += 128) {
      E column[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t c = channel + 32 * j;
        if (c >= end) continue;
        const int64_t group = Quotient<uint64_t>(c, g.group_channels);
        const T* gradient =
            grad_output + first * g.filters + group * g.group_filters;
        const T* kernel =
            in.kernel +
            (tap * g.group_channels + c - group * g.group_channels) *
                g.filters +
            group * g.group_filters;
        for (int64_t f = 0; f < g.group_filters; ++f) {
          column[j] += Widen(gradient[f]) * Widen(kernel[f]);
        }
      }
      PassOn(g, in, out, s, position * g.taps + tap, channel, end - channel,
             false, column, &sums);
    }
    sums.OfWarp();
  }
  if (lane == 0) {
    WriteField(g, in.mask, out, s, first, field, sums);
  }
}

// Adds gradients of columns to the gradient of the inputs in a fixed order. A
// thread owns a channel of some rows of an image: its block looks through the
// samples of the image in order, one sample a thread, lists the samples that
// touch its rows, and then goes through the list.
constexpr int kOrderedThreads = 128;

template <typename E>
struct OrderedAddition {
  const E* columns;  // [pixel][tap][channel], from `first` on
  E* inputs;         // the gradient, of the images from first_image on
  int64_t first_image, images;
  int64_t first, end;  // output pixels whose columns there are
  int64_t strips;      // of an image's rows
  int64_t slabs;       // of an offset group's channels

  __host__ __device__ int64_t Blocks(const Geometry& g) const {
    return images * strips * g.offset_groups * slabs;
  }
};

// Returns the row of a sample's upper corners, from -1 on. Its left corners may
// lie in column -1, which looks like the end of the row before.
template <typename E>
__host__ __device__ __forceinline__ int64_t TopRow(const Geometry& g,
                                                   const Sample<E>& s,
                                                   int64_t image_begin) {
  int64_t from = s.corner - image_begin;
  if ((s.flags & (kTopLeft | kBottomLeft)) == 0) from += g.channels;
  return Quotient<uint64_t>(from + g.width * g.channels, g.width * g.channels) -
         1;
}

template <typename E>
__global__ void __launch_bounds__(kOrderedThreads)
    OrderedAdditionKernel(const Geometry g, const E* offset, const E* mask,
                          const OrderedAddition<E> work) {
  __shared__ int64_t found[kOrderedThreads];  // columns of the samples listed
  __shared__ Sample<E> samples[kOrderedThreads];
  __shared__ int counts[kOrderedThreads / 32];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  int64_t rest = blockIdx.x;
  const auto take = [&rest](int64_t size) {
    const int64_t quotient = Quotient<uint64_t>(rest, size);
    const int64_t remainder = rest - quotient * size;
    rest = quotient;
    return remainder;
  };
  const int64_t slab = take(work.slabs);
  const int64_t strip = take(work.strips);
  const int64_t offset_group = take(g.offset_groups);
  const int64_t image = work.first_image + rest;
  const int64_t in_group = slab * kOrderedThreads + thread;
  const bool owns = in_group < g.offset_channels;
  const int64_t channel = offset_group * g.offset_channels + in_group;
  const int64_t row_begin = g.height * strip / work.strips;
  const int64_t row_end = g.height * (strip + 1) / work.strips;
  const int64_t image_begin = image * g.image;

  const int64_t begin = Max(work.first, image * g.pixels) * g.taps;
  const int64_t end = Min(work.end, (image + 1) * g.pixels) * g.taps;
  for (int64_t batch = begin; batch < end; batch += kOrderedThreads) {
    Sample<E> s = {0, 0, 0, 0, 0};
    const int64_t index = batch + thread;  // pixel * taps + tap
    if (index < end) {
      const int64_t p = Quotient<uint64_t>(index, g.taps);
      const int64_t tap = index - p * g.taps;
      const Pixel<E> pixel = Pixel<E>::template At<uint64_t>(g, p);
      s = Sample<E>::template Locate<uint64_t>(
          g, pixel, tap,
          Displacement<E>::Read(g, pixel, offset_group * g.taps + tap, offset,
                                mask));
    }
    const int64_t top = TopRow(g, s, image_begin);
    const bool touches = s.flags != 0 && top + 1 >= row_begin && top < row_end;
    const unsigned votes = __ballot_sync(0xffffffffu, touches);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();  // all are done with the list before, too
    int place = __popc(votes & ((1u << lane) - 1)), total = 0;
    for (int w = 0; w < kOrderedThreads / 32; ++w) {
      if (w < warp) place += counts[w];
      total += counts[w];
    }
    if (touches) {
      found[place] = (index - work.first * g.taps) * g.channels;
      samples[place] = s;
    }
    __syncthreads();
    for (int i = 0; i < total && owns; ++i) {
      const Sample<E> sample = samples[i];
      const Corners<E> corners(g, sample);
      const E share = sample.mask * work.columns[found[i] + channel];
      const int64_t from = sample.corner - image_begin;
      const int64_t sample_top = TopRow(g, sample, image_begin);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t y = sample_top + k / 2;
        if ((sample.flags >> k & 1) == 0 || y < row_begin || y >= row_end) {
          continue;
        }
        work.inputs[(image - work.first_image) * g.image + from +
                    corners.steps[k] + channel] += corners.weights[k] * share;
      }
    }
  }
}

constexpr int kNarrowed = 8;  // elements of a thread

template <typename T>
__global__ void __launch_bounds__(kThreads)
    NarrowKernel(const float* from, int64_t count, T* to) {
  const int64_t first =
      static_cast<int64_t>(blockIdx.x) * (kThreads * kNarrowed) + threadIdx.x;
#pragma unroll
  for (int j = 0; j < kNarrowed; ++j) {
    const int64_t i = first + j * kThreads;
    if (i < count) Narrow(from[i], to + i);
  }
}

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_DEFORMABLE_CONV2D_DATA_INL_H_

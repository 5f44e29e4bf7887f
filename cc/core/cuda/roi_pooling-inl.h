// SPDX-License-Identifier: Apache-2.0
// Pooling of regions of interest on a GPU: what deformable PS-ROI pooling and
// deformable ROIAlign have in common.
//
// The sums are those of cpu/roi_pooling-inl.h: a bin is the weighted sum of the
// rows and columns that its samples read, its taps.
//
//   PoolPass        A block pools some bins, of one ROI or of several. Two
//                   threads of each bin find its taps, along y and along x, and
//                   leave them in shared memory; then the threads of the bin
//                   each sum up a few channels, 16 bytes at a time where all is
//                   aligned, one element otherwise.
//   DisplacePass    The gradient of a displacement is the same sum with the
//                   derivative of the weights along one axis. A few lanes of a
//                   warp own a displacement: they walk through its bins and sum
//                   in an order that is always the same.
//   ScatterPass     As PoolPass, but what was read is added to, by atomics.
//                   Sums of 16-bit types are made in a float32 image and
//                   narrowed at the end. If it has to be deterministic, a block
//                   owns a tile of pixels of the gradient and a channel a
//                   thread, and walks through all bins in order, as a task of
//                   the CPU does.
//
// Of more taps than kTaps, a bin has several windows, which are found one after
// the other; ForEachWindow leads all threads of a block through them.
//
// The channels of position-sensitive maps are ordered (output channel, cell),
// but a bin reads all output channels of one cell. As they are, each of those
// is a sector of 32 bytes, in which neighbours of a bin are of little use: they
// read other cells, but of other pixels. Repacked as [cell][pixel][output
// channel], a bin reads runs. For R-FCN's map, 38 x 63 x (21 * 49) in float32,
// with 300 ROIs of 7 x 7 bins, each of which reads about 16 pixels, that is
//   as they are  300 * 49 * 16 * 21 * 32 bytes                      158 MB
//   repacked     2 * 10 MB, and 300 * 49 * 16 * 96 bytes of runs     43 MB
// so maps are repacked where a count of that kind says that it pays, as many
// images at a time as 64 MiB hold.
//
// The passes are written for a Rule: what one operator makes of a ROI. It has
// the fields of RoiGeometry and
//   RoiAxis<E> Axis(E from, E to, bool along_x) const   of these corners
//   E Displacement(E value, E size) const   map pixels, of an axis of that size
//   E DisplacementSlope(E size) const       its derivative
//   static constexpr double kMargin     a sample may lie this far outside of
//                                       [0, size - 1]
//   static constexpr double kPhase      of a bin's first sample, in steps
//   static constexpr bool kMeanOfAll    samples outside count, as zeros

#ifndef TF_DEFORM_CC_CORE_CUDA_ROI_POOLING_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_ROI_POOLING_INL_H_

#include "cc/core/cuda/device-inl.h"

namespace tf_deform {
namespace cuda {

constexpr int kThreads = 128;  // of a block, at most
constexpr int kBlocks = 4;     // at once; without it, the compiler spills
constexpr int kMaxBins = 32;   // of a block
constexpr int kTaps = 16;      // of a window, along an axis
constexpr int64_t kScratchBytes = int64_t{64} << 20;

// A number above 0 to divide by, where a division of 64 bits would take as long
// as reading a ROI.
struct Divider {
  int64_t value;
  uint64_t factor;  // 2^(63 + shift) / value, rounded up
  int shift;        // log2(value), rounded up

  Divider(int64_t by) : value(by), shift(0) {  // NOLINT: stands for a number
    while (shift < 62 && (int64_t{1} << shift) < by) ++shift;
    const unsigned __int128 power = static_cast<unsigned __int128>(1)
                                    << (63 + shift);
    const auto divisor = static_cast<unsigned __int128>(by);
    factor = static_cast<uint64_t>((power + divisor - 1) / divisor);
  }
  __host__ __device__ operator int64_t() const { return value; }

  // Of a number that is not negative.
  __device__ __forceinline__ friend int64_t operator/(int64_t number,
                                                      const Divider& by) {
    return static_cast<int64_t>(
        __umul64hi(2 * static_cast<uint64_t>(number), by.factor) >> by.shift);
  }
  __device__ __forceinline__ friend int64_t operator%(int64_t number,
                                                      const Divider& by) {
    return number - number / by * by.value;
  }
};

// Sizes of a call.
struct RoiGeometry {
  int64_t batch, height, width;
  int64_t num_rois;
  Divider pooled_h, pooled_w;
  Divider group_h, group_w;         // cells of the position-sensitive maps
  Divider part_h, part_w;           // displacements of a ROI
  Divider classes, class_channels;  // with a displacement of their own

  __host__ __device__ int64_t Depth() const {
    return classes.value * class_channels.value;
  }
  __host__ __device__ int64_t Cells() const {
    return group_h.value * group_w.value;
  }
  __host__ __device__ int64_t Pixels() const { return height * width; }
  __host__ __device__ int64_t Image() const {
    return Pixels() * Cells() * Depth();
  }
  __host__ __device__ int64_t Bins() const {
    return pooled_h.value * pooled_w.value;
  }
};

// Images that kernels read or add to, and where elements lie in them.
struct Maps {
  int64_t first, images;                // first image; how many
  int64_t image, cell, pixel, channel;  // from one to the next, in elements
};

// One axis of a ROI, in map pixels.
template <typename E>
struct RoiAxis {
  E start;           // of its first bin
  E size;            // of the ROI
  E bin;             // from one bin to the next
  E step;            // from one sample to the next
  uint32_t samples;  // of a bin; at most 2^32 - 2
};

// A product that is not carried on into a fused multiply-add: whether a sample
// on the edge counts has to be the same as on the CPU.
__device__ __forceinline__ float Product(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ double Product(double a, double b) {
  return __dmul_rn(a, b);
}

template <typename E>
__device__ __forceinline__ bool IsFinite(E value) {
  return value - value == 0;
}

// The image that a ROI lies in; -1 for padding, for batch indices that are no
// image's, for corners that are not finite, and if images have no pixels.
template <typename E>
__device__ __forceinline__ int64_t ImageOf(const RoiGeometry& g,
                                           const E (&roi)[5]) {
  const E index = roi[0];
  const bool counts = (index >= 0) & (index < static_cast<E>(g.batch)) &
                      IsFinite(roi[1]) & IsFinite(roi[2]) & IsFinite(roi[3]) &
                      IsFinite(roi[4]) & (g.Pixels() > 0);
  if (!counts) return -1;
  const int64_t image = static_cast<int64_t>(index);
  return image < g.batch && static_cast<E>(image) == index ? image : -1;
}

// The taps of a bin along one axis: rows or columns that its samples read; and
// what they follow from.
template <typename E>
struct Taps {
  E weight[kTaps];     // sums of the samples' bilinear weights
  E slope[kTaps];      // derivatives of the weights by the displacement
  int at[kTaps];       // rows or columns
  int count;           // taps of this window
  uint32_t samples;    // that count, in all windows
  uint32_t next, all;  // the first sample of the next window; past the last
  E start, step;       // of the first sample, less its phase; between samples
  E reach;             // pixels that a displacement of 1 is
};

// Pixels along an axis, and those whose taps are wanted: [low, high).
struct Span {
  int pixels, low, high;
};

// Finds the taps of the next window. Slopes only if asked for.
template <bool kSlopes, typename Rule, typename E>
__device__ __forceinline__ void FindTaps(const Rule&, const Span& span,
                                         Taps<E>* taps) {
  const E last = static_cast<E>(span.pixels - 1);
  const E least = -static_cast<E>(Rule::kMargin);
  const E most = last + static_cast<E>(Rule::kMargin);
  const E start = taps->start, step = taps->step;
  const uint32_t all = taps->all;
  const bool is_first = taps->next == 0;  // then all samples are counted
  uint32_t samples = is_first ? 0 : taps->samples, next = all;
  int count = 0;
  int top = -2;               // first row of the sample before
  int here_at = -1, up = -1;  // its taps, -1 where they are not wanted
  const auto append = [&](int pixel) {
    if (pixel < span.low || pixel >= span.high) return -1;
    taps->at[count] = pixel;
    taps->weight[count] = 0;
    if constexpr (kSlopes) taps->slope[count] = 0;
    return count++;
  };
  for (uint32_t k = taps->next; k < all; ++k) {
    // In ascending order, so that a sample's taps are new or the last two.
    const uint32_t i = step < 0 ? all - 1 - k : k;
    const E raw =
        start + Product(static_cast<E>(i) + static_cast<E>(Rule::kPhase), step);
    // Written so that NaN lies outside.
    if (!(raw >= least && raw <= most)) continue;
    if (is_first) ++samples;
    if (next != all) continue;
    const E place = raw < 0 ? E(0) : raw > last ? last : raw;
    const int here = static_cast<int>(
        Min(static_cast<int64_t>(place), int64_t{span.pixels} - 1));
    if (here != top) {
      if (count + 2 > kTaps) {
        next = k;
        if (!is_first || Rule::kMeanOfAll) break;
        continue;  // the others only count
      }
      here_at = here == top + 1 ? up : append(here);
      // The last pixel holds what lies behind it.
      up = here + 1 < span.pixels ? append(here + 1) : here_at;
      top = here;
    }
    const E distance = place - static_cast<E>(here);
    const E change = raw < 0 || raw >= last ? E(0) : E(1);
    if (here_at >= 0) {
      taps->weight[here_at] += 1 - distance;
      if constexpr (kSlopes) taps->slope[here_at] -= change;
    }
    if (up >= 0) {
      taps->weight[up] += distance;
      if constexpr (kSlopes) taps->slope[up] += change;
    }
  }
  taps->count = count;
  taps->samples = samples;
  taps->next = next;
}

// A bin of one class, in shared memory.
template <typename E>
struct Bin {
  Taps<E> y, x;
  E samples;       // that its mean is made of
  E share;         // 1 / samples, 0 if there is none
  int64_t output;  // its first element in output and count; -1: leave it alone
  int64_t map;     // its first element in the maps

  __device__ __forceinline__ bool IsEmpty() const {
    return y.count == 0 || x.count == 0;
  }
};

// What a thread does for the taps of the block's bins: nothing, or find those
// of one bin along one axis.
template <typename E>
struct Planner {
  Bin<E>* bin;  // null: nothing
  Taps<E>* taps;
  bool along_x;
  Span span;

  __device__ __forceinline__ Planner(const RoiGeometry& g, Bin<E>* bins,
                                     int count)
      : bin(nullptr), taps(nullptr), along_x(threadIdx.x % 2 != 0) {
    const int i = static_cast<int>(threadIdx.x) / 2;
    if (i < count) {
      bin = bins + i;
      taps = along_x ? &bin->x : &bin->y;
    }
    span.pixels = static_cast<int>(along_x ? g.width : g.height);
    span.low = 0;
    span.high = span.pixels;
  }

  // Bin (r, ph, pw) of class k, or none. It reads nothing if its ROI lies in
  // none of the images; then its output is left alone, but for ROIs that lie
  // nowhere, if the first image is there.
  template <typename Rule>
  __device__ __forceinline__ void Plan(const Rule& rule, const Maps& maps,
                                       const E* rois, const E* displacements,
                                       bool exists, int64_t r, int64_t ph,
                                       int64_t pw, int64_t k) const {
    if (bin == nullptr) return;
    if (!exists) {
      taps->next = taps->all = 0;
      if (!along_x) bin->output = -1;
      return;
    }
    const int64_t part =
        (r * rule.part_h + ph * rule.part_h / rule.pooled_h) * rule.part_w +
        pw * rule.part_w / rule.pooled_w;
    const int64_t pair = (part * rule.classes + k) * 2;
    // All reads are under way before anything is made of them.
    E roi[5], moved = 0;
#pragma unroll
    for (int i = 0; i < 5; ++i) roi[i] = rois[5 * r + i];
    if (displacements != nullptr) moved = displacements[pair + along_x];
    const int64_t image = ImageOf(rule, roi);
    const bool is_here =
        image >= maps.first && image < maps.first + maps.images;
    const RoiAxis<E> axis = rule.Axis(along_x ? roi[1] : roi[2],
                                      along_x ? roi[3] : roi[4], along_x);
    E start = Product(static_cast<E>(along_x ? pw : ph), axis.bin) + axis.start;
    if (displacements != nullptr) start += rule.Displacement(moved, axis.size);
    taps->start = start;
    taps->step = axis.step;
    taps->reach = rule.DisplacementSlope(axis.size);
    taps->next = 0;
    taps->all = is_here ? axis.samples : 0;
    if (along_x) return;
    const int64_t cell = ph * rule.group_h / rule.pooled_h * rule.group_w +
                         pw * rule.group_w / rule.pooled_w;
    const bool is_mine = is_here || (image < 0 && maps.first == 0);
    bin->output = is_mine ? ((r * rule.pooled_h + ph) * rule.pooled_w + pw) *
                                    rule.Depth() +
                                k * rule.class_channels
                          : -1;
    bin->map = (image - maps.first) * maps.image + cell * maps.cell +
               k * rule.class_channels * maps.channel;
  }

  // Calls body() for every window of the bins' taps. All threads of the block
  // call this together; when it returns, all of them have left the last body.
  template <bool kSlopes, typename Rule, typename Body>
  __device__ __forceinline__ void ForEachWindow(const Rule& rule,
                                                const Body& body) const {
    bool next_rows = true;
    for (;;) {
      if (bin != nullptr && (along_x || next_rows)) {
        FindTaps<kSlopes>(rule, span, taps);
      }
      // Of the other axis, which the lane next to this one has.
      const uint32_t mine = bin == nullptr     ? 0
                            : Rule::kMeanOfAll ? taps->all
                                               : taps->samples;
      const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, 1);
      if (bin != nullptr && !along_x) {
        const E samples = static_cast<E>(static_cast<uint64_t>(mine) * other);
        bin->samples = samples;
        bin->share = samples > 0 ? 1 / samples : E(0);
      }
      const bool has_more = bin != nullptr && taps->next < taps->all;
      const bool more_columns = __syncthreads_or(has_more && along_x);
      body();
      const bool more_rows = __syncthreads_or(has_more && !along_x);
      next_rows = !more_columns;
      if (!next_rows) continue;
      if (!more_rows) return;
      if (bin != nullptr && along_x) taps->next = 0;
    }
  }
};

// kN elements that lie side by side, widened.
template <int kN, typename T, typename E>
__device__ __forceinline__ void LoadWide(const T* from, E (&to)[kN]) {
  const Pack<T, kN> pack = *reinterpret_cast<const Pack<T, kN>*>(from);
#pragma unroll
  for (int i = 0; i < kN; ++i) to[i] = Widen(pack.values[i]);
}

// The first `count` of kN elements, widened; zeros behind them.
template <int kN, typename T, typename E>
__device__ __forceinline__ void LoadSome(const T* from, int64_t count,
                                         E (&to)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) to[i] = i < count ? Widen(from[i]) : E(0);
}

// Calls body(offset of the pixel, a, b) for the taps of a bin.
template <typename E, typename Body>
__device__ __forceinline__ void ForEachTap(const Maps& maps, int64_t width,
                                           const Bin<E>& bin,
                                           const Body& body) {
  const int rows = bin.y.count, columns = bin.x.count;
  for (int a = 0; a < rows; ++a) {
    const int64_t row = bin.map + bin.y.at[a] * width * maps.pixel;
#pragma unroll 4
    for (int b = 0; b < columns; ++b) {
      body(row + bin.x.at[b] * maps.pixel, a, b);
    }
  }
}

// How a block of PoolPass and ScatterPass is divided: among `bins`, of each of
// which `lanes` threads have some channels. Of wide bins there are several
// blocks.
struct Blocking {
  int bins, lanes, threads;
  unsigned slices;  // blocks of a bin

  explicit Blocking(int64_t lanes_of_bin)
      : slices(static_cast<unsigned>(CeilDiv(lanes_of_bin, kThreads))) {
    lanes = static_cast<int>(CeilDiv(lanes_of_bin, slices));
    bins = static_cast<int>(Min(kMaxBins, kThreads / lanes));
    threads = static_cast<int>(RoundUp(Max(2, lanes) * bins, 32));
  }

  int64_t Blocks(const RoiGeometry& g) const {
    return CeilDiv(g.num_rois * g.Bins() * g.classes, bins) * slices;
  }
};

// What a thread of PoolPass or ScatterPass works on.
template <typename E>
struct Worker {
  Planner<E> planner;
  const Bin<E>* bin;
  int64_t channel;  // of its first one in the class
  int64_t count;    // of its channels, 0 if it has none

  template <typename Rule>
  __device__ __forceinline__ Worker(const Rule& rule, const Maps& maps,
                                    const E* rois, const E* displacements,
                                    const Blocking& blocking, int channels)
      : planner(rule, reinterpret_cast<Bin<E>*>(SharedMemory()),
                blocking.bins) {
    const int64_t tile = blockIdx.x / blocking.slices;
    const int64_t slice = blockIdx.x % blocking.slices;
    const int64_t index = tile * blocking.bins + threadIdx.x / 2;
    const int64_t place = index / rule.classes, row = place / rule.pooled_w;
    const int64_t r = row / rule.pooled_h;
    planner.Plan(rule, maps, rois, displacements, r < rule.num_rois, r,
                 row % rule.pooled_h, place % rule.pooled_w,
                 index % rule.classes);
    const int i = static_cast<int>(threadIdx.x) / blocking.lanes;
    const int lane = static_cast<int>(threadIdx.x) % blocking.lanes;
    bin = reinterpret_cast<const Bin<E>*>(SharedMemory()) +
          Min(i, blocking.bins - 1);
    channel = (slice * blocking.lanes + lane) * channels;
    count = i < blocking.bins ? rule.class_channels - channel : 0;
  }
};

// -----------------------------------------------------------------------------

// kN: channels of a thread.
template <int kN, typename T, typename Rule, typename E>
__global__ void __launch_bounds__(kThreads, kBlocks)
    PoolKernel(Rule rule, Maps maps, Blocking blocking,
               const T* __restrict__ inputs, const E* __restrict__ rois,
               const E* __restrict__ displacements, T* __restrict__ output,
               float* __restrict__ count) {
  const Worker<E> worker(rule, maps, rois, displacements, blocking, kN);
  const Bin<E>& bin = *worker.bin;
  E sum[kN] = {};
  worker.planner.template ForEachWindow<false>(rule, [&] {
    if (worker.count <= 0) return;
    const T* from = inputs + bin.map + worker.channel * maps.channel;
    const int rows = bin.y.count, columns = bin.x.count;
    for (int a = 0; a < rows; ++a) {
      const T* row = from + bin.y.at[a] * rule.width * maps.pixel;
      E in_row[kN] = {};
#pragma unroll 4
      for (int b = 0; b < columns; ++b) {
        E values[kN];
        LoadWide<kN>(row + bin.x.at[b] * maps.pixel, values);
#pragma unroll
        for (int i = 0; i < kN; ++i) in_row[i] += bin.x.weight[b] * values[i];
      }
#pragma unroll
      for (int i = 0; i < kN; ++i) sum[i] += bin.y.weight[a] * in_row[i];
    }
  });
  if (worker.count <= 0 || bin.output < 0) return;
  const E share = bin.share;
  const int64_t to = bin.output + worker.channel;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    if (i >= worker.count) break;
    Narrow(sum[i] * share, output + to + i);
    if (count != nullptr) {
      count[to + i] = static_cast<float>(bin.samples);
    }
  }
}

template <int kN, typename T, typename Rule, typename E>
__global__ void __launch_bounds__(kThreads, kBlocks)
    ScatterKernel(Rule rule, Maps maps, Blocking blocking,
                  const E* __restrict__ rois,
                  const E* __restrict__ displacements,
                  const T* __restrict__ grad_output, E* __restrict__ sums) {
  const Worker<E> worker(rule, maps, rois, displacements, blocking, kN);
  const Bin<E>& bin = *worker.bin;
  worker.planner.template ForEachWindow<false>(rule, [&] {
    if (worker.count <= 0 || bin.IsEmpty()) return;
    const E share = bin.share;
    E gradient[kN];
    LoadSome<kN>(grad_output + bin.output + worker.channel, worker.count,
                 gradient);
    E* to = sums + worker.channel * maps.channel;
    ForEachTap(maps, rule.width, bin, [&](int64_t at, int a, int b) {
      const E weight = bin.y.weight[a] * bin.x.weight[b] * share;
      E values[kN];
#pragma unroll
      for (int i = 0; i < kN; ++i) values[i] = weight * gradient[i];
      if constexpr (kN == 4) {
        AddAtomically(to + at, values);
      } else {
#pragma unroll
        for (int i = 0; i < kN; ++i) AddAtomically(to + at + i, values[i]);
      }
    });
  });
}

// The first bin of `pooled` that belongs to part `index` of `parts`, or to one
// behind it.
__device__ __forceinline__ int64_t FirstBin(int64_t index, int64_t pooled,
                                            const Divider& parts) {
  return (index * pooled + parts.value - 1) / parts;
}

// Writes the gradients of displacements that are not 0; all are 0 before.
// `lanes` threads, a power of two up to 32, own one, and a block has `owned`.
template <int kN, typename T, typename Rule, typename E>
__global__ void __launch_bounds__(kThreads, kBlocks)
    DisplaceKernel(Rule rule, Maps maps, int owned, int lanes,
                   const T* __restrict__ inputs, const E* __restrict__ rois,
                   const E* __restrict__ displacements,
                   const T* __restrict__ grad_output,
                   E* __restrict__ grad_displacements) {
  Bin<E>* bins = reinterpret_cast<Bin<E>*>(SharedMemory());
  const Planner<E> planner(rule, bins, owned);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * owned;
  const int mine = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const Bin<E>& bin = bins[Min(mine, owned - 1)];
  E sum_y = 0, sum_x = 0;
  const auto add = [&] {
    if (mine >= owned || bin.IsEmpty()) return;
    E along_y = 0, along_x = 0;
    for (int64_t c = int64_t{lane} * kN; c < rule.class_channels;
         c += int64_t{lanes} * kN) {
      E gradient[kN];
      LoadSome<kN>(grad_output + bin.output + c, rule.class_channels - c,
                   gradient);
      const T* from = inputs + c * maps.channel;
      ForEachTap(maps, rule.width, bin, [&](int64_t at, int a, int b) {
        E values[kN];
        LoadWide<kN>(from + at, values);
        E dot = 0;
#pragma unroll
        for (int i = 0; i < kN; ++i) dot += values[i] * gradient[i];
        along_y += bin.y.slope[a] * bin.x.weight[b] * dot;
        along_x += bin.y.weight[a] * bin.x.slope[b] * dot;
      });
    }
    sum_y += along_y * bin.share * bin.y.reach;
    sum_x += along_x * bin.share * bin.x.reach;
  };
  const int64_t index = first + threadIdx.x / 2;  // what it plans
  const int64_t part = index / rule.classes, part_row = part / rule.part_w;
  const int64_t part_x = part % rule.part_w, part_y = part_row % rule.part_h;
  const int64_t r = part_row / rule.part_h;
  // A displacement's bins are at most so many rows and columns.
  const int64_t rows = FirstBin(1, rule.pooled_h, rule.part_h);
  const int64_t columns = FirstBin(1, rule.pooled_w, rule.part_w);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t ph = FirstBin(part_y, rule.pooled_h, rule.part_h) + row;
      const int64_t pw = FirstBin(part_x, rule.pooled_w, rule.part_w) + column;
      const bool exists =
          r < rule.num_rois &&
          ph < FirstBin(part_y + 1, rule.pooled_h, rule.part_h) &&
          pw < FirstBin(part_x + 1, rule.pooled_w, rule.part_w);
      planner.Plan(rule, maps, rois, displacements, exists, r, ph, pw,
                   index % rule.classes);
      planner.template ForEachWindow<true>(rule, add);
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    sum_y += __shfl_xor_sync(0xffffffffu, sum_y, step);
    sum_x += __shfl_xor_sync(0xffffffffu, sum_x, step);
  }
  if (lane != 0 || (sum_y == 0 && sum_x == 0)) return;
  grad_displacements[2 * (first + mine)] = sum_y;
  grad_displacements[2 * (first + mine) + 1] = sum_x;
}

// A block owns a tile of pixels of one image and cell, a thread a channel of
// it.
constexpr int kTileRows = 4, kTileColumns = 8;

struct Tiles {
  Divider rows, columns;  // of an image
  Divider slices;         // of the channels of a cell
};

template <typename T, typename Rule, typename E>
__global__ void __launch_bounds__(kThreads, kBlocks)
    OwnedScatterKernel(Rule rule, Tiles tiles, const E* __restrict__ rois,
                       const E* __restrict__ displacements,
                       const T* __restrict__ grad_output,
                       T* __restrict__ grad_inputs) {
  const int threads = static_cast<int>(blockDim.x);
  const int64_t depth = rule.Depth(), cells = rule.Cells();
  int64_t rest = blockIdx.x;
  const int64_t slice = rest % tiles.slices;
  rest = rest / tiles.slices;
  const int64_t gw = rest % rule.group_w;
  rest = rest / rule.group_w;
  const int64_t gh = rest % rule.group_h;
  rest = rest / rule.group_h;
  const int left = static_cast<int>(rest % tiles.columns) * kTileColumns;
  rest = rest / tiles.columns;
  const int above = static_cast<int>(rest % tiles.rows) * kTileRows;
  const int64_t image = rest / tiles.rows;
  const int64_t channel = slice * threads + threadIdx.x;

  // The bins and classes that add to them.
  const int64_t ph_end = FirstBin(gh + 1, rule.pooled_h, rule.group_h);
  const int64_t pw_end = FirstBin(gw + 1, rule.pooled_w, rule.group_w);
  const int64_t k_begin = slice * threads / rule.class_channels;
  const int64_t k_end =
      (Min(depth, (slice + 1) * threads) - 1) / rule.class_channels + 1;

  Bin<E>* bins = reinterpret_cast<Bin<E>*>(SharedMemory());
  E* sums = reinterpret_cast<E*>(bins + kMaxBins) + threadIdx.x;
  for (int i = 0; i < kTileRows * kTileColumns; ++i) sums[i * threads] = 0;
  Planner<E> planner(rule, bins, kMaxBins);
  planner.span.low = planner.along_x ? left : above;
  planner.span.high =
      planner.span.low + (planner.along_x ? kTileColumns : kTileRows);
  // Of this image; a bin's place is its first channel.
  const Maps maps = {image, 1, 0, 0, 0, 1};
  const auto add = [&] {
    for (int i = 0; i < kMaxBins; ++i) {
      const Bin<E>& bin = bins[i];
      const int64_t c = channel - bin.map;
      if (bin.IsEmpty() || c < 0 || c >= rule.class_channels) continue;
      const E gradient = Widen(grad_output[bin.output + c]) * bin.share;
      for (int a = 0; a < bin.y.count; ++a) {
        E* row = sums + (bin.y.at[a] - above) * kTileColumns * threads;
        for (int b = 0; b < bin.x.count; ++b) {
          row[(bin.x.at[b] - left) * threads] +=
              bin.y.weight[a] * bin.x.weight[b] * gradient;
        }
      }
    }
  };
  for (int64_t ph = FirstBin(gh, rule.pooled_h, rule.group_h); ph < ph_end;
       ++ph) {
    for (int64_t pw = FirstBin(gw, rule.pooled_w, rule.group_w); pw < pw_end;
         ++pw) {
      for (int64_t k = k_begin; k < k_end; ++k) {
        for (int64_t first = 0; first < rule.num_rois; first += kMaxBins) {
          const int64_t r = first + threadIdx.x / 2;
          planner.Plan(rule, maps, rois, displacements, r < rule.num_rois, r,
                       ph, pw, k);
          planner.template ForEachWindow<false>(rule, add);
        }
      }
    }
  }
  if (channel >= depth) return;
  for (int i = 0; i < kTileRows * kTileColumns; ++i) {
    const int64_t row = above + i / kTileColumns;
    const int64_t column = left + i % kTileColumns;
    if (row >= rule.height || column >= rule.width) continue;
    Narrow(sums[i * threads],
           grad_inputs +
               (((image * rule.height + row) * rule.width + column) * depth +
                channel) *
                   cells +
               gh * rule.group_w + gw);
  }
}

// -----------------------------------------------------------------------------
// Repacking.

constexpr int kPackThreads = 256;
constexpr int64_t kPackBytes = 16 * 1024;  // of a block's pixels

// How images are repacked whose elements have `bytes` bytes; or that they are
// not.
struct Packing {
  int64_t depth;  // elements of a pixel of a cell; 0: as they are
  int64_t image;  // elements of an image
  int64_t step;   // images at a time
  int tile;       // pixels of a block
  Divider tiles;  // of an image
  int64_t shared_bytes;

  Packing(const RoiGeometry& g, int64_t bytes)
      : depth(0), tile(0), tiles(1), shared_bytes(0) {
    const int64_t channels = g.Cells() * g.Depth();
    image = g.Image();
    // What bins of nine pixels read, against a copy of all images.
    const double reads = 9.0 * static_cast<double>(g.num_rois) *
                         static_cast<double>(g.Bins()) *
                         static_cast<double>(g.Depth());
    const double copied =
        2.0 * static_cast<double>(g.batch) * static_cast<double>(image * bytes);
    if (g.Cells() > 1 && g.batch * image > 0 &&
        channels * bytes <= 2 * kPackBytes &&
        image * bytes <= kScratchBytes / 2 &&
        reads * static_cast<double>(32 - bytes) > copied) {
      // Filled up to 16 bytes, where that is little.
      const int64_t full = RoundUp(g.Depth(), 16 / bytes);
      const bool is_little = g.classes == 1 && 4 * full <= 5 * g.Depth();
      depth = is_little ? full : g.Depth();
      image = g.Pixels() * g.Cells() * depth;
    }
    step = image == 0 ? g.batch : Min(g.batch, kScratchBytes / (image * bytes));
    step = Max(1, step);
    if (depth == 0) return;
    tile = static_cast<int>(Max(1, kPackBytes / (channels * bytes)));
    tiles = CeilDiv(g.Pixels(), tile);
    shared_bytes = (tile * channels * 33 / 32 + 1) * bytes;
  }

  Maps MapsFrom(const RoiGeometry& g, int64_t first, int64_t images) const {
    if (depth > 0) return {first, images, image, g.Pixels() * depth, depth, 1};
    return {first, images, image, 1, g.Cells() * g.Depth(), g.Cells()};
  }
};

// So that steps of a power of two are in different banks of shared memory.
__device__ __forceinline__ int Skewed(int i) { return i + i / 32; }

// Between `tile` pixels in shared memory, as they are, and their places in a
// repacked image. A warp has a cell. Calls body(index in shared memory, index
// in the images); the first is -1 where a pixel is filled up.
template <typename Body>
__device__ __forceinline__ void ForEachPacked(const RoiGeometry& g,
                                              const Packing& packing,
                                              int64_t image, int64_t first,
                                              int pixels, const Body& body) {
  const int depth = static_cast<int>(packing.depth);
  const int plain_depth = static_cast<int>(g.Depth());
  const int cells = static_cast<int>(g.Cells());
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int cell = static_cast<int>(threadIdx.x) / 32; cell < cells;
       cell += kPackThreads / 32) {
    const int64_t start = ((image * cells + cell) * g.Pixels() + first) * depth;
    int pixel = lane / depth, o = lane % depth;
    for (int i = lane; i < pixels * depth; i += 32) {
      body(o < plain_depth ? Skewed((pixel * plain_depth + o) * cells + cell)
                           : -1,
           start + i);
      pixel += 32 / depth;
      o += 32 % depth;
      if (o >= depth) {
        o -= depth;
        ++pixel;
      }
    }
  }
}

// Copies images from their order to the repacked one or, if kBack, back.
template <bool kBack, typename From, typename To>
__global__ void __launch_bounds__(kPackThreads)
    PackKernel(RoiGeometry g, Packing packing, const From* __restrict__ from,
               To* __restrict__ to) {
  From* shared = reinterpret_cast<From*>(SharedMemory());
  const int64_t block = blockIdx.x, image = block / packing.tiles;
  const int64_t first = block % packing.tiles * packing.tile;
  const int pixels = static_cast<int>(Min(packing.tile, g.Pixels() - first));
  const int64_t channels = g.Cells() * g.Depth();
  const int64_t plain = (image * g.Pixels() + first) * channels;
  const int elements = pixels * static_cast<int>(channels);
  if constexpr (kBack) {
    ForEachPacked(g, packing, image, first, pixels, [&](int i, int64_t at) {
      if (i >= 0) shared[i] = from[at];
    });
    __syncthreads();
    for (int i = threadIdx.x; i < elements; i += kPackThreads) {
      Narrow(shared[Skewed(i)], to + plain + i);
    }
  } else {
    for (int i = threadIdx.x; i < elements; i += kPackThreads) {
      shared[Skewed(i)] = from[plain + i];
    }
    __syncthreads();
    ForEachPacked(g, packing, image, first, pixels, [&](int i, int64_t at) {
      to[at] = i >= 0 ? shared[i] : To();
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    NarrowKernel(int64_t count, const float* __restrict__ from,
                 T* __restrict__ to) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPackThreads;
  for (int64_t i =
           static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
       i < count; i += step) {
    Narrow(from[i], to + i);
  }
}

// -----------------------------------------------------------------------------
// On the host.

template <int kN>
struct Lanes {
  static constexpr int value = kN;
};

// Calls body(Lanes<n>()): with as many channels as 16 bytes hold, if those of a
// class can be moved so, else with 1.
template <typename T, typename Body>
Status WithLanes(const RoiGeometry& g, const Maps& maps, const T* pointer,
                 const Body& body) {
  constexpr int kN = kPack<T>;
  const bool fits = g.classes == 1 ? RoundUp(g.class_channels, kN) <= maps.pixel
                                   : g.class_channels.value % kN == 0;
  if (fits && maps.channel == 1 && maps.pixel % kN == 0 &&
      IsAligned(pointer, 16)) {
    return body(Lanes<kN>());
  }
  return body(Lanes<1>());
}

// Bytes for PoolPass and DisplacePass.
template <typename T>
int64_t PoolWorkspace(const RoiGeometry& g) {
  const Packing packing(g, sizeof(T));
  return packing.depth == 0 ? 0 : packing.step * packing.image * sizeof(T);
}

// Calls body(maps, where they are) for as many images at a time as are
// repacked; once for all if nothing has to be.
template <typename T, typename Body>
Status ForEachPackedChunk(const RoiGeometry& g, const T* inputs,
                          void* workspace, const CudaStream& stream,
                          const Body& body) {
  const Packing packing(g, sizeof(T));
  if (packing.depth == 0) return body(packing.MapsFrom(g, 0, g.batch), inputs);
  T* const packed = static_cast<T*>(workspace);
  for (int64_t first = 0; first < g.batch; first += packing.step) {
    const int64_t images = Min(packing.step, g.batch - first);
    TF_DEFORM_RETURN_IF_ERROR(Launch("PackKernel", PackKernel<false, T, T>,
                                     images * packing.tiles, kPackThreads,
                                     packing.shared_bytes, stream, g, packing,
                                     inputs + first * g.Image(), packed));
    TF_DEFORM_RETURN_IF_ERROR(body(packing.MapsFrom(g, first, images), packed));
  }
  return Status();
}

// Writes output and, if not null, count.
template <typename T, typename Rule, typename E>
Status PoolPass(const Rule& rule, const T* inputs, const E* rois,
                const E* displacements, void* workspace, T* output,
                float* count, const CudaStream& stream) {
  return ForEachPackedChunk(
      rule, inputs, workspace, stream, [&](const Maps& maps, const T* from) {
        return WithLanes(rule, maps, from, [&](auto lanes) {
          constexpr int kN = decltype(lanes)::value;
          const Blocking blocking(CeilDiv(rule.class_channels, kN));
          return Launch("PoolKernel", PoolKernel<kN, T, Rule, E>,
                        blocking.Blocks(rule), blocking.threads,
                        blocking.bins * sizeof(Bin<E>), stream, rule, maps,
                        blocking, from, rois, displacements, output, count);
        });
      });
}

// Writes the gradient of the displacements.
template <typename T, typename Rule, typename E>
Status DisplacePass(const Rule& rule, const T* inputs, const E* rois,
                    const E* displacements, const T* grad_output,
                    void* workspace, E* grad_displacements,
                    const CudaStream& stream) {
  const int64_t total =
      rule.num_rois * rule.part_h * rule.part_w * rule.classes;
  TF_DEFORM_RETURN_IF_ERROR(
      Clear(grad_displacements, 2 * total * sizeof(E), stream));
  return ForEachPackedChunk(
      rule, inputs, workspace, stream, [&](const Maps& maps, const T* from) {
        return WithLanes(rule, maps, from, [&](auto lanes) {
          constexpr int kN = decltype(lanes)::value;
          int each = 1;
          while (each < 32 && each * kN < rule.class_channels) each *= 2;
          const int owned = static_cast<int>(Min(kMaxBins, kThreads / each));
          const int threads =
              static_cast<int>(RoundUp(Max(2, each) * owned, 32));
          return Launch("DisplaceKernel", DisplaceKernel<kN, T, Rule, E>,
                        CeilDiv(total, owned), threads, owned * sizeof(Bin<E>),
                        stream, rule, maps, owned, each, from, rois,
                        displacements, grad_output, grad_displacements);
        });
      });
}

// The gradient of the inputs needs sums of its own where it is narrow or
// repacked; not where its pixels have owners.
template <typename T>
bool HasSums(const Packing& packing) {
  return sizeof(T) < sizeof(Accumulator<T>) || packing.depth > 0;
}

template <typename T>
int64_t ScatterWorkspace(const RoiGeometry& g, const CudaStream& stream) {
  const Packing packing(g, sizeof(Accumulator<T>));
  if (stream.deterministic || !HasSums<T>(packing)) return 0;
  return packing.step * packing.image * sizeof(Accumulator<T>);
}

// Writes the gradient of the inputs.
template <typename T, typename Rule, typename E>
Status ScatterPass(const Rule& rule, const E* rois, const E* displacements,
                   const T* grad_output, void* workspace, T* grad_inputs,
                   const CudaStream& stream) {
  if (rule.Image() == 0) return Status();
  const int64_t bytes = sizeof(E);
  if (stream.deterministic) {
    const int threads = static_cast<int>(
        Min(kThreads, Max(2 * kMaxBins, RoundUp(rule.Depth(), 32))));
    const Tiles tiles = {CeilDiv(rule.height, kTileRows),
                         CeilDiv(rule.width, kTileColumns),
                         CeilDiv(rule.Depth(), threads)};
    return Launch(
        "OwnedScatterKernel", OwnedScatterKernel<T, Rule, E>,
        rule.batch * tiles.rows * tiles.columns * rule.Cells() * tiles.slices,
        threads,
        kMaxBins * sizeof(Bin<E>) + threads * kTileRows * kTileColumns * bytes,
        stream, rule, tiles, rois, displacements, grad_output, grad_inputs);
  }
  const Packing packing(rule, bytes);
  const bool has_sums = HasSums<T>(packing);
  const int64_t step = has_sums ? packing.step : Max(1, rule.batch);
  for (int64_t first = 0; first < rule.batch; first += step) {
    const int64_t images = Min(step, rule.batch - first);
    const int64_t elements = images * packing.image;
    const Maps maps = packing.MapsFrom(rule, first, images);
    T* const target = grad_inputs + first * rule.Image();
    E* sums = static_cast<E*>(workspace);
    if constexpr (sizeof(T) == sizeof(E)) {
      if (!has_sums) sums = target;
    }
    TF_DEFORM_RETURN_IF_ERROR(Clear(sums, elements * bytes, stream));
    TF_DEFORM_RETURN_IF_ERROR(WithLanes(rule, maps, sums, [&](auto lanes) {
      constexpr int kN = decltype(lanes)::value;
      const Blocking blocking(CeilDiv(rule.class_channels, kN));
      return Launch("ScatterKernel", ScatterKernel<kN, T, Rule, E>,
                    blocking.Blocks(rule), blocking.threads,
                    blocking.bins * sizeof(Bin<E>), stream, rule, maps,
                    blocking, rois, displacements, grad_output, sums);
    }));
    if (packing.depth > 0) {
      TF_DEFORM_RETURN_IF_ERROR(
          Launch("PackKernel", PackKernel<true, E, T>, images * packing.tiles,
                 kPackThreads, packing.shared_bytes, stream, RoiGeometry(rule),
                 packing, static_cast<const E*>(sums), target));
    } else if constexpr (sizeof(T) < sizeof(E)) {
      TF_DEFORM_RETURN_IF_ERROR(
          Launch("NarrowKernel", NarrowKernel<T>,
                 Min(CeilDiv(elements, kPackThreads), 8 * Multiprocessors()),
                 kPackThreads, 0, stream, elements, static_cast<const E*>(sums),
                 target));
    }
  }
  return Status();
}

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_ROI_POOLING_INL_H_

// SPDX-License-Identifier: Apache-2.0
// Divides the threads of a block among bins and channels, for pooling on a GPU.

#ifndef TF_DEFORM_CC_CORE_CUDA_ROI_LANES_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_ROI_LANES_INL_H_

#include "cc/core/cuda/roi_bins-inl.h"

namespace tf_deform {
namespace cuda {

// Loads kN elements that lie side by side, widened.
template <int kN, typename T, typename E>
__device__ __forceinline__ void LoadWide(const T* from, E (&to)[kN]) {
  const Pack<T, kN> pack = *reinterpret_cast<const Pack<T, kN>*>(from);
#pragma unroll
  for (int i = 0; i < kN; ++i) to[i] = Widen(pack.values[i]);
}

// Loads the first `count` of kN elements, widened, and zeros behind them.
template <int kN, typename T, typename E>
__device__ __forceinline__ void LoadSome(const T* from, int64_t count,
                                         E (&to)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) to[i] = i < count ? Widen(from[i]) : E(0);
}

// Calls body(offset of the pixel, a, b) for row a and column b of a bin.
template <typename E, typename Body>
__device__ __forceinline__ void ForEachPixel(const Maps& maps, int64_t width,
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

// The division of a block of PoolPass or ScatterPass: among `bins`, in each of
// which `lanes` threads have some channels. A wide bin has several blocks.
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

// The bin and the channels that a thread of PoolPass or ScatterPass works on.
template <typename E>
struct Worker {
  Planner<E> planner;
  const Bin<E>* bin;
  int64_t channel;  // the thread's first one, in the class
  int64_t count;    // channels from it to the end of the class, 0: idle

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

template <int kN>
struct Lanes {
  static constexpr int value = kN;
};

// Calls body(Lanes<n>()), where n is the number of channels that a thread reads
// at once: as many as 16 bytes hold if all of a class can be read so, else 1.
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

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_ROI_LANES_INL_H_

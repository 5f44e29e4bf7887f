// SPDX-License-Identifier: Apache-2.0
// Repacks images for pooling on a GPU.
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

#ifndef TF_DEFORM_CC_CORE_CUDA_ROI_PACKING_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_ROI_PACKING_INL_H_

#include "cc/core/cuda/roi_lanes-inl.h"

namespace tf_deform {
namespace cuda {

constexpr int64_t kScratchBytes = int64_t{64} << 20;  // of repacked images
constexpr int kPackThreads = 256;
constexpr int64_t kPackBytes = 16 * 1024;  // of a block's pixels

// Decides whether and how images whose elements have `bytes` bytes are
// repacked.
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
    // Compares the cost of reading bins of nine pixels with the cost of copying
    // all images.
    const double reads = 9.0 * static_cast<double>(g.num_rois) *
                         static_cast<double>(g.Bins()) *
                         static_cast<double>(g.Depth());
    const double copied =
        2.0 * static_cast<double>(g.batch) * static_cast<double>(image * bytes);
    if (g.Cells() > 1 && g.batch * image > 0 &&
        channels * bytes <= 2 * kPackBytes &&
        image * bytes <= kScratchBytes / 2 &&
        reads * static_cast<double>(32 - bytes) > copied) {
      // Fills pixels up to 16 bytes if the filling is small.
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

// Spreads steps of a power of two over different banks of shared memory.
__device__ __forceinline__ int Skewed(int i) { return i + i / 32; }

// Calls body(index in shared memory, index in the images) for the elements of
// `pixels` pixels, which lie in shared memory in their own order and in `image`
// repacked. The first index is -1 where a pixel is filled up. A warp has a
// cell.
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

// Returns the bytes of the repacked images of a pass over inputs of T.
template <typename T>
int64_t PackedBytes(const RoiGeometry& g) {
  const Packing packing(g, sizeof(T));
  return packing.depth == 0 ? 0 : packing.step * packing.image * sizeof(T);
}

// Calls body(Lanes<n>(), maps, where they are) for the images that are repacked
// at a time; calls it once for all images if none has to be repacked. See
// WithLanes for n.
template <typename T, typename Body>
Status ForEachPackedChunk(const RoiGeometry& g, const T* inputs,
                          void* workspace, const CudaStream& stream,
                          const Body& body) {
  const Packing packing(g, sizeof(T));
  const auto call = [&](const Maps& maps, const T* from) {
    return WithLanes(g, maps, from,
                     [&](auto lanes) { return body(lanes, maps, from); });
  };
  if (packing.depth == 0) return call(packing.MapsFrom(g, 0, g.batch), inputs);
  T* const packed = static_cast<T*>(workspace);
  for (int64_t first = 0; first < g.batch; first += packing.step) {
    const int64_t images = Min(packing.step, g.batch - first);
    TF_DEFORM_RETURN_IF_ERROR(Launch("PackKernel", PackKernel<false, T, T>,
                                     images * packing.tiles, kPackThreads,
                                     packing.shared_bytes, stream, g, packing,
                                     inputs + first * g.Image(), packed));
    TF_DEFORM_RETURN_IF_ERROR(call(packing.MapsFrom(g, first, images), packed));
  }
  return Status();
}

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_ROI_PACKING_INL_H_

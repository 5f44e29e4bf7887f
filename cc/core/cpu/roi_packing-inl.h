// SPDX-License-Identifier: Apache-2.0
// Repacks images for pooling on the CPU.
//
// The file has no include guard: see simd-inl.h.
//
// The channels of position-sensitive maps are ordered (output channel, cell),
// but a bin reads all output channels of one cell. So the passes work on
// repacked images, [image][cell][row][column][output channel]. With one cell
// the two orders are the same, and nothing is repacked.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Pixels whose channels are in the cache while cell after cell is packed.
constexpr int64_t kPackPixels = 8;

// Calls body(image, first pixel, pixels), at most kPackPixels at a time. Tasks
// are long runs of pixels, because neighbours write to the same lines of the
// cache.
template <typename Body>
static void ForEachPackTile(const RoiGeometry& g, int64_t images,
                            const ParallelFor& parallel_for, const Body& body) {
  const int64_t pixels = g.Pixels();
  const int64_t parts =
      Min(CeilDiv(4 * parallel_for.num_workers, Max(images, 1)),
          CeilDiv(pixels, kPackPixels));
  RunTasks(parallel_for, images * parts, [&](int64_t task, int) {
    const int64_t part = task % parts;
    const int64_t end = (part + 1) * pixels / parts;
    for (int64_t first = part * pixels / parts; first < end;
         first += kPackPixels) {
      body(task / parts, first, Min(kPackPixels, end - first));
    }
  });
}

// Copies images from their order to the repacked one.
template <typename T>
static void PackImages(const RoiGeometry& g, const T* from, int64_t images,
                       T* packed, const ParallelFor& parallel_for) {
  const int64_t depth = g.Depth(), cells = g.Cells(), pixels = g.Pixels();
  ForEachPackTile(
      g, images, parallel_for, [=](int64_t image, int64_t first, int64_t n) {
        const T* source = from + (image * pixels + first) * cells * depth;
        for (int64_t cell = 0; cell < cells; ++cell) {
          T* to = packed + ((image * cells + cell) * pixels + first) * depth;
          for (int64_t i = 0; i < n * depth; ++i) {
            to[i] = source[i * cells + cell];
          }
        }
      });
}

// Copies repacked images back to their order, narrowed to T.
template <typename T, typename E>
static void UnpackImages(const RoiGeometry& g, const E* packed, int64_t images,
                         T* to, const ParallelFor& parallel_for) {
  const int64_t depth = g.Depth(), cells = g.Cells(), pixels = g.Pixels();
  ForEachPackTile(
      g, images, parallel_for, [=](int64_t image, int64_t first, int64_t n) {
        T* target = to + (image * pixels + first) * cells * depth;
        for (int64_t cell = 0; cell < cells; ++cell) {
          const E* from =
              packed + ((image * cells + cell) * pixels + first) * depth;
          for (int64_t i = 0; i < n * depth; ++i) {
            Narrow(from[i], target + i * cells + cell);
          }
        }
      });
}

// Elements behind repacked images that may be read: PoolPass reads the last
// channels of a bin, few as they are, as half a vector.
constexpr int64_t kOverread = 32;

// The number of images that are repacked at a time: as many as fit in
// kScratchBytes for each worker, but at least one.
static int64_t ImagesAtOnce(const RoiGeometry& g, int64_t element_bytes,
                            int num_workers) {
  const int64_t image = g.Image() * element_bytes;
  if (image == 0) return Max(1, g.batch);
  return Max(1, Min(g.batch, kScratchBytes * num_workers / image));
}

// Calls body(first image, number of images, map) for the images that are
// repacked at a time, with `map` where `first image` starts; calls it once for
// all images if none has to be repacked.
template <typename T, typename Body>
static void ForEachPackedChunk(const RoiGeometry& g, const T* inputs,
                               void* workspace, const ParallelFor& parallel_for,
                               const Body& body) {
  if (g.Cells() == 1) return body(0, g.batch, inputs);
  T* const packed = static_cast<T*>(workspace);
  const int64_t step = ImagesAtOnce(g, sizeof(T), parallel_for.num_workers);
  for (int64_t first = 0; first < Max(1, g.batch); first += step) {
    const int64_t images = Min(step, g.batch - first);
    PackImages(g, inputs + first * g.Image(), images, packed, parallel_for);
    body(first, images, packed);
  }
}

// Returns the bytes of the repacked images of a pass over inputs of T.
template <typename T>
static int64_t PackedBytes(const RoiGeometry& g, int num_workers) {
  if (g.Cells() == 1) return 0;
  const int64_t elements =
      ImagesAtOnce(g, sizeof(T), num_workers) * g.Image() + kOverread;
  return RoundUp(elements * static_cast<int64_t>(sizeof(T)), 64);
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Divides the gradient of the inputs of a deformable convolution on the CPU
// among workers.
//
// The file has no include guard: see simd-inl.h.
//
// The output of each image is divided into strips of pixels. While a strip is
// worked on, it owns the rows of the gradient of the inputs around it.
// Gradients of these rows are added at once; gradients of other rows are
// deferred: written down, and added when no strip is worked on. All even strips
// are worked on together, then all odd strips. So each strip owns half of its
// idle neighbours' rows, and only samples far away are deferred. The order of
// the sum at a pixel depends on strips, offsets and kDeferredBytes, not on the
// number of workers. The same holds for the gradient of a small kernel: each
// pair of an even and an odd strip has its own sums.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// The largest number of pixels in a tile: a multiple of kMicroRows, and of the
// 16 rows that AMX reads at a time.
constexpr int64_t kDataPixels = kMicroRows == 14 ? 112 : 108;
static_assert(kMicroRows != 14 || kDataPixels % 16 == 0, "rows of AMX");

// The largest number of bytes that one pixel may defer, unless kPanel rows take
// more.
constexpr int64_t kPixelBytes = 4 << 10;

// Bytes for the deferred gradients of all strips that are worked on together. A
// strip's share, 1/30 at least, has room for the gradients of kLanes pixels.
// Together with the scratch of one worker (DataScratch) these bytes must stay
// within kScratchBytes.
constexpr int64_t kDeferredBytes = 5 << 19;

// The largest number of images that are worked on together, and of the strips
// of all these images.
constexpr int64_t kImagesAtOnce = 64;
constexpr int64_t kStripsAtOnce = 32;

// The gradient of a kernel of at most kFusedBytes, with at most kFusedFilters
// filters in a group, is made in the same pass. The corners are then read once
// instead of twice, which takes 4 to 28 % off the backward pass; but the sums
// of the kernel leave the caches sooner than in a pass of their own, and for
// kernels of 300 KiB or more this costs more than it saves.
constexpr int64_t kFusedBytes = 256 << 10;
constexpr int64_t kFusedFilters = 256;

// At least kFusedPairs strips must then be worked on at the same time: a pass
// for the kernel alone would keep any number of workers busy.
constexpr int64_t kFusedPairs = 4;

// The least number of rows of an image's output in a strip.
constexpr int64_t kStripRows = 7;

// A header of gradients, one sample's channels, that wait to be added; the
// elements follow it.
template <typename E>
struct Deferred {
  int64_t corner;  // element of the image: top left corner, first channel
  int32_t flags;   // the corners that wait
  int32_t top;     // row of the first of them
  int64_t count;   // channels
  E mask;
  Weights<E> weights;

  static int64_t Bytes(int64_t count) {
    return RoundUp(static_cast<int64_t>(sizeof(Deferred)), 64) +
           RoundUp(count * static_cast<int64_t>(sizeof(E)), 64);
  }
  E* Gradient() {
    return reinterpret_cast<E*>(reinterpret_cast<char*>(this) +
                                RoundUp(sizeof(Deferred), 64));
  }
};

struct StripBlock;

// A strip of an image's output, and how far it has come.
struct Strip {
  int64_t n;
  int64_t first, last;          // pixels of the batch's output
  int64_t row_first, row_last;  // its own rows of the image
  int64_t bundle, begin, next;  // to do next: bundle, its row, pixel
  int64_t used;                 // bytes of deferred gradients
  char* deferred;
  int64_t pair;  // number of its pair, which shares `deferred` and kernel sums

  bool IsDone(const Geometry& g) const { return bundle == g.Bundles(); }
  // Moves on to the first pixel of the next block of rows.
  void ToBlockAfter(const StripBlock& block);
};

// The block of rows that a strip works on next.
struct StripBlock {
  Bundle bundle;
  int64_t begin, end;  // rows of the bundle
  int64_t num_runs;
  int64_t most;  // bytes that a pixel may defer

  // Writes the block's runs to `runs`.
  template <typename E>
  static StripBlock At(const Geometry& g, const Blocks& blocks,
                       const Strip& strip, Run* runs) {
    StripBlock block = {Bundle(g, strip.bundle), strip.begin, 0, 0, 0};
    block.end = blocks.End(g, block.bundle, block.begin);
    block.num_runs = FindRuns(g, block.bundle, block.begin, block.end, runs);
    for (int64_t run = 0; run < block.num_runs; ++run) {
      block.most += Deferred<E>::Bytes(runs[run].count);
    }
    return block;
  }
};

inline void Strip::ToBlockAfter(const StripBlock& block) {
  next = first;
  begin = block.end;
  if (begin < block.bundle.rows) return;
  ++bundle;
  begin = 0;
}

// Rows of columns whose gradients are made together: as many as kPixelBytes
// lets a pixel defer, or kPanel.
template <typename E>
static Blocks DataBlocks(const Geometry& g) {
  const int64_t channels = Bundle(g, g.Bundles() - 1).channels;  // the least
  const int64_t runs_per_tap =
      g.Bundles() == 1 ? g.offset_groups : channels / g.offset_channels + 2;
  int64_t rows = kPixelBytes / static_cast<int64_t>(sizeof(E)) / kPanel<E>;
  for (rows *= kPanel<E>; rows > kPanel<E>; rows -= kPanel<E>) {
    // Runs end where taps, bundles, offset groups and blocks do.
    const int64_t runs = (rows / channels + 2) * runs_per_tap;
    if (rows * static_cast<int64_t>(sizeof(E)) + runs * 2 * 64 <= kPixelBytes) {
      break;
    }
  }
  return Blocks(g, rows, kPanel<E>);
}

// Scratch of a worker. O is as in ColumnScratch.
template <typename T, typename O>
struct DataScratch {
  using E = typename AccumulatorOf<T>::Type;

  E* columns;           // [kDataPixels][stride], gradients
  O* grad_rows;         // [kDataPixels][kTileStride], a tile of grad_output
  E* grad_packed;       // the same as a packed B, for the kernel's gradient
  Pixels<E> pixels;     // of the tile
  Run* runs;            // [block rows]
  Samples<E>* samples;  // [block rows], of the runs at kLanes pixels
  T* zeros;             // [block rows]
  int64_t stride;

  DataScratch(const Blocks& blocks, bool fused, Arena* arena)
      : columns(arena->Take<E>(kDataPixels * (blocks.limit + 16))),
        grad_rows(arena->Take<O>(kDataPixels * kTileStride)),
        grad_packed(arena->Take<E>(fused ? kDataPixels * kFusedFilters : 0)),
        pixels(kDataPixels, arena),
        runs(arena->Take<Run>(blocks.limit)),
        samples(arena->Take<Samples<E>>(blocks.limit)),
        zeros(arena->Take<T>(blocks.limit)),
        stride(blocks.limit + 16) {}
};

// The division of the work of one call.
template <typename T, typename O>
struct DataPlan {
  using E = typename AccumulatorOf<T>::Type;

  Geometry g;
  Blocks blocks;
  bool scatter;            // the gradient of the inputs is wanted
  int64_t scratch_bytes;   // of a DataScratch
  int64_t images;          // worked on together
  int64_t wide_bytes;      // of their gradients in float32, for 16-bit types
  int64_t strips;          // of an image: 1 or an even number
  int64_t deferred_bytes;  // of a strip
  int64_t pairs;           // strips worked on at the same time
  // The gradient of the kernel is made in the same pass. Every pair of strips
  // then has sums of its own, which leave less room for deferred gradients.
  bool fused;

  DataPlan(const DeformableConv2DParams& params, bool wants_inputs)
      : g(params), blocks(DataBlocks<E>(g)), scatter(wants_inputs) {
    constexpr bool narrow = Operands<T>::kNarrow;
    const int64_t float_image = g.image * static_cast<int64_t>(sizeof(E));
    images = Min(g.batch, kImagesAtOnce);
    if (narrow) {
      // Small images are worked on together, unless they have strips, which
      // need the room themselves.
      const int64_t fit = Max(1, kDeferredBytes / Max(1, float_image));
      images = CeilDiv(images, CeilDiv(Max(1, images), fit));
      if (images < 4 || g.out_h >= 4 * kStripRows) images = Min(g.batch, 1);
    }
    wide_bytes = narrow && scatter ? RoundUp(images * float_image, 64) : 0;
    strips = 1;
    if (g.height >= 4 && !IsSerial(g)) {
      while (strips * 2 * kStripRows <= g.out_h &&
             strips * images < kStripsAtOnce) {
        strips *= 2;
      }
      if (strips < 4) strips = images < 4 ? 4 : 1;
    }
    pairs = Max(1, strips == 1 ? images : images * strips / 2);
    int64_t place = kDeferredBytes;
    if (narrow && images > 1) place -= images * float_image;
    const int64_t least = strips == 1 ? 0 : pairs * (kDeferredBytes / 30);
    fused = std::is_same<O, E>::value && g.group_filters <= kFusedFilters &&
            KernelBytes() <= kFusedBytes &&
            (pairs >= kFusedPairs || IsSerial(g)) &&
            pairs * KernelBytes() + least <= place;
    if (fused) place -= pairs * KernelBytes();
    deferred_bytes = strips == 1 ? 0 : place / pairs / 64 * 64;
    Arena arena{nullptr};
    DataScratch<T, O>(blocks, fused, &arena);
    scratch_bytes = arena.used;
  }

  // Bytes of the sums of the gradient of the kernel.
  int64_t KernelBytes() const {
    return RoundUp(g.rows * g.group_filters * static_cast<int64_t>(sizeof(E)),
                   64);
  }

  int64_t KernelElements() const {
    if (g.depthwise) return g.taps * g.filters;
    return PackedInner<O>(g.group_filters) *
           (g.groups == 1
                ? PackedColumns<O>(g.rows)
                : g.taps * g.groups * PackedColumns<O>(g.group_channels));
  }
  int64_t StripBytes() const {
    return RoundUp(images * strips * static_cast<int64_t>(sizeof(Strip)), 64);
  }
  int64_t DeferredBytes() const { return scatter ? pairs * deferred_bytes : 0; }
};

// Adds a sample's gradient to the corners of the image that `flags` names.
template <typename E>
static void AddToCorners(const Sampling<E>& in, int32_t flags, const E* columns,
                         int64_t count, E mask, const Weights<E>& weights,
                         E* to) {
  const auto add = [&](int32_t corner, int64_t distance, E weight) {
    if (!(flags & corner)) return;
    E* at = to + distance;
    ForEachVector<E>(count, [&](auto lanes, int64_t i) {
      constexpr int kN = lanes.value;
      const Vector<E, kN> scaled = mask * Load<kN>(columns + i);
      Store(Load<kN>(at + i) + weight * scaled, at + i);
    });
  };
  add(kTopLeft, 0, weights.top_left);
  add(kTopRight, in.pixel, weights.top_right);
  add(kBottomLeft, in.row, weights.bottom_left);
  add(kBottomRight, in.row + in.pixel, weights.bottom_right);
}

// Returns the corners of a sample that lie in rows [first, last).
static inline int32_t CornersInRows(int32_t flags, int32_t top, int64_t first,
                                    int64_t last) {
  int32_t mine = 0;
  if (top >= first && top < last) mine |= kTopLeft | kTopRight;
  if (top + 1 >= first && top + 1 < last) mine |= kBottomLeft | kBottomRight;
  return flags & mine;
}

// Adds the gradients that `strip` has deferred for rows [first, last) of its
// image.
template <typename E>
static void AddDeferred(const Sampling<E>& in, const Strip& strip,
                        int64_t first, int64_t last, E* grad_image) {
  for (int64_t at = 0; at < strip.used;) {
    auto* entry = reinterpret_cast<Deferred<E>*>(strip.deferred + at);
    at += Deferred<E>::Bytes(entry->count);
    const int32_t mine = CornersInRows(entry->flags, entry->top, first, last);
    if (mine == 0) continue;
    AddToCorners(in, mine, entry->Gradient(), entry->count, entry->mask,
                 entry->weights, grad_image + entry->corner);
  }
}

// Divides the output of `count` images from image n on into strips.
template <typename T, typename O>
static void MakeStrips(const DataPlan<T, O>& plan, int64_t n, int64_t count,
                       char* deferred, Strip* strips) {
  const Geometry& g = plan.g;
  const auto start = [&](int64_t strip) {
    return g.pixels * strip / plan.strips;
  };
  // Returns the row of the image under the middle of the kernel where a strip
  // starts.
  const auto row = [&](int64_t strip) {
    if (strip <= 0) return int64_t{0};
    if (strip >= plan.strips) return g.height;
    const int64_t y = start(strip) / g.out_w * g.stride_h - g.pad_top +
                      (g.kernel_h - 1) * g.dilation_h / 2;
    return Max(0, Min(y, g.height));
  };
  for (int64_t image = 0; image < count; ++image) {
    for (int64_t i = 0; i < plan.strips; ++i) {
      Strip& strip = strips[image * plan.strips + i];
      const int64_t first = (n + image) * g.pixels;
      strip = {};
      strip.n = n + image;
      strip.first = strip.next = first + start(i);
      strip.last = first + start(i + 1);
      strip.row_first = i == 0 ? 0 : (row(i - 1) + row(i)) / 2;
      strip.row_last =
          i + 1 >= plan.strips ? g.height : (row(i + 1) + row(i + 2)) / 2;
      // An even and an odd strip, never worked on at the same time, are a pair.
      strip.pair = (image * plan.strips + i) / (plan.strips == 1 ? 1 : 2);
      strip.deferred = deferred + strip.pair * plan.deferred_bytes;
    }
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

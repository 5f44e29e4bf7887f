// SPDX-License-Identifier: Apache-2.0
// Runs deformable convolution on the CPU, for one instruction set, tile by
// tile.
//
// The file has no include guard: see simd-inl.h.
//
// The convolution is a matrix product of columns (a row for every output pixel;
// an entry for every tap and channel: the sample there times its mask) and the
// kernel (rows in the same order of taps and channels; a column for every
// filter). The columns exist only as tiles in a worker's scratch. A tile flows
// through
//
//   Samples       The places where one tap reads, at a vector of pixels:
//                 corners, weights, mask, worked out once and shared by all
//                 channels of an offset group (conv2d_sampling-inl.h).
//   columns       [pixel][row]: for each pixel and tap the four corners are
//                 read along their channels, mixed, and written where the
//                 product reads them (conv2d_columns-inl.h). At most
//                 half of the second-level cache.
//   MatrixProduct A panel of the packed kernel (256 rows by two vectors) stays
//                 in the first-level cache while all pixels pass by, 14 (AVX2:
//                 6) at a time, whose sums stay in registers
//                 (matrix-inl.h). In bfloat16, where there is AMX
//                 or AVX-512 BF16, all three are bfloat16 tiles
//                 (matrix_bfloat16-inl.h).
//
//   ForwardPass   A tile of columns is sampled and at once multiplied by the
//                 packed kernel into its pixels' outputs. If there are
//                 several tiles, the kernel is packed once, before; a single
//                 tile packs it block by block, which then stays in the caches.
//   DataPass      The gradient of a tile's columns is grad_output times the
//                 transposed packed kernel. A second look at the image's
//                 corners turns it into gradients of offset and mask, which
//                 belong to the tile's own pixels; in the same look it is added
//                 to the gradient of the inputs, which lands anywhere in the
//                 image, divided into strips (conv2d_gradients-inl.h,
//                 conv2d_strips-inl.h, deformable_conv2d_data-inl.h). If the
//                 kernel is small, this look leaves the columns too, and the
//                 tile's share of the gradient of the kernel is made as in
//                 KernelPass.
//   KernelPass    Rows of the kernel (taps and channels) are divided among
//                 workers; each samples its part of the columns, tile after
//                 tile over all pixels, and adds the transposed tile times
//                 grad_output (deformable_conv2d_kernel-inl.h).
//
// The words for parts of this work:
//
//   bundle        Consecutive groups of the convolution, sampled in one go.
//   block         Rows of a bundle's columns that are worked on together.
//   tile          A block of rows at some pixels.
//   piece         Rows of a block that one product takes. With several groups
//                 every (tap, group) has a product of its own; where a group is
//                 one channel (depthwise), products are done element by
//                 element.
//   run           Rows of a block that share a tap and an offset group, and so
//                 their samples.
//   strip         Pixels that one worker takes in a DataPass; even and odd
//                 strips are pairs, which share a place for sums.
//   panel         Two vectors of columns of a packed operand.
//   part          The share of a task, where anything else is divided.
//
// Blocks and strips that decide the order of a sum depend on shapes alone, so
// that results never depend on the number of workers. The size of a forward
// tile does not affect the order of any sum, so the tile is as large as the
// second-level cache allows. conv2d_sampling-inl.h defines the names of
// indices.

#include "cc/core/cpu/simd-inl.h"
// Each of the next files builds on those before.
#include "cc/core/cpu/tasks-inl.h"
//
#include "cc/core/cpu/matrix-inl.h"
//
#if TF_DEFORM_VECTOR_BYTES == 64
#include "cc/core/cpu/matrix_bfloat16-inl.h"
#endif
//
#include "cc/core/cpu/conv2d_sampling-inl.h"
//
#include "cc/core/cpu/conv2d_columns-inl.h"
//
#include "cc/core/cpu/deformable_conv2d_kernel-inl.h"
//
#include "cc/core/cpu/conv2d_strips-inl.h"
//
#include "cc/core/cpu/conv2d_gradients-inl.h"
//
#include "cc/core/cpu/deformable_conv2d_data-inl.h"

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// -----------------------------------------------------------------------------
// Forward.

// The largest number of pixels in a tile: a multiple of kMicroRows. Groups, and
// a single tile, pack the kernel block by block; with this many pixels that
// takes a few percent of the time.
constexpr int64_t kForwardPixels = kMicroRows == 14 ? 504 : 480;

// Returns the pixels of a tile whose columns leave half of the second-level
// cache to other operands.
template <typename O>
static int64_t ForwardPixels() {
  const int64_t fit =
      SecondLevelCache() / 2 / (kTileStride * static_cast<int64_t>(sizeof(O)));
  return Max(1, Min(fit, kForwardPixels) / kMicroRows) * kMicroRows;
}

// Scratch of a worker. O is as in ColumnScratch.
template <typename T, typename O>
struct ForwardScratch : ColumnScratch<T, O> {
  using E = typename AccumulatorOf<T>::Type;

  O* packed;  // [kInner][kFilterBlock], a block of the kernel, if not shared
  E* sums;    // [kForwardPixels][kFilterBlock], for 16-bit types

  explicit ForwardScratch(Arena* arena)
      // AMX reads 16 rows at a time.
      : ColumnScratch<T, O>(RoundUp(kForwardPixels, 16), arena),
        packed(arena->Take<O>(kInner * kFilterBlock)),
        sums(arena->Take<E>(Operands<T>::kNarrow ? kForwardPixels * kFilterBlock
                                                 : 0)) {}

  static int64_t Bytes() {
    Arena arena{nullptr};
    ForwardScratch{&arena};
    return arena.used;
  }
};

// Elements of the packed kernel that all tiles share: for every block of rows a
// packed B of all filters; 0 if no tiles can share it.
template <typename O>
static int64_t SharedElements(const Geometry& g) {
  if (g.groups > 1 || g.total_pixels <= 1) return 0;
  return PackedInner<O>(g.rows) * PackedColumns<O>(g.filters);
}

// Bytes for ForwardPass, besides the packed kernel.
template <typename T, typename O>
static int64_t ForwardWorkspace(int num_workers) {
  return num_workers * ForwardScratch<T, O>::Bytes();
}

// Packs the kernel for all tiles.
template <typename T, typename O>
static void PackShared(const Geometry& g, const Blocks& blocks, const T* kernel,
                       O* packed, const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  constexpr int64_t kFilters = 8 * kPanel<E>;          // of a task
  const int64_t tasks = CeilDiv(g.filters, kFilters);  // of a block
  RunTasks(parallel_for, CeilDiv(g.rows, blocks.limit) * tasks,
           [&](int64_t task, int) {
             const int64_t begin = task / tasks * blocks.limit;
             const int64_t rows = Min(blocks.limit, g.rows - begin);
             const int64_t f = task % tasks * kFilters;
             PackPanels(kernel + begin * g.filters + f, g.filters, 1, rows,
                        Min(kFilters, g.filters - f),
                        packed + begin * PackedColumns<O>(g.filters) +
                            f * PackedInner<O>(rows));
           });
}

// The division of a forward pass into tiles of pixels, and of each tile's work
// into parts, each of which takes some of the filters.
struct ForwardTiles {
  int64_t tiles, parts;

  // `most` is the largest number of pixels of a tile, `panels` the number of
  // panels of a packed kernel, `is_far` whether it leaves the second-level
  // cache. The number of tiles is a multiple of the number of workers, or twice
  // as large unless tiles get too small, so that all workers end at about the
  // same time and can help a late worker. A kernel that is far is read again
  // for every tile, so tiles are then as large as possible. If there are few
  // pixels, several workers share a tile, and each takes some of the filters:
  // sampling the same pixels again costs less than reading the kernel again.
  // The division does not affect any sum.
  ForwardTiles(const Geometry& g, int64_t most, int64_t panels, bool is_far,
               int64_t workers) {
    const int64_t rounds = is_far ? 1 : 2;
    const int64_t fewest = CeilDiv(g.total_pixels, most);
    tiles = fewest;
    parts = 1;
    if (workers > 1 && !IsSerial(g)) {
      tiles = Max(fewest, Min(rounds * workers,
                              CeilDiv(g.total_pixels, CeilDiv(most, 4))));
      if (2 * tiles > workers || g.groups > 1) {
        tiles = RoundUp(tiles, workers);
      } else {
        while (tiles > fewest && workers % tiles != 0) --tiles;
        parts = Min(panels, workers / tiles);
        tiles = Max(tiles, workers / parts);
      }
    }
    tiles = Min(tiles, g.total_pixels);
  }

  // Returns whether a kernel of products' elements O is far.
  template <typename O>
  static bool IsFar(const Geometry& g) {
    return g.rows * g.group_filters * static_cast<int64_t>(sizeof(O)) >
           SecondLevelCache();
  }

  template <typename T, typename O>
  static ForwardTiles Of(const Geometry& g, int64_t workers) {
    using E = typename AccumulatorOf<T>::Type;
    return ForwardTiles(g, ForwardPixels<O>(),
                        CeilDiv(g.group_filters, kPanel<E>), IsFar<O>(g),
                        workers);
  }
};

// Adds (at tap 0: writes) a tile's share to the sums of filters [f, f +
// filters) of each group of a depthwise bundle, element by element.
template <typename T, typename E>
static void DepthwiseProduct(const Geometry& g, const Bundle& bundle,
                             const T* kernel, int64_t begin, int64_t num_runs,
                             int64_t f, int64_t filters,
                             const ForwardScratch<T, E>& s, E* sums,
                             int64_t stride) {
  for (const Run* run = s.runs; run != s.runs + num_runs; ++run) {
    const T* from =
        kernel + run->tap * g.filters + run->channel * g.group_filters + f;
    for (int64_t j = 0; j < filters; ++j) {
      for (int64_t i = 0; i < run->count; ++i) {
        s.packed[j * kInner + i] = Load<1>(from + i * g.group_filters + j)[0];
      }
    }
    const bool first = run->tap == 0;
    for (int64_t p = 0; p < s.pixels.count; ++p) {
      const E* columns = s.columns + p * kTileStride + (run->row - begin);
      E* to = sums + p * stride + (run->channel - bundle.channel) * filters;
      for (int64_t j = 0; j < filters; ++j) {
        const E* weights = s.packed + j * kInner;
        if (filters == 1) {
          ForEachVector<E>(run->count, [&](auto lanes, int64_t i) {
            constexpr int kN = lanes.value;
            const Vector<E, kN> product =
                Load<kN>(columns + i) * Load<kN>(weights + i);
            Store(first ? product : Load<kN>(to + i) + product, to + i);
          });
          continue;
        }
        for (int64_t i = 0; i < run->count; ++i) {
          E* sum = to + i * filters + j;
          const E product = columns[i] * weights[i];
          *sum = first ? product : *sum + product;
        }
      }
    }
  }
}

// Overwrites filters [f_begin, f_end) of each group with NaN, at the pixels of
// a tile for which a branch predicted NaN.
template <typename T, typename E>
static void MarkNaN(const Geometry& g, const E* offset, int64_t first,
                    int64_t count, int64_t f_begin, int64_t f_end, T* output) {
  const int64_t n = g.offset_numbers;
  if (!AnyNaN(offset + first * n, count * n)) return;
  for (int64_t p = first; p < first + count; ++p) {
    if (!AnyNaN(offset + p * n, n)) continue;
    for (int64_t group = 0; group < g.groups; ++group) {
      for (int64_t f = f_begin; f < f_end; ++f) {
        Narrow(static_cast<E>(__builtin_nan("")),
               output + p * g.filters + group * g.group_filters + f);
      }
    }
  }
}

// Writes output.
template <typename T, typename O>
static void ForwardPass(const DeformableConv2DParams& params,
                        const DeformableConv2DInputs& inputs, void* workspace,
                        void* output, const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry g(params);
  if (g.total_pixels == 0) return;
  const Operands<T> operands(inputs, nullptr);
  const Blocks blocks(g, kInner, PackedInner<O>(16));
  const int64_t scratch_bytes = ForwardScratch<T, O>::Bytes();
  char* const scratch = static_cast<char*>(workspace);
  const int64_t panels = CeilDiv(g.group_filters, kPanel<E>);
  const bool is_far = ForwardTiles::IsFar<O>(g);
  const auto division = ForwardTiles::Of<T, O>(g, parallel_for.num_workers);
  const int64_t tiles = division.tiles, parts = division.parts;
  O* shared = nullptr;
  if (tiles > 1 && SharedElements<O>(g) > 0) {
    shared = static_cast<O*>(inputs.packed);
    if (shared == nullptr) {
      shared = reinterpret_cast<O*>(
          scratch + ForwardWorkspace<T, O>(parallel_for.num_workers));
    }
    PackShared(g, blocks, operands.kernel, shared, parallel_for);
  }
  // Panels of a tile's B that push each other out of the second-level cache are
  // fetched ahead, which takes 2 % off the pass.
  const bool fetches =
      shared != nullptr && is_far &&
      2 * kInner * g.filters * static_cast<int64_t>(sizeof(O)) >=
          SecondLevelCache();

  RunTasks(parallel_for, tiles * parts, [&](int64_t task, int worker) {
    const int64_t tile = task / parts, part = task % parts;
    const int64_t f_begin = panels * part / parts * kPanel<E>;
    const int64_t f_end =
        Min(panels * (part + 1) / parts * kPanel<E>, g.group_filters);
    Arena place{scratch + worker * scratch_bytes};
    ForwardScratch<T, O> s(&place);
    s.Clear();
    const int64_t first = g.total_pixels * tile / tiles;
    const int64_t count = g.total_pixels * (tile + 1) / tiles - first;
    s.pixels.Locate(g, first, count);
    for (int64_t index = 0; index < g.Bundles(); ++index) {
      const Bundle bundle(g, index);
      // Bundles of several groups have no more filters than a block.
      for (int64_t f = f_begin; f < f_end; f += kFilterBlock) {
        const int64_t filters = Min(kFilterBlock, f_end - f);
        T* to = static_cast<T*>(output) + first * g.filters + bundle.filter + f;
        E* sums = s.sums;
        int64_t stride = kFilterBlock;
        if constexpr (!Operands<T>::kNarrow) {
          sums = to;
          stride = g.filters;
        }
        for (int64_t begin = 0, end; begin < bundle.rows; begin = end) {
          end = blocks.End(g, bundle, begin);
          const int64_t num_runs =
              SampleColumns<T, O>(g, operands, bundle, begin, end, s);
          if constexpr (std::is_same<O, E>::value) {
            if (g.depthwise) {
              DepthwiseProduct<T, E>(g, bundle, operands.kernel, begin,
                                     num_runs, f, filters, s, sums, stride);
              continue;
            }
          }
          ForEachPiece(g, bundle, begin, end, [&](const Piece& piece) {
            const O* packed = s.packed;
            if (shared != nullptr) {
              packed = shared + begin * PackedColumns<O>(g.filters) +
                       f * PackedInner<O>(piece.count);
            } else {
              PackPanels(operands.kernel + piece.kernel_row * g.filters +
                             piece.group * g.group_filters + f,
                         g.filters, 1, piece.count, filters, s.packed);
            }
            MatrixProduct<false>(
                count, filters, piece.count, s.columns + (piece.row - begin),
                packed, sums + (piece.group - bundle.group) * g.group_filters,
                stride, piece.kernel_row > 0, kTileStride, fetches);
          });
        }
        if constexpr (Operands<T>::kNarrow) {
          const int64_t wide = g.BundleGroups() == 1 ? filters : bundle.filters;
          for (int64_t p = 0; p < count; ++p) {
            NarrowRow(sums + p * stride, wide, to + p * g.filters);
          }
        }
      }
    }
    if (g.modulation != Modulation::kMask) {
      MarkNaN(g, operands.offset, first, count, f_begin, f_end,
              static_cast<T*>(output));
    }
  });
}

// -----------------------------------------------------------------------------
// The functions that deformable_conv2d.cc chooses from.

// Calls body(T(), O()) with the type of the tensors and the type of the
// elements of products.
template <typename Body>
static void WithTypes(const DeformableConv2DParams& params, DataType type,
                      const Body& body) {
  (void)params;  // needed for bfloat16 only
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
#if TF_DEFORM_VECTOR_BYTES == 64
    if constexpr (std::is_same<T, BFloat16>::value) {
      // Groups that are whole registers need no zeros between them.
      const Geometry g(params);
      if (HasBFloat16Products() &&
          (g.groups == 1 || (g.group_channels % kAmxInner == 0 &&
                             g.group_filters % kAmxInner == 0))) {
        return body(zero, BFloat16());
      }
    }
#endif
    body(zero, typename AccumulatorOf<T>::Type());
  });
}

static int64_t PackedBytes(const DeformableConv2DParams& params,
                           DataType type) {
  int64_t bytes = 0;
  WithTypes(params, type, [&](auto, auto element) {
    using O = decltype(element);
    Arena arena{nullptr};
    arena.Take<O>(SharedElements<O>(Geometry(params)));
    bytes = arena.used;
  });
  return bytes;
}

static int64_t WorkspaceBytes(const DeformableConv2DParams& params,
                              DataType type, int num_workers) {
  int64_t bytes = PackedBytes(params, type);
  WithTypes(params, type, [&](auto zero, auto element) {
    bytes += ForwardWorkspace<decltype(zero), decltype(element)>(num_workers);
  });
  return bytes;
}

static int64_t BackwardPackedBytes(const DeformableConv2DParams& params,
                                   DataType type,
                                   const DeformableConv2DGradients& wanted) {
  int64_t bytes = 0;
  WithTypes(params, type, [&](auto zero, auto element) {
    bytes = DataPackedBytes<decltype(zero), decltype(element)>(params, wanted);
  });
  return bytes;
}

// The passes run one after the other in the same workspace.
static int64_t BackwardWorkspaceBytes(const DeformableConv2DParams& params,
                                      DataType type,
                                      const DeformableConv2DGradients& wanted,
                                      int num_workers) {
  int64_t bytes = 0;
  WithTypes(params, type, [&](auto zero, auto element) {
    using T = decltype(zero);
    using O = decltype(element);
    bytes = DataWorkspace<T, O>(params, wanted, num_workers);
    if (wanted.kernel != nullptr && !DataPlan<T, O>(params, false).fused) {
      bytes = Max(bytes, KernelWorkspace<T, O>(params, num_workers));
    }
    bytes += DataPackedBytes<T, O>(params, wanted);
  });
  return bytes;
}

// Calls body(parallel_for) with a team, unless one thread does all the work.
template <typename Body>
static void WithTeam(const Geometry& g, const ParallelFor& threads,
                     int64_t most, const Body& body) {
  if (IsSerial(g)) return body(threads);
  AsTeam(threads, most, body);
}

static void Forward(const DeformableConv2DParams& params, DataType type,
                    const DeformableConv2DInputs& operands, void* workspace,
                    void* output, const ParallelFor& threads) {
  WithTypes(params, type, [&](auto zero, auto element) {
    using T = decltype(zero);
    using O = decltype(element);
    const Geometry g(params);
    const ForwardTiles division =
        ForwardTiles::Of<T, O>(g, threads.num_workers);
    WithTeam(g, threads, division.tiles * division.parts,
             [&](const ParallelFor& parallel_for) {
               ForwardPass<T, O>(params, operands, workspace, output,
                                 parallel_for);
             });
  });
}

static void Backward(const DeformableConv2DParams& params, DataType type,
                     const DeformableConv2DInputs& operands,
                     const void* grad_output, void* workspace,
                     const DeformableConv2DGradients& gradients,
                     const ParallelFor& threads) {
  WithTypes(params, type, [&](auto zero, auto element) {
    using T = decltype(zero);
    using O = decltype(element);
    const DataPlan<T, O> plan(params, gradients.inputs != nullptr);
    const bool is_fused = DataPlan<T, O>(params, false).fused;
    const bool has_kernel_pass = gradients.kernel != nullptr && !is_fused;
    // Only strips have fewer tasks than there are workers.
    const bool has_strips = plan.scatter || gradients.kernel != nullptr;
    const int64_t most =
        has_kernel_pass || !has_strips ? threads.num_workers : plan.pairs;
    WithTeam(plan.g, threads, most, [&](const ParallelFor& parallel_for) {
      DataPass<T, O>(params, operands, grad_output, workspace, gradients,
                     parallel_for);
      if (has_kernel_pass) {
        KernelPass<T, O>(params, operands, grad_output, workspace,
                         gradients.kernel, parallel_for);
      }
    });
  });
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

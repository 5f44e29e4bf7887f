// Deformable convolution on the CPU, for one instruction set: how tiles flow.
// SPDX-License-Identifier: Apache-2.0
//
// No include guard: see simd_cpu-inl.h.
//
// The convolution is a matrix product of columns (a row for every output pixel;
// an entry for every tap and channel: the sample there times its mask) and the
// kernel (rows in the same order of taps and channels; a column for every
// filter). The columns exist only as tiles, some pixels by some taps and
// channels, in a worker's scratch:
//
//   ForwardPass   A tile of columns is sampled and at once multiplied by the
//                 packed kernel into its pixels' outputs.
//   DataPass      The gradient of a tile's columns is grad_output times the
//                 transposed packed kernel. A second look at the image's
//                 corners turns it into gradients of offset and mask, which
//                 belong to the tile's own pixels; in the same look it is added
//                 to the gradient of the inputs, which lands anywhere in the
//                 image.
//   KernelPass    Rows of the kernel (taps and channels) are divided among
//                 workers; each samples its part of the columns, tile after
//                 tile over all pixels, and adds the transposed tile times
//                 grad_output.
//
// Where samples lie is worked out once for every tap and offset group, for a
// vector of pixels at a time (Samples), and shared by the group's channels.
// Groups of the convolution are bundled: their channels are sampled in one go,
// and every (tap, group) has a product of its own (Piece). Where a group is one
// channel (depthwise) the products are done element by element.
//
// Blocks and strips that decide the order of a sum depend on shapes alone, so
// that results never depend on the number of workers. See
// deformable_sampling_cpu-inl.h for the names of indices.

#include "cc/core/simd_cpu-inl.h"
// Each of the next ones builds on those before.
#include "cc/core/tasks_cpu-inl.h"
//
#include "cc/core/matrix_cpu-inl.h"
//
#include "cc/core/deformable_sampling_cpu-inl.h"
//
#include "cc/core/deformable_columns_cpu-inl.h"
//
#include "cc/core/deformable_conv2d_data_cpu-inl.h"
//
#include "cc/core/deformable_conv2d_kernel_cpu-inl.h"

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// -----------------------------------------------------------------------------
// Forward.

// Pixels in a tile, at most: a multiple of kMicroRows.
constexpr int64_t kForwardPixels = kMicroRows == 14 ? 126 : 120;

template <typename T>
struct ForwardScratch : ColumnScratch<T> {
  using E = typename AccumulatorOf<T>::Type;

  E* sums;  // [kForwardPixels][kFilterBlock], for 16-bit types

  explicit ForwardScratch(Arena* arena)
      : ColumnScratch<T>(kForwardPixels, arena),
        sums(arena->Take<E>(Operands<T>::kNarrow ? kForwardPixels * kFilterBlock
                                                 : 0)) {}

  static int64_t Bytes() {
    Arena arena{nullptr};
    ForwardScratch{&arena};
    return arena.used;
  }
};

// The kernel packed for the forward pass: for every block of filters (of one
// group) and piece of rows a packed B; for a depthwise kernel the order
// (multiplier, tap, channel).
template <typename E>
static int64_t PackedForward(const Geometry& g) {
  if (g.depthwise) return g.taps * g.filters;
  const int64_t whole = g.group_filters / kFilterBlock * kFilterBlock;
  return g.rows * (whole + PackedColumns<E>(g.group_filters - whole));
}

// Where the packed B of `piece` and `filters` filters from f on begins.
template <typename E>
static int64_t PackedPiece(const Geometry& g, const Piece& piece, int64_t f,
                           int64_t filters) {
  const int64_t row = piece.kernel_part * g.group_channels + piece.part_row;
  return f * g.rows + row * PackedColumns<E>(filters);
}

template <typename T>
static int64_t ForwardWorkspace(const DeformableConv2DParams& params,
                                int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry g(params);
  Arena arena{nullptr};
  arena.Take<E>(PackedForward<E>(g));
  return arena.used + num_workers * ForwardScratch<T>::Bytes();
}

// `blocks` as in the pass itself.
template <typename T, typename E>
static void PackForward(const Geometry& g, const Blocks& blocks,
                        const T* kernel, E* packed,
                        const ParallelFor& parallel_for) {
  if (g.depthwise) return PackDepthwise(g, kernel, packed, parallel_for);
  // Tasks are blocks; groups have one at every tap, at least.
  const int64_t per_bundle =
      g.groups == 1 ? CeilDiv(g.rows, blocks.limit) : g.taps;
  RunTasks(parallel_for, g.Bundles() * per_bundle, [&](int64_t task, int) {
    const Bundle bundle(g, task / per_bundle);
    const int64_t part = task % per_bundle;
    const int64_t part_rows = g.groups == 1 ? blocks.limit : bundle.channels;
    const int64_t part_end = Min((part + 1) * part_rows, bundle.rows);
    for (int64_t begin = part * part_rows, end; begin < part_end; begin = end) {
      end = Min(blocks.End(g, bundle, begin), part_end);
      ForEachPiece(g, bundle, begin, end, [&](const Piece& piece) {
        for (int64_t f = 0; f < g.group_filters; f += kFilterBlock) {
          const int64_t filters = Min(kFilterBlock, g.group_filters - f);
          PackPanels<T, E>(kernel + piece.kernel_row * g.filters +
                               piece.group * g.group_filters + f,
                           g.filters, 1, piece.count, filters,
                           packed + PackedPiece<E>(g, piece, f, filters));
        }
      });
    }
  });
}

// Adds (at tap 0: writes) a tile's share to a bundle's sums, element by
// element.
template <typename E>
static void DepthwiseProduct(const Geometry& g, const Bundle& bundle,
                             int64_t count, const E* columns, int64_t begin,
                             const Run* runs, int64_t num_runs, const E* packed,
                             E* sums, int64_t stride) {
  for (int64_t p = 0; p < count; ++p) {
    for (const Run* run = runs; run != runs + num_runs; ++run) {
      const E* from = columns + p * kTileStride + (run->row - begin);
      E* to =
          sums + p * stride + (run->channel - bundle.channel) * g.group_filters;
      const bool first = run->tap == 0;
      for (int64_t j = 0; j < g.group_filters; ++j) {
        const E* kernel =
            packed + (j * g.taps + run->tap) * g.channels + run->channel;
        if (g.group_filters == 1) {
          ForEachVector<E>(run->count, [&](auto lanes, int64_t i) {
            constexpr int kN = lanes.value;
            const Vector<E, kN> product =
                Load<kN>(from + i) * Load<kN>(kernel + i);
            Store(first ? product : Load<kN>(to + i) + product, to + i);
          });
          continue;
        }
        for (int64_t i = 0; i < run->count; ++i) {
          E* sum = to + i * g.group_filters + j;
          *sum = first ? from[i] * kernel[i] : *sum + from[i] * kernel[i];
        }
      }
    }
  }
}

template <typename T>
static void ForwardPass(const DeformableConv2DParams& params,
                        const DeformableConv2DInputs& inputs, void* workspace,
                        void* output, const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry g(params);
  if (g.total_pixels == 0) return;
  const Operands<T> operands(inputs, nullptr);
  const Blocks blocks(g, kInner, 16);
  const int64_t scratch_bytes = ForwardScratch<T>::Bytes();
  Arena arena{static_cast<char*>(workspace)};
  E* const packed = arena.Take<E>(PackedForward<E>(g));
  char* const scratch = arena.base + arena.used;
  PackForward<T, E>(g, blocks, operands.kernel, packed, parallel_for);

  // As many tiles as workers, or a multiple: all end at about the same time. A
  // pixel's sums do not depend on its tile.
  int64_t tiles = CeilDiv(g.total_pixels, kForwardPixels);
  if (!IsSerial(g)) tiles = RoundUp(tiles, parallel_for.num_workers);
  tiles = Min(tiles, g.total_pixels);
  RunTasks(parallel_for, tiles, [&](int64_t tile, int worker) {
    Arena place{scratch + worker * scratch_bytes};
    ForwardScratch<T> s(&place);
    s.Clear();
    const int64_t first = g.total_pixels * tile / tiles;
    const int64_t count = g.total_pixels * (tile + 1) / tiles - first;
    s.pixels.Locate(g, first, count);
    for (int64_t index = 0; index < g.Bundles(); ++index) {
      const Bundle bundle(g, index);
      // Bundles of several groups have no more filters than a block.
      for (int64_t f = 0; f < g.group_filters; f += kFilterBlock) {
        const int64_t filters = Min(kFilterBlock, g.group_filters - f);
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
              SampleColumns<T>(g, operands, bundle, begin, end, s);
          if (g.depthwise) {
            DepthwiseProduct<E>(g, bundle, count, s.columns, begin, s.runs,
                                num_runs, packed, sums, stride);
            continue;
          }
          ForEachPiece(g, bundle, begin, end, [&](const Piece& piece) {
            MatrixProduct<false>(
                count, filters, piece.count, s.columns + (piece.row - begin),
                packed + PackedPiece<E>(g, piece, f, filters),
                sums + (piece.group - bundle.group) * g.group_filters, stride,
                piece.kernel_row > 0);
          });
        }
        if constexpr (Operands<T>::kNarrow) {
          const int64_t wide =
              g.group_filters > kFilterBlock ? filters : bundle.filters;
          for (int64_t p = 0; p < count; ++p) {
            NarrowRow(sums + p * stride, wide, to + p * g.filters);
          }
        }
      }
    }
  });
}

// -----------------------------------------------------------------------------
// What deformable_conv2d_cpu.cc chooses from.

static bool WantsData(const DeformableConv2DGradients& wanted) {
  return wanted.inputs != nullptr || wanted.offset != nullptr ||
         wanted.mask != nullptr;
}

static int64_t WorkspaceBytes(const DeformableConv2DParams& params,
                              DataType type, int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    bytes = ForwardWorkspace<decltype(zero)>(params, num_workers);
  });
  return bytes;
}

// The passes run one after the other in the same workspace.
static int64_t BackwardWorkspaceBytes(const DeformableConv2DParams& params,
                                      DataType type,
                                      const DeformableConv2DGradients& wanted,
                                      int num_workers) {
  int64_t bytes = 0;
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    if (WantsData(wanted)) {
      bytes = DataWorkspace<T>(params, wanted.inputs != nullptr, num_workers);
    }
    if (wanted.kernel != nullptr) {
      bytes = Max(bytes, KernelWorkspace<T>(params, num_workers));
    }
  });
  return bytes;
}

static void Forward(const DeformableConv2DParams& params, DataType type,
                    const DeformableConv2DInputs& operands, void* workspace,
                    void* output, const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    ForwardPass<decltype(zero)>(params, operands, workspace, output,
                                parallel_for);
  });
}

static void Backward(const DeformableConv2DParams& params, DataType type,
                     const DeformableConv2DInputs& operands,
                     const void* grad_output, void* workspace,
                     const DeformableConv2DGradients& gradients,
                     const ParallelFor& parallel_for) {
  WithType(type, [&](auto zero) {
    using T = decltype(zero);
    if (WantsData(gradients)) {
      DataPass<T>(params, operands, grad_output, workspace, gradients,
                  parallel_for);
    }
    if (gradients.kernel != nullptr) {
      KernelPass<T>(params, operands, grad_output, workspace, gradients.kernel,
                    parallel_for);
    }
  });
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Computes the gradient of the kernel of a deformable convolution on the CPU.
//
// The file has no include guard: see simd-inl.h.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Pixels in a tile: the inner dimension of the products here.
template <typename O>
constexpr int64_t kKernelPixels = std::is_same<O, BFloat16>::value ? 256 : 128;
static_assert(
    kKernelPixels<BFloat16> <= kInner && kFilterBlock % 16 == 0,
    "rows and columns of grad_rows, which AMX reads 16 rows at a time");

// Scratch of a worker. O is as in ColumnScratch. Where O is the accumulator's
// type, the product of a tile is A = columns, transposed, times B =
// grad_output, and sums are in the order of the kernel. On AMX A cannot be
// transposed: there the product is A = grad_output (copied as [filter][pixel])
// times B = columns, and sums are [filter][row].
template <typename T, typename O>
struct KernelScratch : ColumnScratch<T, O> {
  using E = typename AccumulatorOf<T>::Type;
  static constexpr bool kSwapped = !std::is_same<O, E>::value;

  O* packed;     // the tile's B
  O* grad_rows;  // [kFilterBlock][kTileStride], if kSwapped

  explicit KernelScratch(Arena* arena)
      : ColumnScratch<T, O>(kKernelPixels<O>, arena),
        packed(arena->Take<O>(kKernelPixels<O> *
                              (kSwapped ? kInner : kFilterBlock))),
        grad_rows(arena->Take<O>(kSwapped ? kFilterBlock * kTileStride : 0)) {}

  static int64_t Bytes() {
    Arena arena{nullptr};
    KernelScratch{&arena};
    return arena.used;
  }
};

// Bytes for KernelPass.
template <typename T, typename O>
static int64_t KernelWorkspace(const DeformableConv2DParams& params,
                               int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry g(params);
  Arena arena{nullptr};
  arena.Take<E>(Operands<T>::kNarrow ? g.rows * g.group_filters : 0);
  return arena.used + num_workers * KernelScratch<T, O>::Bytes();
}

// Columns of rows [begin, end) of a bundle at `count` pixels of the batch's
// output from `first` on: columns[pixel * stride + row - begin].
template <typename E>
struct Tile {
  const E* columns;
  int64_t stride;
  const Run* runs;
  int64_t num_runs;
  int64_t begin, end;
  int64_t first, count;
};

// Adds a tile's share to the gradient of a depthwise kernel.
template <typename T, typename E>
static void DepthwiseGradient(const Geometry& g, const T* grad_output,
                              const Tile<E>& tile, E* sums) {
  for (const Run* run = tile.runs; run != tile.runs + tile.num_runs; ++run) {
    const int64_t filter = run->channel * g.group_filters;
    const E* columns = tile.columns + (run->row - tile.begin);
    const T* gradient = grad_output + tile.first * g.filters + filter;
    E* to = sums + run->tap * g.filters + filter;
    if (g.group_filters == 1) {
      ForEachVector<E>(run->count, [&](auto lanes, int64_t i) {
        constexpr int kN = lanes.value;
        Vector<E, kN> sum = Load<kN>(to + i);
        for (int64_t p = 0; p < tile.count; ++p) {
          sum += Load<kN>(columns + p * tile.stride + i) *
                 Load<kN>(gradient + p * g.filters + i);
        }
        Store(sum, to + i);
      });
      continue;
    }
    for (int64_t p = 0; p < tile.count; ++p) {
      for (int64_t i = 0; i < run->count; ++i) {
        const E column = columns[p * tile.stride + i];
        ForEachVector<E>(g.group_filters, [&](auto lanes, int64_t j) {
          constexpr int kN = lanes.value;
          const int64_t f = i * g.group_filters + j;
          Store(Load<kN>(to + f) +
                    column * Load<kN>(gradient + p * g.filters + f),
                to + f);
        });
      }
    }
  }
}

// Adds a tile's share to the gradient of the kernel, for filters [f, f +
// filters) of each group. `packed` holds the packed grad_output of group
// *packed_group; -1: of none.
template <typename T, typename E>
static void AddTile(const Geometry& g, const T* grad_output,
                    const Bundle& bundle, const Tile<E>& tile, int64_t f,
                    int64_t filters, int64_t* packed_group, E* packed,
                    E* sums) {
  ForEachPiece(g, bundle, tile.begin, tile.end, [&](const Piece& piece) {
    const int64_t filter = piece.group * g.group_filters + f;
    if (*packed_group != piece.group) {
      *packed_group = piece.group;
      PackPanels(grad_output + tile.first * g.filters + filter, g.filters, 1,
                 tile.count, filters, packed);
    }
    MatrixProduct<true>(piece.count, filters, tile.count,
                        tile.columns + (piece.row - tile.begin), packed,
                        sums + piece.kernel_row * g.filters + filter, g.filters,
                        true, tile.stride);
  });
}

// Writes the gradient of the kernel.
template <typename T, typename O>
static void KernelPass(const DeformableConv2DParams& params,
                       const DeformableConv2DInputs& inputs,
                       const void* grad_output, void* workspace,
                       void* grad_kernel, const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  constexpr bool kNarrow = Operands<T>::kNarrow;
  constexpr bool kSwapped = KernelScratch<T, O>::kSwapped;
  const Geometry g(params);
  const Operands<T> operands(inputs, grad_output);
  const int64_t size = g.rows * g.group_filters;
  const int64_t kernel_rows = g.taps * g.group_channels;
  Arena arena{static_cast<char*>(workspace)};
  E* sums = arena.Take<E>(kNarrow ? size : 0);
  if constexpr (!kNarrow) sums = static_cast<E*>(grad_kernel);
  char* const scratch = arena.base + arena.used;
  const int64_t scratch_bytes = KernelScratch<T, O>::Bytes();
  Zero(parallel_for, sums, size * static_cast<int64_t>(sizeof(E)));

  // A bundle's rows are divided into just as many parts as keep the workers
  // busy, because each part packs grad_output for itself. The parts do not
  // affect any sum.
  const int64_t bundles = g.Bundles();
  const int64_t parts =
      IsSerial(g) ? 1 : CeilDiv(parallel_for.num_workers, bundles);
  RunTasks(parallel_for, bundles * parts, [&](int64_t task, int worker) {
    Arena place{scratch + worker * scratch_bytes};
    KernelScratch<T, O> s(&place);
    s.Clear();
    const Bundle bundle(g, task / parts);
    const int64_t part = task % parts;
    const int64_t part_begin = CutRow<E>(g, bundle, bundle.rows * part / parts);
    const int64_t part_end =
        part + 1 == parts
            ? bundle.rows
            : CutRow<E>(g, bundle, bundle.rows * (part + 1) / parts);
    for (int64_t first = 0; first < g.total_pixels; first += kKernelPixels<O>) {
      const int64_t count = Min(kKernelPixels<O>, g.total_pixels - first);
      s.pixels.Locate(g, first, count);
      for (int64_t f = 0; f < g.group_filters; f += kFilterBlock) {
        const int64_t filters = Min(kFilterBlock, g.group_filters - f);
        [[maybe_unused]] int64_t packed_group = -1;
        if constexpr (kSwapped) {
          TransposePairs(
              operands.grad_output + first * g.filters + bundle.filter + f,
              g.filters, count, Min(bundle.filters - f, kFilterBlock),
              s.grad_rows);
        }
        for (int64_t begin = part_begin, end; begin < part_end; begin = end) {
          end = begin + kInner < part_end ? CutRow<E>(g, bundle, begin + kInner)
                                          : part_end;
          const int64_t num_runs =
              SampleColumns<T, O>(g, operands, bundle, begin, end, s);
          if constexpr (kSwapped) {
            ForEachPiece(g, bundle, begin, end, [&](const Piece& piece) {
              PackPanels(s.columns + (piece.row - begin), kTileStride, 1, count,
                         piece.count, s.packed);
              MatrixProduct<false>(
                  filters, piece.count, count,
                  s.grad_rows + (piece.group - bundle.group) * g.group_filters *
                                    kTileStride,
                  s.packed,
                  sums + (piece.group * g.group_filters + f) * kernel_rows +
                      piece.kernel_row,
                  kernel_rows, true);
            });
          } else {
            const Tile<E> tile{s.columns, kTileStride, s.runs, num_runs,
                               begin,     end,         first,  count};
            if (g.depthwise) {
              DepthwiseGradient(g, operands.grad_output, tile, sums);
            } else {
              AddTile(g, operands.grad_output, bundle, tile, f, filters,
                      &packed_group, s.packed, sums);
            }
          }
        }
        if (g.depthwise) break;
      }
    }
  });
  if constexpr (kNarrow) {
    T* const to = static_cast<T*>(grad_kernel);
    constexpr int64_t kRows = 16;
    RunTasks(parallel_for, CeilDiv(kernel_rows, kRows), [&](int64_t task, int) {
      const int64_t begin = task * kRows;
      const int64_t end = Min(begin + kRows, kernel_rows);
      if constexpr (kSwapped) {
        for (int64_t f = 0; f < g.filters; ++f) {
          for (int64_t row = begin; row < end; ++row) {
            Narrow(sums[f * kernel_rows + row], to + row * g.filters + f);
          }
        }
      } else {
        NarrowRow(sums + begin * g.filters, (end - begin) * g.filters,
                  to + begin * g.filters);
      }
    });
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

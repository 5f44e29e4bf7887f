// SPDX-License-Identifier: Apache-2.0
// Computes the gradients of a deformable convolution on the CPU: of inputs,
// offset and mask, and of small kernels.
//
// The file has no include guard: see simd-inl.h.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// The gradients that a DataPass computes.
template <typename T, typename O>
struct DataWanted {
  bool columns;  // of columns, for inputs, offset and mask
  bool slopes;   // of offset or mask
  bool kernel;

  DataWanted(const DataPlan<T, O>& plan,
             const DeformableConv2DGradients& gradients)
      : columns(plan.scatter || gradients.offset != nullptr ||
                gradients.mask != nullptr),
        slopes(gradients.offset != nullptr || gradients.mask != nullptr),
        kernel(plan.fused && gradients.kernel != nullptr) {}
};

// Packs a depthwise kernel in the order (multiplier, tap, channel).
template <typename T, typename E>
static void PackDepthwise(const Geometry& g, const T* kernel, E* packed,
                          const ParallelFor& parallel_for) {
  RunTasks(parallel_for, g.taps, [&](int64_t tap, int) {
    for (int64_t j = 0; j < g.group_filters; ++j) {
      E* to = packed + (j * g.taps + tap) * g.channels;
      const T* from = kernel + tap * g.filters + j;
      for (int64_t c = 0; c < g.channels; ++c) {
        to[c] = Load<1>(from + c * g.group_filters)[0];
      }
    }
  });
}

// Packs the kernel for the data pass: for every block of kInner filters (of one
// group) and every part of the kernel (see Piece) a packed transposed B; a
// depthwise kernel as PackDepthwise does.
template <typename T, typename O>
static void PackTransposed(const DataPlan<T, O>& plan, const T* kernel,
                           O* packed, const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry& g = plan.g;
  if constexpr (!std::is_same<O, BFloat16>::value) {
    if (g.depthwise) return PackDepthwise(g, kernel, packed, parallel_for);
  }
  constexpr int64_t kRows = 4 * kPanel<E>;  // of a task
  const int64_t filter_blocks = CeilDiv(g.group_filters, kInner);
  const int64_t parts = g.groups == 1 ? 1 : g.taps * g.groups;
  const int64_t rows = g.groups == 1 ? g.rows : g.group_channels;
  const int64_t tasks = CeilDiv(rows, kRows);  // of a part
  RunTasks(parallel_for, filter_blocks * parts * tasks, [&](int64_t task, int) {
    const int64_t row = task % tasks * kRows;
    const int64_t f = task / tasks % filter_blocks * kInner;
    const int64_t part = task / tasks / filter_blocks;
    const int64_t filters = Min(kInner, g.group_filters - f);
    const int64_t inner = PackedInner<O>(filters);
    PackPanels(kernel + (part / g.groups * g.group_channels + row) * g.filters +
                   part % g.groups * g.group_filters + f,
               1, g.filters, filters, Min(kRows, rows - row),
               packed + (parts * f + part * inner) * PackedColumns<O>(rows) +
                   row * inner);
  });
}

// Makes the gradients of a depthwise tile's columns, element by element.
template <typename T, typename E>
static void DepthwiseColumnGradients(const Geometry& g, const T* from,
                                     const E* packed, int64_t begin,
                                     int64_t num_runs,
                                     const DataScratch<T, E>& s) {
  for (int64_t p = 0; p < s.pixels.count; ++p) {
    for (const Run* run = s.runs; run != s.runs + num_runs; ++run) {
      const T* gradient = from + p * g.filters + run->channel * g.group_filters;
      E* to = s.columns + p * s.stride + (run->row - begin);
      const E* kernel = packed + run->tap * g.channels + run->channel;
      if (g.group_filters == 1) {
        ForEachVector<E>(run->count, [&](auto lanes, int64_t i) {
          constexpr int kN = lanes.value;
          Store(Load<kN>(gradient + i) * Load<kN>(kernel + i), to + i);
        });
        continue;
      }
      for (int64_t i = 0; i < run->count; ++i) {
        E sum = 0;
        for (int64_t j = 0; j < g.group_filters; ++j) {
          sum += Load<1>(gradient + i * g.group_filters + j)[0] *
                 kernel[j * g.rows + i];
        }
        to[i] = sum;
      }
    }
  }
}

// Makes the gradients of columns [begin, end) of `bundle` for the pixels of the
// tile: s.columns[pixel][row - begin].
template <typename T, typename O>
static void MakeColumnGradients(const DataPlan<T, O>& plan,
                                const Operands<T>& operands,
                                const Bundle& bundle, const O* packed,
                                int64_t begin, int64_t end, int64_t num_runs,
                                const DataScratch<T, O>& s) {
  const Geometry& g = plan.g;
  const int64_t count = s.pixels.count;
  const T* const from = operands.grad_output + s.pixels.first * g.filters;
  if constexpr (!std::is_same<O, BFloat16>::value) {
    if (g.depthwise) {
      return DepthwiseColumnGradients(g, from, packed, begin, num_runs, s);
    }
  }
  const int64_t parts = g.groups == 1 ? 1 : g.taps * g.groups;
  const int64_t part_columns =
      PackedColumns<O>(g.groups == 1 ? g.rows : g.group_channels);
  for (int64_t f = 0; f < g.group_filters; f += kInner) {
    const int64_t filters = Min(kInner, g.group_filters - f);
    const int64_t inner = PackedInner<O>(filters);
    int64_t loaded = -1;  // the groups whose filters grad_rows holds
    ForEachPiece(g, bundle, begin, end, [&](const Piece& piece) {
      // Filters of neighbouring groups are loaded together.
      const int64_t together =
          filters < g.group_filters ? 1 : Max(1, kInner / filters);
      if (loaded != piece.group / together) {
        loaded = piece.group / together;
        const int64_t filter = loaded * together * g.group_filters + f;
        const int64_t wide =
            Min(filters * together,
                filters < g.group_filters ? filters : g.filters - filter);
        for (int64_t p = 0; p < count; ++p) {
          O* const to = s.grad_rows + p * kTileStride;
          WidenRow(from + p * g.filters + filter, wide, to);
          for (int64_t i = wide; i < PackedInner<O>(wide); ++i) to[i] = O{};
        }
      }
      MatrixProduct<false>(
          count, piece.count, filters,
          s.grad_rows + piece.group % together * filters,
          packed + (parts * f + piece.kernel_part * inner) * part_columns +
              piece.part_row * inner,
          s.columns + (piece.row - begin), s.stride, f > 0);
    });
  }
}

// Adds the share of the first `done` pixels of a tile of columns to the
// gradient of the kernel.
template <typename T, typename O, typename E>
static inline void FinishTile(const Geometry& g, const StripBlock& block,
                              const Operands<T>& operands,
                              const DataScratch<T, O>& s, int64_t done,
                              E* kernel_sums) {
  const Tile<E> tile{s.columns,   s.stride,  s.runs,         block.num_runs,
                     block.begin, block.end, s.pixels.first, done};
  if (g.depthwise) {
    DepthwiseGradient(g, operands.grad_output, tile, kernel_sums);
    return;
  }
  int64_t packed_group = -1;
  AddTile(g, operands.grad_output, block.bundle, tile, 0, g.group_filters,
          &packed_group, s.grad_packed, kernel_sums);
}

// Works on `strip` until it is done (returns true) or its room for deferred
// gradients may not hold the gradients of the next pixels (false). Without
// `packed` no gradients of columns are made. Never inlined: its loops need all
// registers.
template <typename Makes, typename T, typename O, typename E>
static __attribute__((noinline)) bool Advance(const DataPlan<T, O>& plan,
                                              const Operands<T>& operands,
                                              const O* packed,
                                              DataScratch<T, O> s, Strip* strip,
                                              DataTargets<E> targets) {
  const Geometry& g = plan.g;
  const Sampling<E> in(g, operands.offset, operands.mask);
  __builtin_memset(static_cast<void*>(s.zeros), 0,
                   static_cast<size_t>(plan.blocks.limit) * sizeof(T));
  while (!strip->IsDone(g)) {
    const auto block = StripBlock::At<E>(g, plan.blocks, *strip, s.runs);
    while (strip->next < strip->last) {
      s.pixels.Locate(g, strip->next,
                      Min(kDataPixels, strip->last - strip->next));
      if (packed != nullptr) {
        MakeColumnGradients(plan, operands, block.bundle, packed, block.begin,
                            block.end, block.num_runs, s);
      }
      VisitTile<Makes>(plan, in, block, operands, s, strip, targets);
      const int64_t done = strip->next - s.pixels.first;
      if constexpr (Makes::kColumns) {
        FinishTile(g, block, operands, s, done, targets.kernel_sums);
      }
      if (done < s.pixels.count) return false;
    }
    strip->ToBlockAfter(block);
  }
  return true;
}

// The parts of a DataPass' workspace; the packed kernel comes behind them.
template <typename T, typename O>
struct DataMemory {
  using E = typename AccumulatorOf<T>::Type;

  E* wide;         // gradients of images, for 16-bit types
  Strip* strips;   // [plan.images * plan.strips]
  char* deferred;  // [plan.pairs][plan.deferred_bytes]
  E* kernel_sums;  // [plan.pairs][kernel_size]
  char* scratch;   // of the workers
  int64_t kernel_size;

  DataMemory(const DataPlan<T, O>& plan, bool wants_kernel, Arena* arena)
      : wide(arena->Take<E>(plan.wide_bytes / static_cast<int64_t>(sizeof(E)))),
        strips(reinterpret_cast<Strip*>(arena->Take<char>(plan.StripBytes()))),
        deferred(arena->Take<char>(plan.DeferredBytes())),
        kernel_size(plan.KernelBytes() / static_cast<int64_t>(sizeof(E))) {
    kernel_sums = arena->Take<E>(wants_kernel ? plan.pairs * kernel_size : 0);
    scratch = arena->Take<char>(0);
  }

  DataScratch<T, O> ScratchOf(const DataPlan<T, O>& plan, int worker) const {
    Arena place{scratch + worker * plan.scratch_bytes};
    return DataScratch<T, O>(plan.blocks, plan.fused, &place);
  }
};

// Bytes for DataPass, besides the packed kernel.
template <typename T, typename O>
static int64_t DataWorkspace(const DeformableConv2DParams& params,
                             const DeformableConv2DGradients& gradients,
                             int num_workers) {
  const DataPlan<T, O> plan(params, gradients.inputs != nullptr);
  const DataWanted<T, O> wanted(plan, gradients);
  if (!wanted.columns && !wanted.kernel) return 0;
  Arena arena{nullptr};
  DataMemory<T, O>(plan, wanted.kernel, &arena);
  return arena.used + num_workers * plan.scratch_bytes;
}

// Bytes of the packed kernel of a DataPass, see PackTransposed.
template <typename T, typename O>
static int64_t DataPackedBytes(const DeformableConv2DParams& params,
                               const DeformableConv2DGradients& gradients) {
  const DataPlan<T, O> plan(params, gradients.inputs != nullptr);
  Arena arena{nullptr};
  arena.Take<O>(
      DataWanted<T, O>(plan, gradients).columns ? plan.KernelElements() : 0);
  return arena.used;
}

// Makes the gradients of offset and mask alone. No two pixels add to the same
// element, so tiles are divided among workers.
template <typename T, typename O, typename E>
static void AdvanceTiles(const DataPlan<T, O>& plan,
                         const Operands<T>& operands,
                         const DataMemory<T, O>& memory, const O* packed,
                         const DataTargets<E>& targets,
                         const ParallelFor& parallel_for) {
  const Geometry& g = plan.g;
  int64_t tiles = CeilDiv(g.total_pixels, kDataPixels);
  if (!IsSerial(g)) tiles = RoundUp(tiles, parallel_for.num_workers);
  tiles = Min(tiles, g.total_pixels);
  RunTasks(parallel_for, tiles, [&](int64_t tile, int worker) {
    Strip strip = {};
    strip.first = strip.next = g.total_pixels * tile / tiles;
    strip.last = g.total_pixels * (tile + 1) / tiles;
    Advance<Making<true, false, false>>(plan, operands, packed,
                                        memory.ScratchOf(plan, worker), &strip,
                                        targets);
  });
}

// Works on all strips of images [n, n + images). `targets.image` is the
// gradient of image n.
template <typename T, typename O, typename E>
static void AdvanceStrips(const DataPlan<T, O>& plan,
                          const DataWanted<T, O>& wanted,
                          const Operands<T>& operands,
                          const DataMemory<T, O>& memory, const O* packed,
                          int64_t n, int64_t images,
                          const DataTargets<E>& targets,
                          const ParallelFor& parallel_for) {
  const Geometry& g = plan.g;
  const Sampling<E> in(g, operands.offset, operands.mask);
  auto advance = wanted.slopes ? Advance<Making<true, true, false>, T, O, E>
                               : Advance<Making<false, true, false>, T, O, E>;
  if constexpr (std::is_same<O, E>::value) {
    if (wanted.kernel) {
      advance = plan.scatter ? Advance<Making<true, true, true>, T, O, E>
                             : Advance<Making<true, false, true>, T, O, E>;
    }
  }
  Strip* const strips = memory.strips;
  MakeStrips(plan, n, images, memory.deferred, strips);
  const auto image_of = [&](const Strip& strip) {
    return plan.scatter ? targets.image + (strip.n - n) * g.image : nullptr;
  };
  const int64_t phases = plan.strips > 1 ? 2 : 1;
  for (int64_t phase = 0; phase < phases; ++phase) {
    const int64_t active = images * plan.strips / phases;
    for (bool done = false; !done;) {
      RunTasks(parallel_for, active, [&](int64_t index, int worker) {
        Strip* strip = strips + index * phases + phase;
        const DataTargets<E> own = {
            image_of(*strip), targets.offset, targets.mask,
            memory.kernel_sums + strip->pair * memory.kernel_size};
        advance(plan, operands, packed, memory.ScratchOf(plan, worker), strip,
                own);
      });
      done = true;
      bool any = false;
      for (int64_t index = 0; index < active; ++index) {
        const Strip& strip = strips[index * phases + phase];
        done = done && strip.IsDone(g);
        any = any || strip.used > 0;
      }
      if (!any) continue;
      // A task adds to some rows of an image.
      const int64_t adders = plan.scatter ? images * plan.strips : 0;
      RunTasks(parallel_for, adders, [&](int64_t index, int) {
        const int64_t part = index % plan.strips;
        const int64_t image = index / plan.strips * plan.strips;
        for (int64_t i = phase; i < plan.strips; i += phases) {
          AddDeferred(in, strips[image + i], g.height * part / plan.strips,
                      g.height * (part + 1) / plan.strips,
                      image_of(strips[image + i]));
        }
      });
      for (int64_t index = 0; index < active; ++index) {
        strips[index * phases + phase].used = 0;
      }
    }
  }
}

// Writes the gradient of the kernel: the sums of all pairs of strips, in order.
template <typename T, typename O>
static void SumPairs(const DataPlan<T, O>& plan, const DataMemory<T, O>& memory,
                     T* grad_kernel, const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  const Geometry& g = plan.g;
  RunTasks(parallel_for, g.taps * g.group_channels, [&](int64_t row, int) {
    E* const total = memory.kernel_sums + row * g.filters;
    for (int64_t pair = 1; pair < plan.pairs; ++pair) {
      const E* from = total + pair * memory.kernel_size;
      ForEachVector<E>(g.filters, [&](auto lanes, int64_t i) {
        constexpr int kN = lanes.value;
        Store(Load<kN>(total + i) + Load<kN>(from + i), total + i);
      });
    }
    NarrowRow(total, g.filters, grad_kernel + row * g.filters);
  });
}

// Writes NaN to the gradients of predicted masks that are NaN: samples outside
// of the image add nothing to them.
template <typename E>
static void MarkNaNGradients(const Geometry& g, const E* offset, E* grad_offset,
                             const ParallelFor& parallel_for) {
  constexpr int64_t kPixels = 1024;  // of a task
  RunTasks(
      parallel_for, CeilDiv(g.total_pixels, kPixels), [&](int64_t task, int) {
        const int64_t begin = task * kPixels * g.offset_numbers;
        const int64_t end =
            Min((task + 1) * kPixels, g.total_pixels) * g.offset_numbers;
        if (!AnyNaN(offset + begin, end - begin)) return;
        for (int64_t i = begin; i < end; ++i) {
          if (i % g.offset_numbers >= 2 * g.fields && offset[i] != offset[i]) {
            grad_offset[i] = offset[i];
          }
        }
      });
}

// Writes the wanted gradients of inputs, offset and mask and, if plan.fused,
// the gradient of the kernel.
template <typename T, typename O>
static void DataPass(const DeformableConv2DParams& params,
                     const DeformableConv2DInputs& inputs,
                     const void* grad_output, void* workspace,
                     const DeformableConv2DGradients& gradients,
                     const ParallelFor& parallel_for) {
  using E = typename AccumulatorOf<T>::Type;
  constexpr bool kNarrow = Operands<T>::kNarrow;
  const DataPlan<T, O> plan(params, gradients.inputs != nullptr);
  const DataWanted<T, O> wanted(plan, gradients);
  if (!wanted.columns && !wanted.kernel) return;
  const Geometry& g = plan.g;
  const Operands<T> operands(inputs, grad_output);
  T* const grad_inputs = static_cast<T*>(gradients.inputs);
  DataTargets<E> targets = {nullptr, static_cast<E*>(gradients.offset),
                            static_cast<E*>(gradients.mask), nullptr};
  Arena arena{static_cast<char*>(workspace)};
  const DataMemory<T, O> memory(plan, wanted.kernel, &arena);
  O* packed = nullptr;
  if (wanted.columns) {
    packed =
        inputs.packed != nullptr
            ? static_cast<O*>(inputs.packed)
            : reinterpret_cast<O*>(memory.scratch + parallel_for.num_workers *
                                                        plan.scratch_bytes);
    PackTransposed(plan, operands.kernel, packed, parallel_for);
  }

  const int64_t number_bytes = g.total_pixels * static_cast<int64_t>(sizeof(E));
  if (plan.scatter && (!kNarrow || g.total_pixels == 0)) {
    Zero(parallel_for, grad_inputs,
         g.batch * g.image * static_cast<int64_t>(sizeof(T)));
  }
  if (targets.offset != nullptr) {
    Zero(parallel_for, targets.offset, g.offset_numbers * number_bytes);
  }
  if (targets.mask != nullptr) {
    Zero(parallel_for, targets.mask, g.fields * number_bytes);
  }
  if (g.IsModulated() && targets.offset != nullptr) {
    targets.mask = targets.offset + 2 * g.fields;
    MarkNaNGradients(g, operands.offset, targets.offset, parallel_for);
  }
  if (wanted.kernel) {
    Zero(parallel_for, memory.kernel_sums, plan.pairs * plan.KernelBytes());
  }
  if (!plan.scatter && !wanted.kernel) {
    AdvanceTiles(plan, operands, memory, packed, targets, parallel_for);
    return;
  }

  for (int64_t n = 0; n < g.batch && g.total_pixels > 0; n += plan.images) {
    const int64_t images = Min(plan.images, g.batch - n);
    if (plan.scatter && kNarrow) {
      targets.image = memory.wide;
      Zero(parallel_for, memory.wide,
           images * g.image * static_cast<int64_t>(sizeof(E)));
    } else if (plan.scatter) {
      targets.image = reinterpret_cast<E*>(grad_inputs + n * g.image);
    }
    AdvanceStrips(plan, wanted, operands, memory, packed, n, images, targets,
                  parallel_for);
    if constexpr (kNarrow) {
      const int64_t row = g.width * g.channels;
      RunTasks(parallel_for, plan.scatter ? images * g.height : 0,
               [&](int64_t y, int) {
                 NarrowRow(targets.image + y * row, row,
                           grad_inputs + n * g.image + y * row);
               });
    }
  }
  if (wanted.kernel) {
    SumPairs(plan, memory, static_cast<T*>(gradients.kernel), parallel_for);
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

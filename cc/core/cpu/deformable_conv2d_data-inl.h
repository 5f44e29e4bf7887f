// SPDX-License-Identifier: Apache-2.0
// Deformable convolution on the CPU: gradients of inputs, offset and mask, and
// of small kernels.
//
// No include guard: see simd-inl.h.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// What a DataPass does of what is wanted.
template <typename T, typename O>
struct DataWanted {
  bool columns;  // gradients of columns: for inputs, offset, mask
  bool slopes;   // offset or mask
  bool kernel;

  DataWanted(const DataPlan<T, O>& plan,
             const DeformableConv2DGradients& gradients)
      : columns(plan.scatter || gradients.offset != nullptr ||
                gradients.mask != nullptr),
        slopes(gradients.offset != nullptr || gradients.mask != nullptr),
        kernel(plan.fused && gradients.kernel != nullptr) {}
};

template <typename T, typename O>
static int64_t DataWorkspace(const DeformableConv2DParams& params,
                             const DeformableConv2DGradients& gradients,
                             int num_workers) {
  const DataPlan<T, O> plan(params, gradients.inputs != nullptr);
  const DataWanted<T, O> wanted(plan, gradients);
  if (!wanted.columns && !wanted.kernel) return 0;
  Arena arena{nullptr};
  arena.Take<O>(wanted.columns ? plan.KernelElements() : 0);
  return arena.used + plan.wide_bytes + plan.StripBytes() +
         plan.DeferredBytes() +
         (wanted.kernel ? plan.rooms * plan.KernelBytes() : 0) +
         num_workers * plan.scratch_bytes;
}

// A depthwise kernel in the order (multiplier, tap, channel).
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

// The kernel packed for the data pass: for every block of kInner filters (of
// one group) and every part of the kernel (see Piece) a packed transposed B;
// for a depthwise kernel the order (multiplier, tap, channel).
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
  const int64_t pieces = CeilDiv(rows, kRows);
  RunTasks(
      parallel_for, filter_blocks * parts * pieces, [&](int64_t task, int) {
        const int64_t row = task % pieces * kRows;
        const int64_t f = task / pieces % filter_blocks * kInner;
        const int64_t part = task / pieces / filter_blocks;
        const int64_t filters = Min(kInner, g.group_filters - f);
        const int64_t inner = PackedInner<O>(filters);
        PackPanels(
            kernel + (part / g.groups * g.group_channels + row) * g.filters +
                part % g.groups * g.group_filters + f,
            1, g.filters, filters, Min(kRows, rows - row),
            packed + (parts * f + part * inner) * PackedColumns<O>(rows) +
                row * inner);
      });
}

// The gradients of a depthwise tile's columns, element by element.
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

// Sums over a run's channels: column gradient times the sample's slopes and
// value.
template <typename E>
struct SlopeSums {
  Vector<E, kLanes<E>> dy = {}, dx = {}, value = {};
  E rest_dy = 0, rest_dx = 0, rest_value = 0;

  template <int kN>
  void Add(const Vector<E, kN>& gradient, const Vector<E, kN>& along_y,
           const Vector<E, kN>& along_x, const Vector<E, kN>& sample) {
    if constexpr (kN == kLanes<E>) {
      dy += gradient * along_y;
      dx += gradient * along_x;
      value += gradient * sample;
    } else {
      // Lane after lane: of two products that are added a compiler may contract
      // either, another one in each variant of the function that it inlines
      // this into, and results would depend on what else is wanted.
      for (int i = 0; i < kN; ++i) {
        rest_dy += gradient[i] * along_y[i];
        rest_dx += gradient[i] * along_x[i];
        rest_value += gradient[i] * sample[i];
      }
    }
  }
};

// Uses the column gradients of one sample: adds to `sums` (kSlopes), and to the
// gradient of the image at all four corners, `to` on (kScatter). Leaves the
// columns themselves in their place (kColumns, with kSlopes).
template <bool kSlopes, bool kScatter, bool kColumns, typename T, typename E>
static inline __attribute__((always_inline)) void UseColumns(
    const Sampling<E>& in, const Corners<T>& from, E* columns, int64_t count,
    E ly, E lx, E mask, const Weights<E>& weights, E* to, SlopeSums<E>* sums) {
  E* const below = kScatter ? to + in.row : nullptr;
  ForEachVector<E>(count, [&](auto lanes, int64_t i) {
    constexpr int kN = lanes.value;
    using V = Vector<E, kN>;
    const V gradient = Load<kN>(columns + i);
    if constexpr (kSlopes) {
      // Differences first: a large common value must not drown the slope.
      const V top_left = Load<kN>(from.top_left + i);
      const V down = Load<kN>(from.bottom_left + i) - top_left;
      const V right = Load<kN>(from.top_right + i) - top_left;
      const V twist =
          (Load<kN>(from.bottom_right + i) - Load<kN>(from.bottom_left + i)) -
          right;
      const V dy = down + lx * twist;
      const V dx = right + ly * twist;
      const V value = top_left + lx * right + ly * dy;
      sums->template Add<kN>(gradient, dy, dx, value);
      if constexpr (kColumns) Store(mask * value, columns + i);
    }
    if constexpr (kScatter) {
      const V scaled = mask * gradient;
      const auto add = [&](E* corner, E weight) {
        Store(Load<kN>(corner + i) + weight * scaled, corner + i);
      };
      add(to, weights.top_left);
      add(to + in.pixel, weights.top_right);
      add(below, weights.bottom_left);
      add(below + in.pixel, weights.bottom_right);
    }
  });
}

// Works on `strip` until it is done (returns true) or its room for deferred
// gradients may not hold the next pixels' (false). `grad_image` is the gradient
// of the strip's image (kScatter); grad_offset or grad_mask may be null.
// Without `packed` no gradients of columns are made. What the strip adds to the
// gradient of the kernel goes to kernel_sums (kColumns).
template <bool kSlopes, bool kScatter, bool kColumns, typename T, typename O,
          typename E>
static bool Advance(const DataPlan<T, O>& plan, const Operands<T>& operands,
                    const O* packed, DataScratch<T, O> s, Strip* strip,
                    E* grad_image, E* grad_offset, E* grad_mask,
                    E* kernel_sums) {
  const Geometry& g = plan.g;
  const Sampling<E> in(g, operands.offset, operands.mask);
  __builtin_memset(static_cast<void*>(s.zeros), 0,
                   static_cast<size_t>(plan.blocks.limit) * sizeof(T));
  for (; strip->bundle < g.Bundles(); ++strip->bundle, strip->begin = 0) {
    const Bundle bundle(g, strip->bundle);
    while (strip->begin < bundle.rows) {
      const int64_t begin = strip->begin;
      const int64_t end = plan.blocks.End(g, bundle, begin);
      const int64_t num_runs = FindRuns(g, bundle, begin, end, s.runs);
      int64_t most = 0;  // bytes that a pixel may defer
      for (int64_t run = 0; run < num_runs; ++run) {
        most += Deferred<E>::Bytes(s.runs[run].count);
      }
      while (strip->next < strip->last) {
        s.pixels.Locate(g, strip->next,
                        Min(kDataPixels, strip->last - strip->next));
        if (packed != nullptr) {
          MakeColumnGradients(plan, operands, bundle, packed, begin, end,
                              num_runs, s);
        }
        for (int64_t p = 0; p < s.pixels.count; p += kLanes<E>) {
          const int64_t lanes_used = Min(kLanes<E>, s.pixels.count - p);
          if ((kScatter || kColumns) && plan.strips > 1 &&
              strip->used + most * lanes_used > plan.deferred_bytes) {
            break;
          }
          for (int64_t r = 0; r < num_runs; ++r) {
            s.samples[r].Locate(in, s.pixels, p, s.runs[r]);
          }
          // A pixel's taps read neighbouring corners, and so do the next
          // pixel's.
          for (int64_t l = 0; l < lanes_used; ++l) {
            for (int64_t r = 0; r < num_runs; ++r) {
              const Run* run = s.runs + r;
              const Samples<E>& at = s.samples[r];
              const int64_t field =
                  (s.pixels.first + p + l) * g.fields + run->field;
              E* columns = s.columns + (p + l) * s.stride + (run->row - begin);
              const int32_t flags = at.flags[l];
              if (flags == 0) {
                if (kColumns) {
                  for (int64_t i = 0; i < run->count; ++i) columns[i] = 0;
                }
                continue;
              }
              const Corners<T> from(in,
                                    operands.inputs + s.pixels.image[p + l] +
                                        at.Corner(in, l) + run->channel,
                                    flags, s.zeros);
              const Weights<E> weights = at.WeightsAt(l);
              const E mask = at.mask[l];
              E* const to = kScatter
                                ? grad_image + at.Corner(in, l) + run->channel
                                : nullptr;
              const int32_t mine =
                  kScatter || kColumns
                      ? CornersInRows(flags, at.top[l], strip->row_first,
                                      strip->row_last)
                      : 0;
              SlopeSums<E> sums;
              if (kScatter && mine == kInside) {
                UseColumns<kSlopes, true, kColumns>(
                    in, from, columns, run->count, at.ly[l], at.lx[l], mask,
                    weights, to, &sums);
              } else {
                const int32_t others = flags & kInside & ~mine;
                if (kScatter) {
                  AddToCorners(in, mine, columns, run->count, mask, weights,
                               to);
                  if (others != 0) {
                    auto* entry = reinterpret_cast<Deferred<E>*>(
                        strip->deferred + strip->used);
                    *entry = {at.Corner(in, l) + run->channel,
                              others,
                              at.top[l],
                              run->count,
                              mask,
                              weights};
                    __builtin_memcpy(
                        entry->Gradient(), columns,
                        static_cast<size_t>(run->count) * sizeof(E));
                  }
                }
                // Counted also where nothing is deferred: it decides where the
                // tile ends, and so the sums of the kernel's gradient.
                if ((kScatter || kColumns) && others != 0) {
                  strip->used += Deferred<E>::Bytes(run->count);
                }
                if (kSlopes) {
                  UseColumns<true, false, kColumns>(
                      in, from, columns, run->count, at.ly[l], at.lx[l], mask,
                      weights, to, &sums);
                }
              }
              if (!kSlopes) continue;
              if (grad_offset != nullptr) {
                if (!(flags & kHeldY)) {
                  grad_offset[2 * field] +=
                      mask * (sums.rest_dy + SumLanes<E, kLanes<E>>(sums.dy));
                }
                if (!(flags & kHeldX)) {
                  grad_offset[2 * field + 1] +=
                      mask * (sums.rest_dx + SumLanes<E, kLanes<E>>(sums.dx));
                }
              }
              if (grad_mask != nullptr) {
                grad_mask[field] +=
                    sums.rest_value + SumLanes<E, kLanes<E>>(sums.value);
              }
            }
          }
          strip->next += lanes_used;
        }
        const int64_t done = strip->next - s.pixels.first;
        if constexpr (kColumns) {
          const Tile<E> tile{s.columns, s.stride, s.runs,         num_runs,
                             begin,     end,      s.pixels.first, done};
          if (g.depthwise) {
            DepthwiseGradient(g, operands.grad_output, tile, kernel_sums);
          } else {
            int64_t packed_group = -1;
            AddTile(g, operands.grad_output, bundle, tile, 0, g.group_filters,
                    &packed_group, s.grad_packed, kernel_sums);
          }
        }
        if (done < s.pixels.count) return false;
      }
      strip->next = strip->first;
      strip->begin = end;
    }
  }
  return true;
}

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
  E* const grad_offset = static_cast<E*>(gradients.offset);
  E* const grad_mask = static_cast<E*>(gradients.mask);

  const int64_t field_bytes =
      g.total_pixels * g.fields * static_cast<int64_t>(sizeof(E));
  if (plan.scatter && (!kNarrow || g.total_pixels == 0)) {
    Zero(parallel_for, grad_inputs,
         g.batch * g.image * static_cast<int64_t>(sizeof(T)));
  }
  if (grad_offset != nullptr) Zero(parallel_for, grad_offset, 2 * field_bytes);
  if (grad_mask != nullptr) Zero(parallel_for, grad_mask, field_bytes);

  Arena arena{static_cast<char*>(workspace)};
  O* const packed =
      wanted.columns ? arena.Take<O>(plan.KernelElements()) : nullptr;
  E* const wide =
      arena.Take<E>(plan.wide_bytes / static_cast<int64_t>(sizeof(E)));
  Strip* const strips =
      reinterpret_cast<Strip*>(arena.Take<char>(plan.StripBytes()));
  char* const deferred = arena.Take<char>(plan.DeferredBytes());
  const int64_t kernel_size =
      plan.KernelBytes() / static_cast<int64_t>(sizeof(E));
  E* const kernel_sums =
      arena.Take<E>(wanted.kernel ? plan.rooms * kernel_size : 0);
  char* const scratch = arena.base + arena.used;
  if (wanted.kernel) {
    Zero(parallel_for, kernel_sums, plan.rooms * plan.KernelBytes());
  }
  if (packed != nullptr) {
    PackTransposed(plan, operands.kernel, packed, parallel_for);
  }
  const auto scratch_of = [&](int worker) {
    Arena place{scratch + worker * plan.scratch_bytes};
    return DataScratch<T, O>(plan.blocks, plan.fused, &place);
  };

  if (!plan.scatter && !wanted.kernel) {
    int64_t tiles = CeilDiv(g.total_pixels, kDataPixels);
    if (!IsSerial(g)) tiles = RoundUp(tiles, parallel_for.num_workers);
    tiles = Min(tiles, g.total_pixels);
    RunTasks(parallel_for, tiles, [&](int64_t tile, int worker) {
      Strip strip = {};
      strip.first = strip.next = g.total_pixels * tile / tiles;
      strip.last = g.total_pixels * (tile + 1) / tiles;
      Advance<true, false, false, T, O, E>(plan, operands, packed,
                                           scratch_of(worker), &strip, nullptr,
                                           grad_offset, grad_mask, nullptr);
    });
    return;
  }

  const Sampling<E> in(g, operands.offset, operands.mask);
  auto advance = wanted.slopes ? Advance<true, true, false, T, O, E>
                               : Advance<false, true, false, T, O, E>;
  if constexpr (std::is_same<O, E>::value) {
    if (wanted.kernel) {
      advance = plan.scatter ? Advance<true, true, true, T, O, E>
                             : Advance<true, false, true, T, O, E>;
    }
  }
  for (int64_t n = 0; n < g.batch && g.total_pixels > 0; n += plan.images) {
    const int64_t images = Min(plan.images, g.batch - n);
    MakeStrips(plan, n, images, deferred, strips);
    E* sums = nullptr;
    if (plan.scatter && kNarrow) {
      sums = wide;
      Zero(parallel_for, sums,
           images * g.image * static_cast<int64_t>(sizeof(E)));
    } else if (plan.scatter) {
      sums = reinterpret_cast<E*>(grad_inputs + n * g.image);
    }
    const auto image_of = [&](const Strip& strip) {
      return plan.scatter ? sums + (strip.n - n) * g.image : nullptr;
    };
    const int64_t phases = plan.strips > 1 ? 2 : 1;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t active = images * plan.strips / phases;
      for (bool done = false; !done;) {
        RunTasks(parallel_for, active, [&](int64_t index, int worker) {
          Strip* strip = strips + index * phases + phase;
          advance(plan, operands, packed, scratch_of(worker), strip,
                  image_of(*strip), grad_offset, grad_mask,
                  kernel_sums + strip->room * kernel_size);
        });
        done = true;
        bool any = false;
        for (int64_t index = 0; index < active; ++index) {
          const Strip& strip = strips[index * phases + phase];
          done = done && strip.bundle == g.Bundles();
          any = any || strip.used > 0;
        }
        if (!any) continue;
        // By image and some of its rows.
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
    if constexpr (kNarrow) {
      const int64_t row = g.width * g.channels;
      RunTasks(parallel_for, plan.scatter ? images * g.height : 0,
               [&](int64_t y, int) {
                 NarrowRow(sums + y * row, row,
                           grad_inputs + n * g.image + y * row);
               });
    }
  }

  if (!wanted.kernel) return;
  T* const grad_kernel = static_cast<T*>(gradients.kernel);
  RunTasks(parallel_for, g.taps * g.group_channels, [&](int64_t row, int) {
    E* const total = kernel_sums + row * g.filters;
    for (int64_t room = 1; room < plan.rooms; ++room) {
      const E* from = total + room * kernel_size;
      ForEachVector<E>(g.filters, [&](auto lanes, int64_t i) {
        constexpr int kN = lanes.value;
        Store(Load<kN>(total + i) + Load<kN>(from + i), total + i);
      });
    }
    NarrowRow(total, g.filters, grad_kernel + row * g.filters);
  });
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

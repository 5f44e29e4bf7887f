// SPDX-License-Identifier: Apache-2.0
// Adds gradients of columns to the gradients of inputs, offset and mask of a
// deformable convolution on the CPU.
//
// The file has no include guard: see simd-inl.h.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Sums over a run's channels: column gradient times the sample's slopes, and
// column gradient times the sample's value.
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
      // Adds lane after lane. If two products were added, a compiler could
      // contract either product, differently in each variant of the caller, and
      // results would depend on which other gradients are wanted.
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
      // Subtracts first, so that a large common value does not drown the slope.
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

// The gradients that a strip adds to. Null: not wanted.
template <typename E>
struct DataTargets {
  E* image;  // of the strip's image
  E* offset;
  E* mask;
  E* kernel_sums;  // of the kernel, for the strip's pair
};

// The gradients that are computed from gradients of columns, decided before the
// loops.
template <bool kSlopesOf, bool kScatterOf, bool kColumnsOf>
struct Making {
  static constexpr bool kSlopes = kSlopesOf;    // gradients of offset and mask
  static constexpr bool kScatter = kScatterOf;  // the gradient of the inputs
  static constexpr bool kColumns = kColumnsOf;  // the gradient of the kernel
};

// Writes down that `columns`, the gradients of columns of a sample, wait to be
// added to corners `others` of the image. The strip's room is counted also if
// nothing is written (not kScatter), because the room determines where the tile
// ends, and so the order of the sums of the kernel's gradient.
template <bool kScatter, typename E>
static inline __attribute__((always_inline)) void Defer(
    const Deferred<E>& waiting, const E* columns, Strip* strip) {
  if (kScatter) {
    auto* entry = reinterpret_cast<Deferred<E>*>(strip->deferred + strip->used);
    *entry = waiting;
    __builtin_memcpy(entry->Gradient(), columns,
                     static_cast<size_t>(waiting.count) * sizeof(E));
  }
  strip->used += Deferred<E>::Bytes(waiting.count);
}

// Adds a sample's sums to the gradients of its offset pair and its mask.
template <typename E>
static inline __attribute__((always_inline)) void AddSlopes(
    const Sampling<E>& in, const SlopeSums<E>& sums, int32_t flags, E mask,
    int64_t pixel, int64_t field, const DataTargets<E>& to) {
  if (to.offset != nullptr) {
    E* const offset = to.offset + pixel * in.offset_numbers + 2 * field;
    if (!(flags & kHeldY)) {
      offset[0] += mask * (sums.rest_dy + SumLanes<E, kLanes<E>>(sums.dy));
    }
    if (!(flags & kHeldX)) {
      offset[1] += mask * (sums.rest_dx + SumLanes<E, kLanes<E>>(sums.dx));
    }
  }
  if (to.mask != nullptr) {
    to.mask[pixel * in.mask_numbers + field] +=
        in.Slope(mask) * (sums.rest_value + SumLanes<E, kLanes<E>>(sums.value));
  }
}

// Uses the gradients of the columns of one run at one pixel, lane `l` of `at`:
// adds them to the gradient of the image where the strip owns the rows, defers
// them elsewhere, and adds to the gradients of offset and mask. `inputs` is the
// image of `pixel`, of the batch's output. Leaves the columns in the place of
// their gradients (kColumns).
template <typename Makes, typename T, typename E>
static inline __attribute__((always_inline)) void VisitSample(
    const Sampling<E>& in, const Run& run, const Samples<E>& at, int64_t l,
    const T* inputs, const T* zeros, int64_t pixel, E* columns, Strip* strip,
    const DataTargets<E>& targets) {
  constexpr bool kSlopes = Makes::kSlopes, kScatter = Makes::kScatter,
                 kColumns = Makes::kColumns;
  const int32_t flags = at.flags[l];
  if (flags == 0) {
    if (kColumns) {
      for (int64_t i = 0; i < run.count; ++i) columns[i] = 0;
    }
    return;
  }
  const int64_t corner = at.Corner(in, l) + run.channel;
  const Corners<T> from(in, inputs + corner, flags, zeros);
  const Weights<E> weights = at.WeightsAt(l);
  const E mask = at.mask[l];
  E* const to = kScatter ? targets.image + corner : nullptr;
  const int32_t mine =
      kScatter || kColumns
          ? CornersInRows(flags, at.top[l], strip->row_first, strip->row_last)
          : 0;
  SlopeSums<E> sums;
  if (kScatter && mine == kInside) {
    UseColumns<kSlopes, true, kColumns>(in, from, columns, run.count, at.ly[l],
                                        at.lx[l], mask, weights, to, &sums);
  } else {
    const int32_t others = flags & kInside & ~mine;
    if (kScatter) {
      AddToCorners(in, mine, columns, run.count, mask, weights, to);
    }
    if ((kScatter || kColumns) && others != 0) {
      Defer<kScatter>({corner, others, at.top[l], run.count, mask, weights},
                      columns, strip);
    }
    if (kSlopes) {
      UseColumns<true, false, kColumns>(in, from, columns, run.count, at.ly[l],
                                        at.lx[l], mask, weights, to, &sums);
    }
  }
  if (kSlopes) AddSlopes(in, sums, flags, mask, pixel, run.field, targets);
}

// Uses the gradients of the columns of a tile, s.columns, pixel after pixel,
// and moves strip->next on. Stops before pixels whose deferred gradients the
// strip may not have room for.
template <typename Makes, typename T, typename O, typename E>
static inline __attribute__((always_inline)) void VisitTile(
    const DataPlan<T, O>& plan, const Sampling<E>& in, const StripBlock& block,
    const Operands<T>& operands, const DataScratch<T, O>& s, Strip* strip,
    const DataTargets<E>& targets) {
  constexpr bool kDefers = Makes::kScatter || Makes::kColumns;
  const int64_t num_runs = block.num_runs, begin = block.begin;
  for (int64_t p = 0; p < s.pixels.count; p += kLanes<E>) {
    const int64_t lanes_used = Min(kLanes<E>, s.pixels.count - p);
    if (kDefers && plan.strips > 1 &&
        strip->used + block.most * lanes_used > plan.deferred_bytes) {
      return;
    }
    for (int64_t r = 0; r < num_runs; ++r) {
      s.samples[r].Locate(in, s.pixels, p, s.runs[r]);
    }
    // A pixel's taps read neighbouring corners, and so do the next pixel's.
    for (int64_t l = 0; l < lanes_used; ++l) {
      for (int64_t r = 0; r < num_runs; ++r) {
        const Run& run = s.runs[r];
        VisitSample<Makes>(
            in, run, s.samples[r], l, operands.inputs + s.pixels.image[p + l],
            s.zeros, s.pixels.first + p + l,
            s.columns + (p + l) * s.stride + (run.row - begin), strip, targets);
      }
    }
    strip->next += lanes_used;
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

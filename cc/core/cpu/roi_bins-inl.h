// SPDX-License-Identifier: Apache-2.0
// Finds the bins of a ROI and the pixels that the bins read, on the CPU, for
// one instruction set.
//
// The file has no include guard: see simd-inl.h.
//
// A bin's samples form a grid, y_i by x_j, and whether a sample counts is
// decided along each axis alone. So the sum of the bin's bilinear samples is
//   sum over rows and columns of weight(row) * weight(column) * pixel
// where weight(row) is the sum, over all y_i, of the bilinear weights of that
// row. A bin of 4 x 4 samples that is 2 pixels wide reads 9 to 16 pixels this
// way, not 64.
//
// A pooling operator flows through these files:
//
//   roi_bins      A Rule places a ROI's bins; AxisWeights finds the rows and
//                 the columns that a bin reads, with their weights.
//   roi_lanes     The same for as many channels at once as a vector has lanes,
//                 each with a displacement of its own.
//   roi_packing   Position-sensitive maps, reordered so that a bin reads
//                 channels that lie side by side.
//   roi_passes    Forward and the two gradients: tasks, and what is summed.
//
// The weights are found in four places: AxisWeights and LaneWeights here,
// FindWeights on a GPU (cuda/roi_bins-inl.h), and the portable op in Python.
// All evaluate the same formula, each in the form that suits its hardware, and
// the tests compare all of them with the same reference.
//
// The passes are written for a Rule: how one operator divides a ROI. A Rule
// has the fields of RoiGeometry and
//   RoiAxis<E> Axis(E from, E to, bool along_x) const   of these corners
//   E Displacement(E value, E size) const   map pixels, of an axis of that size
//   E DisplacementSlope(E size) const       its derivative
//   static constexpr double kMargin     a sample may lie this far outside of
//                                       [0, size - 1]
//   static constexpr double kPhase      of a bin's first sample, in steps
//   static constexpr bool kMeanOfAll    samples outside count, as zeros
// (deformable_*_rule-inl.h, which a GPU uses too).

// For the rules, which are compiled here and for a GPU.
#define TF_DEFORM_RULE_NAMESPACE cpu::TF_DEFORM_ISA
#define TF_DEFORM_RULE_FUNCTION inline

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Sizes of a call.
struct RoiGeometry {
  int64_t batch, height, width;
  int64_t num_rois;
  int64_t pooled_h, pooled_w;
  int64_t group_h, group_w;         // cells of the position-sensitive maps
  int64_t part_h, part_w;           // displacements of a ROI
  int64_t classes, class_channels;  // with a displacement of their own
  int64_t samples_h, samples_w;     // of a bin along an axis, at most

  int64_t Depth() const { return classes * class_channels; }
  int64_t Cells() const { return group_h * group_w; }
  int64_t Pixels() const { return height * width; }
  int64_t Image() const { return Pixels() * Cells() * Depth(); }
  int64_t Bins() const { return pooled_h * pooled_w; }
  int64_t Pooled(bool along_x) const { return along_x ? pooled_w : pooled_h; }

  // The largest number of rows or columns that a bin reads. The last row or
  // column may come twice, see AxisWeights.
  int64_t MaxReads() const {
    return Max(Min(2 * samples_h, height + 1), Min(2 * samples_w, width + 1));
  }
};

// The type in which a bin's samples along one axis are counted.
using SampleCount = int64_t;

// One axis of a ROI, in map pixels.
template <typename E>
struct RoiAxis {
  E start;              // of its first bin
  E size;               // of the ROI
  E bin;                // from one bin to the next
  E step;               // from one sample to the next
  SampleCount samples;  // of a bin
};

// A product rounded to its own precision, which the compiler may not take into
// a fused multiply-add: whether a sample on the edge counts has to be the same
// for every instruction set, and for a reader who computes it step by step.
template <typename E>
static inline E Product(E a, E b) {
  E product = a * b;
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

template <typename E>
static inline bool IsFinite(E value) {
  return value - value == 0;
}

// A row of `rois`.
template <typename E>
struct RoiRow {
  int64_t index;  // of the ROI
  int64_t image;  // that the ROI lies in; -1: in none
  E x1, y1, x2, y2;

  // `roi` is (batch_index, x1, y1, x2, y2). ROIs for padding lie in no image;
  // nor do ROIs whose batch index is no image's or whose corners are not
  // finite, nor any ROI if images have no pixels.
  RoiRow(const RoiGeometry& g, const E* roi, int64_t index)
      : index(index),
        image(-1),
        x1(roi[1]),
        y1(roi[2]),
        x2(roi[3]),
        y2(roi[4]) {
    const E number = roi[0];
    const bool counts = number >= 0 && number < static_cast<E>(g.batch) &&
                        IsFinite(x1) && IsFinite(y1) && IsFinite(x2) &&
                        IsFinite(y2) && g.Pixels() > 0;
    if (!counts) return;
    const int64_t whole = static_cast<int64_t>(number);
    if (whole < g.batch && static_cast<E>(whole) == number) image = whole;
  }

  // Row `index` of `rois`.
  static RoiRow Read(const RoiGeometry& g, const E* rois, int64_t index) {
    return RoiRow(g, rois + 5 * index, index);
  }
};

// A ROI on the map.
template <typename E>
struct Roi {
  int64_t index;
  RoiAxis<E> y, x;

  template <typename Rule>
  Roi(const Rule& rule, const RoiRow<E>& row)
      : index(row.index),
        y(rule.Axis(row.y1, row.y2, /*along_x=*/false)),
        x(rule.Axis(row.x1, row.x2, /*along_x=*/true)) {}
};

// Rows or columns that a window holds.
constexpr int kWindow = 16;

// The rows (or the columns) that the samples of a bin read, and their weights.
template <typename E>
struct AxisWeights {
  int64_t* at;      // [count], elements from the image to the row or column
  E* weight;        // [count], sums of the samples' bilinear weights
  E* slope;         // [count], derivatives of the weights by the displacement
  int64_t count;    // rows or columns
  int64_t samples;  // that are not skipped

  // Allocates room for `most` rows or columns.
  AxisWeights(int64_t most, Arena* arena)
      : at(arena->Take<int64_t>(Max(most, kWindow))),
        weight(arena->Take<E>(Max(most, kWindow))),
        slope(arena->Take<E>(Max(most, kWindow))),
        count(0),
        samples(0) {}

  // Finds the weights of a bin that begins at `start`, on an axis of `pixels`
  // that are `stride` elements apart. Finds slopes only if kSlopes.
  template <bool kSlopes, typename Rule>
  void Find(const Rule&, const RoiAxis<E>& axis, E start, int64_t pixels,
            int64_t stride) {
    const E last = static_cast<E>(pixels - 1);
    const E least = -static_cast<E>(Rule::kMargin);
    const E most = last + static_cast<E>(Rule::kMargin);
    const E phase = static_cast<E>(Rule::kPhase);
    const auto place_of = [&](int64_t i) {
      return start + Product(static_cast<E>(i) + phase, axis.step);
    };
    // Written so that NaN lies outside.
    const auto counts = [=](E place) {
      return place >= least && place <= most;
    };
    const auto clamped = [=](E place) {
      return place < 0 ? E(0) : place > last ? last : place;
    };
    const auto pixel_at = [=](E place) {
      return Min(static_cast<int64_t>(place), pixels - 1);
    };
    const auto held = [=](E place) { return place < 0 || place >= last; };

    // Samples less than two pixels apart that fit into a window touch each of
    // its pixels: the weights are sums of hat functions.
    if (axis.step >= 0 && axis.step <= E(1.9) && axis.samples > 0) {
      int64_t begin = 0, end = axis.samples;
      while (begin < end && !counts(place_of(begin))) ++begin;
      while (begin < end && !counts(place_of(end - 1))) --end;
      samples = end - begin;
      count = 0;
      if (samples == 0) return;
      const int64_t base = pixel_at(clamped(place_of(begin)));
      const int64_t top = pixel_at(clamped(place_of(end - 1)));
      count = Min(top + 1, pixels - 1) - base + 1;
      if (count <= kWindow) {
        typedef Vector<E, kWindow> V;
        V pixel, sum = {}, change = {};
        for (int lane = 0; lane < kWindow; ++lane) {
          pixel[lane] = static_cast<E>(base) + static_cast<E>(lane);
          at[lane] = (base + lane) * stride;
        }
        for (int64_t i = begin; i < end; ++i) {
          const E place = place_of(i);
          const V distance = clamped(place) - pixel;
          const V hat = 1 - (distance < 0 ? -distance : distance);
          sum += hat > 0 ? hat : V{};
          if constexpr (kSlopes) {
            if (held(place)) continue;
            // The right-hand derivative: the weight at `place` falls, the next
            // weight rises.
            const V falls = ((distance >= 0) & (distance < 1)) ? V{} - 1 : V{};
            const V rises = ((distance >= -1) & (distance < 0)) ? V{} + 1 : V{};
            change += falls + rises;
          }
        }
        Store(sum, weight);
        if constexpr (kSlopes) Store(change, slope);
        return;
      }
    }

    // In ascending order, so that a sample reads two new rows, or one new row
    // and the last one, or the last two.
    const bool backwards = axis.step < 0;
    count = samples = 0;
    int64_t top = -2;  // of the sample before
    for (int64_t k = 0; k < axis.samples; ++k) {
      const E raw = place_of(backwards ? axis.samples - 1 - k : k);
      if (!counts(raw)) continue;
      ++samples;
      const E place = clamped(raw);
      const int64_t here = pixel_at(place);
      const auto append = [&](int64_t pixel) {
        at[count] = pixel * stride;
        weight[count] = slope[count] = 0;
        ++count;
      };
      if (here != top) {
        if (here != top + 1 || count == 0) append(here);
        append(Min(here + 1, pixels - 1));  // the last may come twice
        top = here;
      }
      const E distance = place - static_cast<E>(here);
      const E change = held(raw) ? E(0) : E(1);
      weight[count - 2] += 1 - distance;
      weight[count - 1] += distance;
      slope[count - 2] -= change;
      slope[count - 1] += change;
    }
  }
};

// Scratch of a worker.
template <typename E>
struct RoiScratch {
  AxisWeights<E> y, x;
  E* row;  // [Depth()], a bin's gradient

  RoiScratch(const RoiGeometry& g, Arena* arena)
      : y(g.MaxReads(), arena),
        x(g.MaxReads(), arena),
        row(arena->Take<E>(g.Depth())) {}

  static int64_t Bytes(const RoiGeometry& g) {
    Arena arena{nullptr};
    RoiScratch(g, &arena);
    return arena.used;
  }
};

// Some of the bins and classes of a ROI.
struct BinRange {
  int64_t ph_begin, ph_end, pw_begin, pw_end, class_begin, class_end;
};

static BinRange AllBins(const RoiGeometry& g) {
  return {0, g.pooled_h, 0, g.pooled_w, 0, g.classes};
}

// The place of a bin, which all of its classes share.
template <typename E>
struct BinPlace {
  int64_t output;  // its first element in output and count
  int64_t cell, part;
  E y, x;  // where it begins, not displaced

  BinPlace(const RoiGeometry& g, const Roi<E>& roi, int64_t ph, int64_t pw)
      : output(((roi.index * g.pooled_h + ph) * g.pooled_w + pw) * g.Depth()),
        cell(ph * g.group_h / g.pooled_h * g.group_w +
             pw * g.group_w / g.pooled_w),
        part((roi.index * g.part_h + ph * g.part_h / g.pooled_h) * g.part_w +
             pw * g.part_w / g.pooled_w),
        y(Product(static_cast<E>(ph), roi.y.bin) + roi.y.start),
        x(Product(static_cast<E>(pw), roi.x.bin) + roi.x.start) {}
};

// A bin of one class.
template <typename E>
struct Bin {
  int64_t output;        // its first element in output and count
  int64_t map;           // its first element in a repacked image
  int64_t displacement;  // the element of its dy; the next is its dx
  E share;               // 1 / number of samples, 0 if there is none
};

// Calls body(bin) for the bins of `roi` in `range`; s->y and s->x then hold the
// bin's weights. `displacements` may be null.
template <bool kSlopes, typename Rule, typename E, typename Body>
static inline __attribute__((always_inline)) void ForEachBin(
    const Rule& rule, const Roi<E>& roi, const E* displacements,
    const BinRange& range, RoiScratch<E>* s, const Body& body) {
  const int64_t depth = rule.Depth();
  for (int64_t ph = range.ph_begin; ph < range.ph_end; ++ph) {
    for (int64_t pw = range.pw_begin; pw < range.pw_end; ++pw) {
      const BinPlace<E> place(rule, roi, ph, pw);
      for (int64_t k = range.class_begin; k < range.class_end; ++k) {
        Bin<E> bin;
        bin.output = place.output + k * rule.class_channels;
        bin.map = place.cell * rule.Pixels() * depth + k * rule.class_channels;
        bin.displacement = (place.part * rule.classes + k) * 2;
        E y = place.y, x = place.x;
        if (displacements != nullptr) {
          const E* pair = displacements + bin.displacement;
          y += rule.Displacement(pair[0], roi.y.size);
          x += rule.Displacement(pair[1], roi.x.size);
        }
        s->y.template Find<kSlopes>(rule, roi.y, y, rule.height,
                                    rule.width * depth);
        s->x.template Find<kSlopes>(rule, roi.x, x, rule.width, depth);
        const int64_t samples = Rule::kMeanOfAll ? roi.y.samples * roi.x.samples
                                                 : s->y.samples * s->x.samples;
        bin.share = samples > 0 ? 1 / static_cast<E>(samples) : E(0);
        body(bin);
      }
    }
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

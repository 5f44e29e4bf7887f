// SPDX-License-Identifier: Apache-2.0
// Pooling of regions of interest on the CPU, for one instruction set: what
// deformable PS-ROI pooling and deformable ROIAlign have in common.
//
// No include guard: see simd-inl.h.
//
// A bin's samples form a grid, y_i by x_j, and whether a sample counts is
// decided along each axis alone. So the sum of its bilinear samples is
//   sum over rows and columns of weight(row) * weight(column) * pixel
// with weight(row) the sum of the bilinear weights of that row over all y_i. A
// bin of 4 x 4 samples, 2 pixels wide, reads 9 to 16 pixels so, not 64; a
// bin's taps are the rows and columns that it reads, with their weights.
//
//   PoolPass        Tasks are ROIs. A bin is the weighted sum of its pixels.
//   DisplacePass    Tasks are ROIs. The gradient of a displacement is the same
//                   sum with the derivative of the weights along one axis.
//   ScatterPass     The gradient of the inputs lands anywhere in the image, so
//                   tasks own parts of it: an image, a cell of the
//                   position-sensitive maps, and a block of channels. Each
//                   walks through all ROIs in order: no two tasks write to the
//                   same place, and the order of sums never depends on the
//                   number of workers.
//
// The channels of position-sensitive maps are ordered (output channel, cell),
// but a bin reads all output channels of one cell. So the passes work on
// repacked images, [cell][row][column][output channel]. With one cell the two
// are the same, and nothing is repacked.
//
// The passes are written for a Rule: what one operator makes of a ROI. It has
// the fields of RoiGeometry and
//   Roi<E> Locate(const E* roi) const   where its bins lie
//   E Displacement(E value, E size) const   map pixels, of an axis of that size
//   E DisplacementSlope(E size) const       its derivative
//   static constexpr double kMargin     a sample may lie this far outside of
//                                       [0, size - 1]
//   static constexpr bool kMeanOfAll    samples outside count, as zeros

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

  // Rows and columns that a bin can read. The last may come twice, see Taps.
  int64_t MaxTaps() const {
    return Max(Min(2 * samples_h, height + 1), Min(2 * samples_w, width + 1));
  }
};

// One axis of a ROI, in map pixels.
template <typename E>
struct RoiAxis {
  E start;          // of its first bin
  E size;           // of the ROI
  E bin;            // from one bin to the next
  E step;           // from one sample to the next
  E phase;          // of a bin's first sample, in steps
  int64_t samples;  // of a bin
};

template <typename E>
struct Roi {
  RoiAxis<E> y, x;
};

// A value that the compiler may not carry on with more than its own precision,
// as in a fused multiply-add: whether a sample on the edge counts has to be the
// same for every instruction set, and for anyone who computes it step by step.
template <typename E>
static inline E Rounded(E value) {
#if defined(__x86_64__)
  __asm__("" : "+x"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#endif
  return value;
}

template <typename E>
static inline bool IsFinite(E value) {
  return value - value == 0;
}

// The image that a ROI lies in; -1 for padding, for batch indices that are no
// image's, for corners that are not finite, and if images have no pixels.
template <typename E>
static inline int64_t ImageOf(const RoiGeometry& g, const E* roi) {
  const E index = roi[0];
  const bool counts = index >= 0 && index < static_cast<E>(g.batch) &&
                      IsFinite(roi[1]) && IsFinite(roi[2]) &&
                      IsFinite(roi[3]) && IsFinite(roi[4]) && g.Pixels() > 0;
  if (!counts) return -1;
  const int64_t image = static_cast<int64_t>(index);
  return image < g.batch && static_cast<E>(image) == index ? image : -1;
}

// Rows or columns that a window holds.
constexpr int kWindow = 16;

// The taps of a bin along one axis: rows or columns that its samples read.
template <typename E>
struct Taps {
  int64_t* at;  // [count], first elements
  E* weight;    // [count], sums of the samples' bilinear weights
  E* slope;     // [count], derivatives of the weights by the displacement
  int64_t count;
  int64_t samples;  // that count

  // `most` of them.
  Taps(int64_t most, Arena* arena)
      : at(arena->Take<int64_t>(Max(most, kWindow))),
        weight(arena->Take<E>(Max(most, kWindow))),
        slope(arena->Take<E>(Max(most, kWindow))),
        count(0),
        samples(0) {}

  // The taps of a bin that begins at `start`, on an axis of `pixels`, `stride`
  // elements apart. Slopes only if asked for.
  template <bool kSlopes, typename Rule>
  void Find(const Rule&, const RoiAxis<E>& axis, E start, int64_t pixels,
            int64_t stride) {
    const E last = static_cast<E>(pixels - 1);
    const E least = -static_cast<E>(Rule::kMargin);
    const E most = last + static_cast<E>(Rule::kMargin);
    const auto place_of = [&](int64_t i) {
      return start + Rounded((static_cast<E>(i) + axis.phase) * axis.step);
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
            // Right-hand: the pixel at `place` falls, the next one rises.
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

    // In ascending order, so that a sample's taps are new or the last two.
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

// What a worker needs.
template <typename E>
struct RoiScratch {
  Taps<E> y, x;
  E* row;  // [Depth()], a bin's gradient

  RoiScratch(const RoiGeometry& g, Arena* arena)
      : y(g.MaxTaps(), arena),
        x(g.MaxTaps(), arena),
        row(arena->Take<E>(g.Depth())) {}

  static int64_t Bytes(const RoiGeometry& g) {
    Arena arena{nullptr};
    RoiScratch(g, &arena);
    return arena.used;
  }
};

// A part of what a ROI is pooled into.
struct BinRange {
  int64_t ph_begin, ph_end, pw_begin, pw_end, class_begin, class_end;
};

// What all classes of a bin have in common.
template <typename E>
struct BinPlace {
  int64_t output;  // its first element in output and count
  int64_t cell, part;
  E y, x;  // where it begins, not displaced

  BinPlace(const RoiGeometry& g, const Roi<E>& roi, int64_t r, int64_t ph,
           int64_t pw)
      : output(((r * g.pooled_h + ph) * g.pooled_w + pw) * g.Depth()),
        cell(ph * g.group_h / g.pooled_h * g.group_w +
             pw * g.group_w / g.pooled_w),
        part((r * g.part_h + ph * g.part_h / g.pooled_h) * g.part_w +
             pw * g.part_w / g.pooled_w),
        y(Rounded(static_cast<E>(ph) * roi.y.bin) + roi.y.start),
        x(Rounded(static_cast<E>(pw) * roi.x.bin) + roi.x.start) {}
};

// A bin of one class.
template <typename E>
struct Bin {
  int64_t output;        // its first element in output and count
  int64_t map;           // its first element in a repacked image
  int64_t displacement;  // the element of its dy; the next is its dx
  E share;               // 1 / number of samples, 0 if there is none
};

// Calls body(bin) for the bins of ROI r in `range`, with s.y and s.x found.
// `displacements` may be null.
template <bool kSlopes, typename Rule, typename E, typename Body>
static inline __attribute__((always_inline)) void ForEachBin(
    const Rule& rule, const Roi<E>& roi, int64_t r, const E* displacements,
    const BinRange& range, RoiScratch<E>* s, const Body& body) {
  const int64_t depth = rule.Depth();
  for (int64_t ph = range.ph_begin; ph < range.ph_end; ++ph) {
    for (int64_t pw = range.pw_begin; pw < range.pw_end; ++pw) {
      const BinPlace<E> place(rule, roi, r, ph, pw);
      for (int64_t k = range.class_begin; k < range.class_end; ++k) {
        Bin<E> bin;
        bin.output = place.output + k * rule.class_channels;
        bin.map = place.cell * rule.Pixels() * depth + k * rule.class_channels;
        bin.displacement = (place.part * rule.classes + k) * 2;
        E y = place.y, x = place.x;
        if (displacements != nullptr) {
          const E* pair = displacements + bin.displacement;
          y += Rounded(rule.Displacement(pair[0], roi.y.size));
          x += Rounded(rule.Displacement(pair[1], roi.x.size));
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

static BinRange AllBins(const RoiGeometry& g) {
  return {0, g.pooled_h, 0, g.pooled_w, 0, g.classes};
}

// kN elements, widened, to be summed in a loop. One of them is a plain number:
// compilers keep vectors of one lane in memory.
template <int kN, typename T>
static inline auto LoadSum(const T* from) {
  if constexpr (kN == 1) {
    return Load<1>(from)[0];
  } else {
    return Load<kN>(from);
  }
}

template <int kN, typename T>
using Sum = decltype(LoadSum<kN>(static_cast<const T*>(nullptr)));

// Writes the first of kN sums, `count` if that is less, as elements of T.
template <int kN, typename V, typename T>
static inline void StoreSum(const V& sum, int64_t count, T* to) {
  typename AccumulatorOf<T>::Type sums[kN];
  Store(sum, sums);
  if (count >= kN) {
    NarrowRow(sums, kN, to);
  } else {
    NarrowRow(sums, count, to);
  }
}

// -----------------------------------------------------------------------------
// Narrow classes: where few channels share a displacement, the taps of as many
// channels as a vector has lanes are found together, and each lane reads its
// own pixels. For rules without classes, and those with kMeanOfAll, there is no
// need of it. Pooling with a displacement for each of 21 channels takes 0.6
// times as long so, its gradients half.

template <typename E>
struct LaneTaps {
  static constexpr int kN = kLanes<E>;
  typedef Vector<E, kN> V;
  typedef Vector<int64_t, kN> I;

  int64_t at[kWindow][kN];  // first elements of rows or columns
  V weight[kWindow];        // 0 where a lane does not read, see Taps
  V slope[kWindow];
  V samples;  // that count
  int64_t count;

  // Whether the taps of every bin of `axis` fit in a window, and pixels in E.
  static bool Fit(const RoiAxis<E>& axis, int64_t pixels) {
    return axis.step >= 0 && axis.samples > 0 && 2 * axis.samples <= kWindow &&
           pixels < (1 << 24);
  }

  template <bool kSlopes, typename Rule>
  void Find(const Rule&, const RoiAxis<E>& axis, const V& start, int64_t pixels,
            int64_t stride) {
    const V last = V{} + static_cast<E>(pixels - 1), none = V{} - 2;
    const V least = V{} - static_cast<E>(Rule::kMargin);
    const V most = last + static_cast<E>(Rule::kMargin);
    V place[kWindow], moving[kWindow];  // far from any pixel: does not count
    V first = last, top = {};
    samples = V{};
    for (int64_t i = 0; i < axis.samples; ++i) {
      const V raw =
          start + Rounded((static_cast<E>(i) + axis.phase) * axis.step);
      const auto counts = (raw >= least) & (raw <= most);
      const V clamped = raw < 0 ? V{} : raw > last ? last : raw;
      samples += counts ? V{} + 1 : V{};
      first = (counts & (clamped < first)) ? clamped : first;
      top = (counts & (clamped > top)) ? clamped : top;
      place[i] = counts ? clamped : none;
      moving[i] = (counts & (raw >= 0) & (raw < last)) ? clamped : none;
    }
    // Tap `a` of each lane: its pixel, and the weight in it of a sample at a
    // distance of less than 1.
    const auto set = [&](int64_t a, const I& pixel) {
      // Past the edge a sample weighs nothing, but there is its cell's end.
      Store((pixel < pixels ? pixel : I{} + (pixels - 1)) * stride, at[a]);
      weight[a] = slope[a] = V{};
    };
    const auto add = [&](int64_t a, int64_t i, const V& pixel) {
      const V distance = place[i] - pixel;
      const V hat = 1 - (distance < 0 ? -distance : distance);
      weight[a] += hat > 0 ? hat : V{};
      if constexpr (kSlopes) {
        // Right-hand: the pixel at `from` falls, the next one rises.
        const V from = moving[i] - pixel;
        slope[a] += ((from >= 0) & (from < 1)) ? V{} - 1 : V{};
        slope[a] += ((from >= -1) & (from < 0)) ? V{} + 1 : V{};
      }
    };
    if (axis.step > E(1.5)) {  // hardly a pixel is shared
      count = 2 * axis.samples;
      for (int64_t a = 0; a < count; ++a) {
        const V& sample = place[a / 2];
        const I pixel =
            __builtin_convertvector(sample < 0 ? V{} : sample, I) + a % 2;
        set(a, pixel);
        add(a, a / 2, __builtin_convertvector(pixel, V));
      }
      return;
    }
    const I base = __builtin_convertvector(first, I);
    const I reach = __builtin_convertvector(top, I) + 2 - base;
    count = 1;
    for (int lane = 0; lane < kN; ++lane) count = Max(count, reach[lane]);
    for (int64_t a = 0; a < count; ++a) {
      set(a, base + a);
      const V pixel = __builtin_convertvector(base + a, V);
      for (int64_t i = 0; i < axis.samples; ++i) add(a, i, pixel);
    }
  }
};

// Channels [channel, channel + lanes) of a bin.
template <typename E>
struct LaneBin {
  int64_t channel;
  int lanes;
  int64_t output, map, displacements;  // as in Bin, of `channel`; of class 0
  Vector<E, kLanes<E>> share;
};

template <typename Rule, typename E>
static bool UsesLanes(const Rule& rule, const Roi<E>& roi,
                      const E* displacements) {
  return !Rule::kMeanOfAll && displacements != nullptr && rule.classes > 1 &&
         rule.class_channels < kLanes<E> / 2 &&
         LaneTaps<E>::Fit(roi.y, rule.height) &&
         LaneTaps<E>::Fit(roi.x, rule.width);
}

// Calls body(LaneBin, y, x) for channels [begin, end) of the bins in `range`.
template <bool kSlopes, typename Rule, typename E, typename Body>
static inline __attribute__((always_inline)) void ForEachLaneBin(
    const Rule& rule, const Roi<E>& roi, int64_t r, const E* displacements,
    const BinRange& range, int64_t begin, int64_t end, const Body& body) {
  constexpr int kN = kLanes<E>;
  const int64_t depth = rule.Depth();
  LaneTaps<E> y, x;
  for (int64_t ph = range.ph_begin; ph < range.ph_end; ++ph) {
    for (int64_t pw = range.pw_begin; pw < range.pw_end; ++pw) {
      const BinPlace<E> place(rule, roi, r, ph, pw);
      for (int64_t c = begin; c < end; c += kN) {
        LaneBin<E> bin;
        bin.channel = c;
        bin.lanes = static_cast<int>(Min(kN, end - c));
        bin.output = place.output + c;
        bin.map = place.cell * rule.Pixels() * depth + c;
        bin.displacements = place.part * rule.classes * 2;
        // Lanes past the end have no samples.
        Vector<E, kN> start_y, start_x;
        start_y = start_x = Vector<E, kN>{} + static_cast<E>(__builtin_nan(""));
        const E* pair =
            displacements + bin.displacements + c / rule.class_channels * 2;
        int64_t in_class = c % rule.class_channels;
        for (int lane = 0; lane < bin.lanes; ++lane) {
          start_y[lane] =
              place.y + Rounded(rule.Displacement(pair[0], roi.y.size));
          start_x[lane] =
              place.x + Rounded(rule.Displacement(pair[1], roi.x.size));
          if (++in_class == rule.class_channels) in_class = 0, pair += 2;
        }
        y.template Find<kSlopes>(rule, roi.y, start_y, rule.height,
                                 rule.width * depth);
        x.template Find<kSlopes>(rule, roi.x, start_x, rule.width, depth);
        const Vector<E, kN> samples = y.samples * x.samples;
        bin.share = samples > 0 ? 1 / samples : Vector<E, kN>{};
        body(bin, y, x);
      }
    }
  }
}

// A pixel of each lane: elements y[lane] + x[lane] + lane.
template <typename E, typename T>
static inline Vector<E, kLanes<E>> LoadLanes(const T* map, const int64_t* y,
                                             const int64_t* x, int lanes) {
  constexpr int kN = kLanes<E>;
  Vector<E, kN> pixels = {};
  if (lanes == kN) {
#pragma GCC unroll 16
    for (int lane = 0; lane < kN; ++lane) {
      pixels[lane] = Load<1>(map + y[lane] + x[lane] + lane)[0];
    }
  } else {
    for (int lane = 0; lane < lanes; ++lane) {
      pixels[lane] = Load<1>(map + y[lane] + x[lane] + lane)[0];
    }
  }
  return pixels;
}

// weight * value, 0 where the weight is: what a lane does not read may be NaN.
template <typename V>
static inline V Weigh(const V& weight, const V& value) {
  return weight != 0 ? weight * value : V{};
}

// The output of a LaneBin.
template <typename T, typename E>
static inline void PoolLanes(const LaneBin<E>& bin, const LaneTaps<E>& y,
                             const LaneTaps<E>& x, const T* map, T* to) {
  typedef Vector<E, kLanes<E>> V;
  V sum = {};
  for (int64_t a = 0; a < y.count; ++a) {
    V in_row = {};
    for (int64_t b = 0; b < x.count; ++b) {
      in_row +=
          Weigh(x.weight[b], LoadLanes<E>(map, y.at[a], x.at[b], bin.lanes));
    }
    sum += Weigh(y.weight[a], in_row);
  }
  sum *= bin.share;
  for (int lane = 0; lane < bin.lanes; ++lane) Narrow(sum[lane], to + lane);
}

// Adds to the gradients of the displacements of a LaneBin's classes.
template <typename Rule, typename T, typename E>
static inline void DisplaceLanes(const Rule& rule, const Roi<E>& roi,
                                 const LaneBin<E>& bin, const LaneTaps<E>& y,
                                 const LaneTaps<E>& x, const T* map,
                                 const T* gradient, E* grad_displacements) {
  typedef Vector<E, kLanes<E>> V;
  V by_y = {}, by_x = {};
  for (int64_t a = 0; a < y.count; ++a) {
    V value = {}, change = {};
    for (int64_t b = 0; b < x.count; ++b) {
      const V pixels = LoadLanes<E>(map, y.at[a], x.at[b], bin.lanes);
      value += Weigh(x.weight[b], pixels);
      change += Weigh(x.slope[b], pixels);
    }
    by_y += Weigh(y.slope[a], value);
    by_x += Weigh(y.weight[a], change);
  }
  by_y *= bin.share * rule.DisplacementSlope(roi.y.size);
  by_x *= bin.share * rule.DisplacementSlope(roi.x.size);
  for (int lane = 0; lane < bin.lanes; ++lane) {
    E* to = grad_displacements + bin.displacements +
            (bin.channel + lane) / rule.class_channels * 2;
    const E g = Load<1>(gradient + lane)[0];
    // Without samples no gradient, even where it is infinite.
    if (y.samples[lane] * x.samples[lane] == 0) continue;
    to[0] += g * by_y[lane];
    to[1] += g * by_x[lane];
  }
}

// Adds to the gradient of the pixels that a LaneBin reads.
template <typename T, typename E>
static inline void ScatterLanes(const LaneBin<E>& bin, const LaneTaps<E>& y,
                                const LaneTaps<E>& x, const T* gradient,
                                E* map) {
  typedef Vector<E, kLanes<E>> V;
  V g = {};
  for (int lane = 0; lane < bin.lanes; ++lane) {
    g[lane] = Load<1>(gradient + lane)[0];
  }
  g *= bin.share;
  for (int64_t a = 0; a < y.count; ++a) {
    for (int64_t b = 0; b < x.count; ++b) {
      const V change = Weigh(y.weight[a] * x.weight[b], g);
      for (int lane = 0; lane < bin.lanes; ++lane) {
        map[y.at[a][lane] + x.at[b][lane] + lane] += change[lane];
      }
    }
  }
}

// -----------------------------------------------------------------------------
// Repacking. `packed` is [image][cell][pixel][output channel].

// Pixels whose channels are in the cache while cell after cell is packed.
constexpr int64_t kPackPixels = 8;

// Calls body(image, first pixel, pixels), at most kPackPixels at a time. Tasks
// are long runs of pixels: neighbours write to the same lines of the cache.
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

// Elements behind repacked images that may be read: what is left over of a
// bin's channels, few as they are there, is read as half a vector.
constexpr int64_t kOverread = 32;

// Images that are repacked at a time: as many as kScratchBytes a worker hold,
// but at least one.
static int64_t ImagesAtOnce(const RoiGeometry& g, int64_t element_bytes,
                            int num_workers) {
  const int64_t image = g.Image() * element_bytes;
  if (image == 0) return Max(1, g.batch);
  return Max(1, Min(g.batch, kScratchBytes * num_workers / image));
}

// Calls body(first image, number of images, map) for as many images at a time
// as are repacked, with `map` where `first image` starts; once for all if
// nothing has to be.
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

// -----------------------------------------------------------------------------
// Tasks.

// Element operations below which a task is not worth handing out.
constexpr int64_t kTaskWork = 1 << 15;

// Of one ROI, about: reading four pixels a bin, finding its taps.
static int64_t RoiWork(const RoiGeometry& g) {
  return g.Bins() *
         (4 * g.Depth() + g.classes * 8 * (g.samples_h + g.samples_w));
}

// Calls body(r, image - first_image, worker) for every ROI in one of the
// images; with image -1 for ROIs that lie in none, if first_image is 0.
template <typename E, typename Body>
static void ForEachRoi(const RoiGeometry& g, const E* rois, int64_t first_image,
                       int64_t images, const ParallelFor& parallel_for,
                       const Body& body) {
  const int64_t block = Max(1, kTaskWork / Max(1, RoiWork(g)));
  RunTasks(
      parallel_for, CeilDiv(g.num_rois, block), [&](int64_t task, int worker) {
        const int64_t end = Min(g.num_rois, (task + 1) * block);
        for (int64_t r = task * block; r < end; ++r) {
          const int64_t image = ImageOf(g, rois + 5 * r);
          if (image < 0) {
            if (first_image == 0) body(r, -1, worker);
          } else if (image >= first_image && image < first_image + images) {
            body(r, image - first_image, worker);
          }
        }
      });
}

template <typename T>
static int64_t PackedBytes(const RoiGeometry& g, int num_workers) {
  if (g.Cells() == 1) return 0;
  const int64_t elements =
      ImagesAtOnce(g, sizeof(T), num_workers) * g.Image() + kOverread;
  return RoundUp(elements * static_cast<int64_t>(sizeof(T)), 64);
}

// Bytes for PoolPass and DisplacePass.
template <typename T>
static int64_t PoolWorkspace(const RoiGeometry& g, int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  return PackedBytes<T>(g, num_workers) + num_workers * RoiScratch<E>::Bytes(g);
}

// -----------------------------------------------------------------------------

// Writes output and, if not null, count.
template <typename T, typename Rule, typename E>
static void PoolPass(const Rule& rule, const T* inputs, const E* rois,
                     const E* displacements, void* workspace, T* output,
                     float* count, const ParallelFor& parallel_for) {
  char* const scratch = static_cast<char*>(workspace) +
                        PackedBytes<T>(rule, parallel_for.num_workers);
  const int64_t scratch_bytes = RoiScratch<E>::Bytes(rule);
  const int64_t roi_outputs = rule.Bins() * rule.Depth();
  const BinRange all = AllBins(rule);
  if (rule.num_rois == 0) return;
  const int64_t channels = rule.Cells() == 1
                               ? rule.class_channels
                               : RoundUp(rule.class_channels, kLanes<E> / 2);
  ForEachPackedChunk(
      rule, inputs, workspace, parallel_for,
      [&](int64_t first_image, int64_t images, const T* maps) {
        ForEachRoi(
            rule, rois, first_image, images, parallel_for,
            [&](int64_t r, int64_t image, int worker) {
              if (image < 0) {
                __builtin_memset(static_cast<void*>(output + r * roi_outputs),
                                 0, roi_outputs * sizeof(T));
                if (count == nullptr) return;
                for (int64_t i = 0; i < roi_outputs; ++i) {
                  count[r * roi_outputs + i] = 0;
                }
                return;
              }
              Arena arena{scratch + worker * scratch_bytes};
              RoiScratch<E> s(rule, &arena);
              const Roi<E> roi = rule.Locate(rois + 5 * r);
              const T* const image_maps = maps + image * rule.Image();
              if (UsesLanes(rule, roi, displacements)) {
                ForEachLaneBin<false>(
                    rule, roi, r, displacements, all, 0, rule.Depth(),
                    [&](const LaneBin<E>& bin, const LaneTaps<E>& y,
                        const LaneTaps<E>& x) {
                      PoolLanes<T>(bin, y, x, image_maps + bin.map,
                                   output + bin.output);
                      if (count == nullptr) return;
                      for (int lane = 0; lane < bin.lanes; ++lane) {
                        count[bin.output + lane] = static_cast<float>(
                            y.samples[lane] * x.samples[lane]);
                      }
                    });
                return;
              }
              ForEachBin<false>(
                  rule, roi, r, displacements, all, &s, [&](const Bin<E>& bin) {
                    const T* map = image_maps + bin.map;
                    T* to = output + bin.output;
                    ForEachVector<E>(channels, [&](auto lanes, int64_t i) {
                      constexpr int kN = lanes.value;
                      Sum<kN, T> sum = {};
                      for (int64_t a = 0; a < s.y.count; ++a) {
                        const T* row = map + s.y.at[a] + i;
                        Sum<kN, T> in_row = {};
                        for (int64_t b = 0; b < s.x.count; ++b) {
                          in_row +=
                              s.x.weight[b] * LoadSum<kN>(row + s.x.at[b]);
                        }
                        sum += s.y.weight[a] * in_row;
                      }
                      StoreSum<kN>(sum * bin.share, rule.class_channels - i,
                                   to + i);
                    });
                    if (count == nullptr) return;
                    const float samples =
                        static_cast<float>(s.y.samples * s.x.samples);
                    for (int64_t i = 0; i < rule.class_channels; ++i) {
                      count[bin.output + i] = samples;
                    }
                  });
            });
      });
}

// -----------------------------------------------------------------------------

// The elements of a bin's gradient, widened.
template <typename T, typename E>
static inline const E* WideRow(const T* from, int64_t n, E* row) {
  if constexpr (sizeof(T) == sizeof(E)) {
    return from;
  } else {
    WidenRow(from, n, row);
    return row;
  }
}

// Writes the gradient of the displacements.
template <typename T, typename Rule, typename E>
static void DisplacePass(const Rule& rule, const T* inputs, const E* rois,
                         const E* displacements, const T* grad_output,
                         void* workspace, E* grad_displacements,
                         const ParallelFor& parallel_for) {
  char* const scratch = static_cast<char*>(workspace) +
                        PackedBytes<T>(rule, parallel_for.num_workers);
  const int64_t scratch_bytes = RoiScratch<E>::Bytes(rule);
  const int64_t roi_displacements =
      rule.part_h * rule.part_w * rule.classes * 2;
  const BinRange all = AllBins(rule);
  if (rule.num_rois == 0) return;
  ForEachPackedChunk(
      rule, inputs, workspace, parallel_for,
      [&](int64_t first_image, int64_t images, const T* maps) {
        ForEachRoi(
            rule, rois, first_image, images, parallel_for,
            [&](int64_t r, int64_t image, int worker) {
              __builtin_memset(grad_displacements + r * roi_displacements, 0,
                               roi_displacements * sizeof(E));
              if (image < 0) return;
              Arena arena{scratch + worker * scratch_bytes};
              RoiScratch<E> s(rule, &arena);
              const Roi<E> roi = rule.Locate(rois + 5 * r);
              const T* const image_maps = maps + image * rule.Image();
              if (UsesLanes(rule, roi, displacements)) {
                ForEachLaneBin<true>(
                    rule, roi, r, displacements, all, 0, rule.Depth(),
                    [&](const LaneBin<E>& bin, const LaneTaps<E>& y,
                        const LaneTaps<E>& x) {
                      DisplaceLanes<Rule, T>(
                          rule, roi, bin, y, x, image_maps + bin.map,
                          grad_output + bin.output, grad_displacements);
                    });
                return;
              }
              ForEachBin<true>(
                  rule, roi, r, displacements, all, &s, [&](const Bin<E>& bin) {
                    // Without samples no gradient, even where it is infinite.
                    if (s.y.count == 0 || s.x.count == 0) return;
                    const T* map = image_maps + bin.map;
                    const E* gradient = WideRow(grad_output + bin.output,
                                                rule.class_channels, s.row);
                    E along_y = 0, along_x = 0;
                    ForEachVector<E>(rule.class_channels, [&](auto lanes,
                                                              int64_t i) {
                      constexpr int kN = lanes.value;
                      Sum<kN, T> by_y = {}, by_x = {};
                      for (int64_t a = 0; a < s.y.count; ++a) {
                        const T* row = map + s.y.at[a] + i;
                        Sum<kN, T> value = {}, change = {};
                        for (int64_t b = 0; b < s.x.count; ++b) {
                          const Sum<kN, T> pixel = LoadSum<kN>(row + s.x.at[b]);
                          value += s.x.weight[b] * pixel;
                          change += s.x.slope[b] * pixel;
                        }
                        by_y += s.y.slope[a] * value;
                        by_x += s.y.weight[a] * change;
                      }
                      const Vector<E, kN> g = Load<kN>(gradient + i);
                      along_y += SumLanes<E, kN>(by_y * g);
                      along_x += SumLanes<E, kN>(by_x * g);
                    });
                    E* to = grad_displacements + bin.displacement;
                    to[0] += along_y * bin.share *
                             rule.DisplacementSlope(roi.y.size);
                    to[1] += along_x * bin.share *
                             rule.DisplacementSlope(roi.x.size);
                  });
            });
      });
}

// -----------------------------------------------------------------------------

// The gradient needs sums of its own where it is narrow or repacked.
template <typename T>
static bool HasSums(const RoiGeometry& g) {
  return g.Cells() > 1 || sizeof(T) < sizeof(typename AccumulatorOf<T>::Type);
}

template <typename T>
static int64_t SumsBytes(const RoiGeometry& g, int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  if (!HasSums<T>(g)) return 0;
  return RoundUp(ImagesAtOnce(g, sizeof(E), num_workers) * g.Image() *
                     static_cast<int64_t>(sizeof(E)),
                 64);
}

template <typename T>
static int64_t ScatterWorkspace(const RoiGeometry& g, int num_workers) {
  using E = typename AccumulatorOf<T>::Type;
  return SumsBytes<T>(g, num_workers) + num_workers * RoiScratch<E>::Bytes(g);
}

// The bins [first, end) of `pooled` that read group `index` of `groups`.
static inline int64_t FirstBin(int64_t index, int64_t pooled, int64_t groups) {
  return CeilDiv(index * pooled, groups);
}

// Adds what the ROIs of `image` send to channels [begin, end) of one cell.
// `sums` is the image, repacked.
template <typename T, typename Rule, typename E>
static void ScatterTo(const Rule& rule, int64_t image, int64_t cell,
                      int64_t begin, int64_t end, const E* rois,
                      const E* displacements, const T* grad_output,
                      RoiScratch<E>* s, E* sums) {
  const int64_t gh = cell / rule.group_w, gw = cell % rule.group_w;
  const BinRange mine = {FirstBin(gh, rule.pooled_h, rule.group_h),
                         FirstBin(gh + 1, rule.pooled_h, rule.group_h),
                         FirstBin(gw, rule.pooled_w, rule.group_w),
                         FirstBin(gw + 1, rule.pooled_w, rule.group_w),
                         begin / rule.class_channels,
                         CeilDiv(end, rule.class_channels)};
  for (int64_t r = 0; r < rule.num_rois; ++r) {
    if (ImageOf(rule, rois + 5 * r) != image) continue;
    const Roi<E> roi = rule.Locate(rois + 5 * r);
    if (UsesLanes(rule, roi, displacements)) {
      ForEachLaneBin<false>(rule, roi, r, displacements, mine, begin, end,
                            [&](const LaneBin<E>& bin, const LaneTaps<E>& y,
                                const LaneTaps<E>& x) {
                              ScatterLanes<T>(bin, y, x,
                                              grad_output + bin.output,
                                              sums + bin.map);
                            });
      continue;
    }
    ForEachBin<false>(
        rule, roi, r, displacements, mine, s, [&](const Bin<E>& bin) {
          const int64_t channel =
              bin.output % rule.Depth();  // the class' first
          const int64_t from = Max(begin - channel, 0);
          const int64_t count = Min(end - channel, rule.class_channels) - from;
          const E* gradient =
              WideRow(grad_output + bin.output + from, count, s->row);
          for (int64_t a = 0; a < s->y.count; ++a) {
            E* row = sums + bin.map + s->y.at[a] + from;
            for (int64_t b = 0; b < s->x.count; ++b) {
              E* to = row + s->x.at[b];
              const E weight = s->y.weight[a] * s->x.weight[b] * bin.share;
              ForEachVector<E>(count, [&](auto lanes, int64_t i) {
                constexpr int kN = lanes.value;
                Store(Load<kN>(to + i) + weight * Load<kN>(gradient + i),
                      to + i);
              });
            }
          }
        });
  }
}

// Writes the gradient of the inputs.
template <typename T, typename Rule, typename E>
static void ScatterPass(const Rule& rule, const E* rois, const E* displacements,
                        const T* grad_output, void* workspace, T* grad_inputs,
                        const ParallelFor& parallel_for) {
  const int workers = parallel_for.num_workers;
  const bool has_sums = HasSums<T>(rule);
  char* const scratch =
      static_cast<char*>(workspace) + SumsBytes<T>(rule, workers);
  const int64_t scratch_bytes = RoiScratch<E>::Bytes(rule);
  const int64_t image_elements = rule.Image();
  const int64_t step =
      has_sums ? ImagesAtOnce(rule, sizeof(E), workers) : rule.batch;
  const bool serial = rule.num_rois * RoiWork(rule) < kTaskWork;
  for (int64_t first = 0; first < rule.batch; first += step) {
    const int64_t images = Min(step, rule.batch - first);
    T* const target = grad_inputs + first * image_elements;
    E* sums = static_cast<E*>(workspace);
    if constexpr (sizeof(T) == sizeof(E)) {
      if (!has_sums) sums = target;
    }
    Zero(parallel_for, sums,
         images * image_elements * static_cast<int64_t>(sizeof(E)));
    // Blocks of channels, where there are too few cells to keep all busy; not
    // more, as each finds all taps for itself.
    const int64_t owners = images * rule.Cells();
    const int64_t depth = rule.Depth();
    const int64_t wanted = serial ? 1 : CeilDiv(workers, owners);
    const int64_t width = RoundUp(CeilDiv(depth, wanted), kLanes<E>);
    const int64_t blocks = CeilDiv(depth, width);
    RunTasks(serial ? ParallelFor() : parallel_for, owners * blocks,
             [&](int64_t task, int worker) {
               const int64_t begin = task % blocks * width;
               const int64_t cell = task / blocks % rule.Cells();
               const int64_t image = task / blocks / rule.Cells();
               Arena arena{scratch + worker * scratch_bytes};
               RoiScratch<E> s(rule, &arena);
               ScatterTo<T>(rule, first + image, cell, begin,
                            Min(depth, begin + width), rois, displacements,
                            grad_output, &s, sums + image * image_elements);
             });
    if (has_sums) UnpackImages(rule, sums, images, target, parallel_for);
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Pools narrow classes on the CPU, many channels at once.
//
// The file has no include guard: see simd-inl.h.
//
// If few channels share a displacement, the weights of as many channels as a
// vector has lanes are found together, and each lane reads its own pixels.
// Pooling with a displacement for each of 21 channels takes 0.6 times as long
// this way, its gradients half as long. Rules without classes, and rules with
// kMeanOfAll, do not need it.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// AxisWeights of a bin in each lane. All lanes read `count` rows or columns,
// each its own.
template <typename E>
struct LaneWeights {
  static constexpr int kN = kLanes<E>;
  typedef Vector<E, kN> V;
  typedef Vector<int64_t, kN> I;

  int64_t at[kWindow][kN];  // first elements of rows or columns
  V weight[kWindow];        // 0 where a lane does not read
  V slope[kWindow];
  V samples;  // that are not skipped
  int64_t count;

  // Returns whether a window holds all pixels that a bin of `axis` reads, and
  // whether E can hold every pixel's number.
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
    const E phase = static_cast<E>(Rule::kPhase);
    // The place is far from any pixel if the sample does not count, or does not
    // move.
    V place[kWindow], moving[kWindow];
    V first = last, top = {};
    samples = V{};
    for (int64_t i = 0; i < axis.samples; ++i) {
      const V raw = start + Product(static_cast<E>(i) + phase, axis.step);
      const auto counts = (raw >= least) & (raw <= most);
      const V clamped = raw < 0 ? V{} : raw > last ? last : raw;
      samples += counts ? V{} + 1 : V{};
      first = (counts & (clamped < first)) ? clamped : first;
      top = (counts & (clamped > top)) ? clamped : top;
      place[i] = counts ? clamped : none;
      moving[i] = (counts & (raw >= 0) & (raw < last)) ? clamped : none;
    }
    // Sets row (or column) `a` of each lane.
    const auto set = [&](int64_t a, const I& pixel) {
      // A row past the edge has no weight, but is the end of a sample's cell.
      Store((pixel < pixels ? pixel : I{} + (pixels - 1)) * stride, at[a]);
      weight[a] = slope[a] = V{};
    };
    // Adds the weight that sample i, if less than 1 away, has in row `a`.
    const auto add = [&](int64_t a, int64_t i, const V& pixel) {
      const V distance = place[i] - pixel;
      const V hat = 1 - (distance < 0 ? -distance : distance);
      weight[a] += hat > 0 ? hat : V{};
      if constexpr (kSlopes) {
        // The right-hand derivative: the weight at `from` falls, the next
        // weight rises.
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
  int64_t output, map;    // as in Bin, of `channel`
  int64_t displacements;  // the element of class 0's dy
  Vector<E, kLanes<E>> share;
};

// Returns whether the bins of `roi` are worked on by LaneBin.
template <typename Rule, typename E>
static bool UsesLanes(const Rule& rule, const Roi<E>& roi,
                      const E* displacements) {
  return !Rule::kMeanOfAll && displacements != nullptr && rule.classes > 1 &&
         rule.class_channels < kLanes<E> / 2 &&
         LaneWeights<E>::Fit(roi.y, rule.height) &&
         LaneWeights<E>::Fit(roi.x, rule.width);
}

// Calls body(LaneBin, y's weights, x's weights) for channels [begin, end) of
// the bins of `roi` in `range`.
template <bool kSlopes, typename Rule, typename E, typename Body>
static inline __attribute__((always_inline)) void ForEachLaneBin(
    const Rule& rule, const Roi<E>& roi, const E* displacements,
    const BinRange& range, int64_t begin, int64_t end, const Body& body) {
  constexpr int kN = kLanes<E>;
  const int64_t depth = rule.Depth();
  LaneWeights<E> y, x;
  for (int64_t ph = range.ph_begin; ph < range.ph_end; ++ph) {
    for (int64_t pw = range.pw_begin; pw < range.pw_end; ++pw) {
      const BinPlace<E> place(rule, roi, ph, pw);
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
          start_y[lane] = place.y + rule.Displacement(pair[0], roi.y.size);
          start_x[lane] = place.x + rule.Displacement(pair[1], roi.x.size);
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

// Loads a pixel for each lane: element y[lane] + x[lane] + lane.
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

// Returns weight * value, and 0 where the weight is 0: a pixel that a lane does
// not read may be NaN.
template <typename V>
static inline V Weigh(const V& weight, const V& value) {
  return weight != 0 ? weight * value : V{};
}

// Writes the output of a LaneBin and, if not null, its count.
template <typename T, typename E>
static inline void PoolLanes(const LaneBin<E>& bin, const LaneWeights<E>& y,
                             const LaneWeights<E>& x, const T* map, T* to,
                             float* count) {
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
  if (count == nullptr) return;
  for (int lane = 0; lane < bin.lanes; ++lane) {
    count[lane] = static_cast<float>(y.samples[lane] * x.samples[lane]);
  }
}

// Adds to the gradients of the displacements of a LaneBin's classes.
template <typename Rule, typename T, typename E>
static inline void DisplaceLanes(const Rule& rule, const Roi<E>& roi,
                                 const LaneBin<E>& bin, const LaneWeights<E>& y,
                                 const LaneWeights<E>& x, const T* map,
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
static inline void ScatterLanes(const LaneBin<E>& bin, const LaneWeights<E>& y,
                                const LaneWeights<E>& x, const T* gradient,
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

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Finds the places where the taps of a deformable convolution read, for one
// instruction set.
//
// The file has no include guard: see simd-inl.h.
//
// Indices: n image, q pixel of an image's output (row major), r row of a
// bundle's columns = tap * bundle.channels + channel within the bundle. "Group"
// alone is a group of the convolution, not an offset group.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// The largest number of filters whose sums are made together.
constexpr int64_t kFilterBlock = 1024;

// Sizes derived from the parameters, in elements.
struct Geometry : DeformableConv2DParams {
  int64_t taps;             // of the kernel
  int64_t group_channels;   // of one group
  int64_t group_filters;    // of one group
  int64_t offset_channels;  // of one offset group
  int64_t fields;           // offset pairs (or masks) of one output pixel
  int64_t offset_numbers;   // of one output pixel, in the operand `offset`
  int64_t mask_numbers;     // of one output pixel, where masks lie
  int64_t rows;             // of the columns of all channels
  int64_t image;            // elements of one input image
  int64_t pixels;           // of one image's output
  int64_t total_pixels;     // of the batch's output
  bool depthwise;           // a group is one channel

  explicit Geometry(const DeformableConv2DParams& params)
      : DeformableConv2DParams(params),
        taps(kernel_h * kernel_w),
        group_channels(channels / groups),
        group_filters(filters / groups),
        offset_channels(channels / offset_groups),
        fields(offset_groups * taps),
        offset_numbers((IsModulated() ? 3 : 2) * fields),
        mask_numbers(IsModulated() ? offset_numbers : fields),
        rows(taps * channels),
        image(height * width * channels),
        pixels(out_h * out_w),
        total_pixels(batch * pixels),
        depthwise(groups > 1 && group_channels == 1) {}

  // Returns whether masks lie in the operand `offset`.
  bool IsModulated() const { return modulation > Modulation::kNone; }

  // Groups are bundled, so that their channels are sampled in one go.
  int64_t BundleGroups() const {
    const int64_t most = Max(1, kFilterBlock / group_filters);
    return CeilDiv(groups, CeilDiv(groups, most));
  }
  int64_t Bundles() const { return CeilDiv(groups, BundleGroups()); }
};

// Consecutive groups: their channels, filters, and rows of columns.
struct Bundle {
  int64_t group, channel, channels, filter, filters, rows;

  Bundle(const Geometry& g, int64_t index) : group(index * g.BundleGroups()) {
    const int64_t groups = Min(g.BundleGroups(), g.groups - group);
    channel = group * g.group_channels;
    channels = groups * g.group_channels;
    filter = group * g.group_filters;
    filters = groups * g.group_filters;
    rows = g.taps * channels;
  }
};

// The division of a bundle's rows into blocks: at most `limit` rows, of nearly
// equal number; where there are groups, whole groups or a part of one.
struct Blocks {
  int64_t limit;

  // `multiple` divides `most`.
  Blocks(const Geometry& g, int64_t most, int64_t multiple) : limit(most) {
    const int64_t rows = g.groups == 1 ? g.rows : g.group_channels;
    if (g.groups > 1 && rows <= most) {
      limit = most / rows * rows;
    } else {
      limit = RoundUp(CeilDiv(rows, CeilDiv(rows, most)), multiple);
    }
  }

  // Returns the end of the block that starts at `begin`.
  int64_t End(const Geometry& g, const Bundle& bundle, int64_t begin) const {
    int64_t end = Min(begin + limit, bundle.rows);
    if (g.groups > 1 && g.group_channels > limit) {
      end = Min(end, (begin / g.group_channels + 1) * g.group_channels);
    }
    return end;
  }
};

// Rows of a block that one product takes, because the same part of the kernel
// multiplies them: all rows of the block, or the channels of one group at one
// tap.
struct Piece {
  int64_t row, count;  // rows [row, row + count) of the bundle
  int64_t group;
  int64_t kernel_row;   // of the first row: tap, channel within the group
  int64_t kernel_part;  // tap * groups + group, or 0
  int64_t part_row;     // the first row, within the part
};

// Calls step(piece) for rows [begin, end) of `bundle`, in order.
template <typename Step>
static inline __attribute__((always_inline)) void ForEachPiece(
    const Geometry& g, const Bundle& bundle, int64_t begin, int64_t end,
    const Step& step) {
  if (g.groups == 1) {
    step(Piece{begin, end - begin, 0, begin, 0, begin});
    return;
  }
  for (int64_t row = begin, count; row < end; row += count) {
    const int64_t tap = row / bundle.channels;
    const int64_t channel = bundle.channel + row % bundle.channels;
    const int64_t group = channel / g.group_channels;
    const int64_t in_group = channel % g.group_channels;
    count = Min(end - row, g.group_channels - in_group);
    step(Piece{row, count, group, tap * g.group_channels + in_group,
               tap * g.groups + group, in_group});
  }
}

// Rows of a bundle that share a tap and an offset group, and so are sampled at
// the same places.
struct Run {
  int64_t row, count;  // rows [row, row + count) of the bundle
  int64_t channel;     // of the first row, in the image
  int64_t tap;
  int64_t field;         // offset_group * taps + tap
  int64_t tap_y, tap_x;  // distance from tap (0, 0), input pixels
};

// Writes the runs of rows [begin, end) of `bundle`, in order, and returns their
// number.
static int64_t FindRuns(const Geometry& g, const Bundle& bundle, int64_t begin,
                        int64_t end, Run* to) {
  int64_t runs = 0;
  for (int64_t row = begin, count; row < end; row += count, ++runs) {
    const int64_t tap = row / bundle.channels;
    const int64_t in_bundle = row % bundle.channels;
    const int64_t channel = bundle.channel + in_bundle;
    const int64_t offset_group = channel / g.offset_channels;
    count =
        Min(end - row, Min(bundle.channels - in_bundle,
                           g.offset_channels - channel % g.offset_channels));
    to[runs] = {row,
                count,
                channel,
                tap,
                offset_group * g.taps + tap,
                tap / g.kernel_w * g.dilation_h,
                tap % g.kernel_w * g.dilation_w};
  }
  return runs;
}

// Returns the last row up to `row` where a run may be cut: a whole number of
// vectors from the run's start. Compilers contract sums of products differently
// for vectors of different widths, so a channel must be computed in the same
// width wherever a number of workers puts the cuts.
template <typename E>
static int64_t CutRow(const Geometry& g, const Bundle& bundle, int64_t row) {
  const int64_t in_bundle = row % bundle.channels;
  const int64_t in_offset_group =
      (bundle.channel + in_bundle) % g.offset_channels;
  return row - Min(in_bundle, in_offset_group) % kLanes<E>;
}

// The output pixels of a tile, one for each of its rows. Arrays have room for a
// multiple of kLanes<E>.
template <typename E>
struct Pixels {
  int64_t first;   // of the batch's output
  int64_t count;   // in the tile
  E *y, *x;        // input coordinates of tap (0, 0) at zero offset
  int64_t* image;  // element of `inputs` where the pixel's image begins

  Pixels(int64_t most, Arena* arena)
      : first(0),
        count(0),
        y(arena->Take<E>(RoundUp(most, kLanes<E>))),
        x(arena->Take<E>(RoundUp(most, kLanes<E>))),
        image(arena->Take<int64_t>(most)) {}

  // Makes this the `count` pixels from `first` on.
  void Locate(const Geometry& g, int64_t first, int64_t count) {
    this->first = first;
    this->count = count;
    int64_t n = first / g.pixels, row = first % g.pixels / g.out_w,
            column = first % g.pixels % g.out_w;
    for (int64_t p = 0; p < count; ++p) {
      y[p] = static_cast<E>(row * g.stride_h - g.pad_top);
      x[p] = static_cast<E>(column * g.stride_w - g.pad_left);
      image[p] = n * g.image;
      if (++column < g.out_w) continue;
      column = 0;
      if (++row < g.out_h) continue;
      row = 0;
      ++n;
    }
    for (int64_t p = count; p % kLanes<E> != 0; ++p) y[p] = x[p] = 0;
  }
};

// The positions along one axis where samples count, in the coordinate type.
template <typename E>
struct AxisRange {
  E above, below;  // positions between the two, both excluded
  int32_t last;    // the last pixel
  bool clamp;

  AxisRange(Boundary boundary, int64_t size)
      : above(E(-1)),
        below(static_cast<E>(size)),
        last(static_cast<int32_t>(size - 1)),
        clamp(boundary == Boundary::kClamp) {
    // Positions from 0 on, 0 included: those above the largest number below 0.
    if (clamp) above = -LeastPositive(E());
  }

 private:
  static float LeastPositive(float) { return __FLT_DENORM_MIN__; }
  static double LeastPositive(double) { return __DBL_DENORM_MIN__; }
};

// Returns 1 / n!.
template <typename E>
static constexpr E Inverse(int n) {
  E product = 1;
  for (; n > 1; --n) product *= n;
  return 1 / product;
}

// Returns the sum of x^i / i! over the indices.
template <typename V, int... kIndex>
static inline __attribute__((always_inline)) V
Taylor(const V& x, std::integer_sequence<int, kIndex...>) {
  using E = std::decay_t<decltype(x[0])>;
  constexpr int kLast = sizeof...(kIndex) - 1;
  V sum = {};
  ((sum = sum * x + Inverse<E>(kLast - kIndex)), ...);
  return sum;
}

// Returns 1 / (1 + exp(-m)), exactly 1/2 for 0, to about the last bit.
template <typename V>
static inline V Sigmoid(const V& m) {
  using E = std::decay_t<decltype(m[0])>;
  constexpr bool kFloat = sizeof(E) == 4;
  constexpr int kN = sizeof(V) / sizeof(E);
  // exp(x) = 2^k * exp(x - k * log(2)), where Taylor's series ends after 8 or
  // 14 terms. Beyond +-kMost the result is as good as 0 or 1.
  constexpr E kMost = kFloat ? 87 : 708;
  constexpr auto kTerms = std::make_integer_sequence<int, kFloat ? 8 : 14>();
  constexpr E kHigh = kFloat ? E(0.693359375) : E(6.93145751953125e-1);
  constexpr E kLow = kFloat ? E(-2.12194440e-4) : E(1.42860682030941723e-6);
  V x = m == m ? -m : V{};
  x = x > kMost ? V{} + kMost : x;
  x = x < -kMost ? V{} - kMost : x;
  const auto k = __builtin_convertvector(
      x * E(1.44269504088896341) + (x < 0 ? V{} - E(0.5) : V{} + E(0.5)),
      Vector<int32_t, kN>);
  const V whole = __builtin_convertvector(k, V);
  x = (x - whole * kHigh) - whole * kLow;
  using I = decltype(m == m);
  const I power = (__builtin_convertvector(k, I) + (kFloat ? 127 : 1023))
                  << (kFloat ? 23 : 52);
  const V result = 1 / (1 + Taylor(x, kTerms) * BitCast<V>(power));
  return m == m ? result : m;
}

// Returns whether one of n numbers is NaN.
template <typename E>
static bool AnyNaN(const E* numbers, int64_t n) {
  constexpr int kN = kLanes<E>;
  decltype(Vector<E, kN>() != Vector<E, kN>()) found = {};
  int64_t i = 0;
  for (; i + kN <= n; i += kN) {
    const Vector<E, kN> some = Load<kN>(numbers + i);
    found |= some != some;
  }
  bool any = false;
  for (; i < n; ++i) any |= numbers[i] != numbers[i];
  for (int lane = 0; lane < kN; ++lane) any |= found[lane] != 0;
  return any;
}

// The state that all samples of a call share.
template <typename E>
struct Sampling {
  AxisRange<E> y, x;
  int64_t row, pixel;  // elements from one row, one pixel to the next
  int64_t offset_numbers, mask_numbers;  // as in Geometry
  bool modulated;
  E most;           // the largest mask, if modulated
  const E* offset;  // [output pixel][offset_numbers]
  const E* mask;    // [output pixel][mask_numbers]; null: all ones

  Sampling(const Geometry& g, const E* offset, const E* mask)
      : y(g.boundary, g.height),
        x(g.boundary, g.width),
        row(g.width * g.channels),
        pixel(g.channels),
        offset_numbers(g.offset_numbers),
        mask_numbers(g.mask_numbers),
        modulated(g.IsModulated()),
        most(g.modulation == Modulation::kTwoSigmoid ? 2 : 1),
        offset(offset),
        mask(modulated ? offset + 2 * g.fields : mask) {}

  // Returns the derivative of a mask by the number that gave it.
  E Slope(E mask) const { return modulated ? mask * (1 - mask / most) : 1; }
};

// Corners of a sample that lie inside the image, and axes along which the edge
// is held (no derivative there). No flag at all: the sample lies outside and
// counts 0.
constexpr int32_t kTopLeft = 1;
constexpr int32_t kTopRight = 2;
constexpr int32_t kBottomLeft = 4;
constexpr int32_t kBottomRight = 8;
constexpr int32_t kInside = 15;  // all four
constexpr int32_t kHeldY = 16;
constexpr int32_t kHeldX = 32;

// Bilinear weights of the four corners of a sample.
template <typename E>
struct Weights {
  E top_left, top_right, bottom_left, bottom_right;
};

// The samples of one run at kLanes pixels of a tile: places and weights, which
// all channels of the run share. Vectors hold a pixel in each lane.
template <typename E>
struct Samples {
  static constexpr int kN = kLanes<E>;

  int32_t flags[kN];
  int32_t top[kN], left[kN];  // pixel of the top left corner
  E ly[kN], lx[kN];           // distance from there, in [0, 1)
  E mask[kN];
  E top_left[kN], top_right[kN], bottom_left[kN], bottom_right[kN];  // weights

  // Finds the samples at pixels [p, p + kN) of the tile, as far as these exist.
  void Locate(const Sampling<E>& in, const Pixels<E>& pixels, int64_t p,
              const Run& run) {
    using V = Vector<E, kN>;
    using I = Vector<int32_t, kN>;
    const int64_t count = Min(kN, pixels.count - p);
    const E* const from =
        in.offset + (pixels.first + p) * in.offset_numbers + 2 * run.field;
    E dy[kN] = {}, dx[kN] = {};
    for (int64_t l = 0; l < count; ++l) {
      dy[l] = from[l * in.offset_numbers];
      dx[l] = from[l * in.offset_numbers + 1];
    }
    const int64_t field = (pixels.first + p) * in.mask_numbers + run.field;
    for (int64_t l = 0; l < count; ++l) {
      mask[l] =
          in.mask == nullptr ? E(1) : in.mask[field + l * in.mask_numbers];
    }
    if (in.modulated) Store(in.most * Sigmoid(Load<kN>(mask)), mask);
    V y = (Load<kN>(pixels.y + p) + static_cast<E>(run.tap_y)) + Load<kN>(dy);
    V x = (Load<kN>(pixels.x + p) + static_cast<E>(run.tap_x)) + Load<kN>(dx);
    // Written so that NaN lies outside. Samples outside are moved to pixel
    // (0, 0), because converting numbers that are too large is undefined.
    using M = decltype(V() > V());
    const M counts = (y > in.y.above) & (y < in.y.below) & (x > in.x.above) &
                     (x < in.x.below);
    y = BitCast<V>(BitCast<M>(y) & counts);
    x = BitCast<V>(BitCast<M>(x) & counts);
    const I inside = __builtin_convertvector(counts, I);
    I held_y = {}, held_x = {};
    const I i = Split(in.y, y, &held_y), j = Split(in.x, x, &held_x);
    const V hy = 1 - y, hx = 1 - x;
    Store(i, top);
    Store(j, left);
    Store(y, ly);
    Store(x, lx);
    Store(hy * hx, top_left);
    Store(hy * x, top_right);
    Store(y * hx, bottom_left);
    Store(y * x, bottom_right);
    // The corner of a sample inside is at most the last pixel, and the corner's
    // neighbour at least the first.
    const I has_top = i >= 0, has_bottom = i < in.y.last;
    const I has_left = j >= 0, has_right = j < in.x.last;
    I found = (has_top & has_left & kTopLeft) |
              (has_top & has_right & kTopRight) |
              (has_bottom & has_left & kBottomLeft) |
              (has_bottom & has_right & kBottomRight);
    // An image without pixels has no corner to hold.
    const I some = inside & (found != 0);
    Store(some & (found | (held_y & kHeldY) | (held_x & kHeldX)), flags);
  }

  Weights<E> WeightsAt(int64_t lane) const {
    return {top_left[lane], top_right[lane], bottom_left[lane],
            bottom_right[lane]};
  }

  // Returns the element of the top left corner, channel 0, in its image.
  int64_t Corner(const Sampling<E>& in, int64_t lane) const {
    return top[lane] * in.row + left[lane] * in.pixel;
  }

 private:
  // Returns the pixel at or before each position, and leaves the distance from
  // it in `position`.
  static Vector<int32_t, kN> Split(const AxisRange<E>& axis,
                                   Vector<E, kN>& position,
                                   Vector<int32_t, kN>* held) {
    using V = Vector<E, kN>;
    using I = Vector<int32_t, kN>;
    // Sizes are below 2^31, so positions inside fit.
    I pixel = __builtin_convertvector(position, I);
    pixel += __builtin_convertvector(
        position < __builtin_convertvector(pixel, V), I);
    position -= __builtin_convertvector(pixel, V);
    if (axis.clamp) {
      const auto at_edge = pixel >= axis.last;
      *held = at_edge;
      using M = decltype(V() > V());
      const M wide = __builtin_convertvector(at_edge, M);
      position = BitCast<V>(BitCast<M>(position) & ~wide);
    }
    return pixel;
  }
};

// The corners of a sample from one channel on; a corner outside the image reads
// zeros.
template <typename T>
struct Corners {
  const T *top_left, *top_right, *bottom_left, *bottom_right;

  // `corner` is the top left one.
  template <typename E>
  Corners(const Sampling<E>& in, const T* corner, int32_t flags,
          const T* zeros) {
    top_left = corner;
    top_right = top_left + in.pixel;
    bottom_left = top_left + in.row;
    bottom_right = bottom_left + in.pixel;
    if ((flags & kInside) == kInside) return;
    if (!(flags & kTopLeft)) top_left = zeros;
    if (!(flags & kTopRight)) top_right = zeros;
    if (!(flags & kBottomLeft)) bottom_left = zeros;
    if (!(flags & kBottomRight)) bottom_right = zeros;
  }
};

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

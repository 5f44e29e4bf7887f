// Where the taps of a deformable convolution read, for one instruction set.
// SPDX-License-Identifier: Apache-2.0
//
// No include guard: see simd_cpu-inl.h.
//
// Indices: n image, q pixel of an image's output (row major), r row of one
// group's kernel = tap * group_channels + channel within the group. "Group"
// alone is a group of the convolution, not an offset group.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Sizes derived from the parameters, in elements.
struct Geometry : DeformableConv2DParams {
  int64_t taps;             // of the kernel
  int64_t group_channels;   // of one group
  int64_t group_filters;    // of one group
  int64_t offset_channels;  // of one offset group
  int64_t rows;             // of one group's kernel
  int64_t image;            // elements of one input image
  int64_t pixels;           // of one image's output
  int64_t total_pixels;     // of the batch's output

  explicit Geometry(const DeformableConv2DParams& params)
      : DeformableConv2DParams(params),
        taps(kernel_h * kernel_w),
        group_channels(channels / groups),
        group_filters(filters / groups),
        offset_channels(channels / offset_groups),
        rows(taps * group_channels),
        image(height * width * channels),
        pixels(out_h * out_w),
        total_pixels(batch * pixels) {}
};

// Rows of a group's kernel that share a tap and an offset group, and so their
// samples' places.
struct Run {
  int64_t row, count;    // rows [row, row + count) of the group's kernel
  int64_t channel;       // of the first of them, in the image
  int64_t field;         // offset_group * taps + tap
  int64_t tap_y, tap_x;  // distance from tap (0, 0), input pixels
};

// Writes the runs of rows [begin, end) of `group`, in order, and returns their
// number; with null only counts.
static int64_t FindRuns(const Geometry& g, int64_t group, int64_t begin,
                        int64_t end, Run* to) {
  int64_t runs = 0;
  for (int64_t row = begin, count; row < end; row += count, ++runs) {
    const int64_t tap = row / g.group_channels;
    const int64_t in_group = row % g.group_channels;
    const int64_t channel = group * g.group_channels + in_group;
    const int64_t offset_group = channel / g.offset_channels;
    count =
        Min(end - row, Min(g.group_channels - in_group,
                           g.offset_channels - channel % g.offset_channels));
    if (to == nullptr) continue;
    to[runs] = {row,
                count,
                channel,
                offset_group * g.taps + tap,
                tap / g.kernel_w * g.dilation_h,
                tap % g.kernel_w * g.dilation_w};
  }
  return runs;
}

// The output pixel that a row of a tile stands for.
struct Pixel {
  int64_t n;
  int64_t fields;  // index of its first offset pair (or mask) in the batch
  int64_t y, x;    // input coordinates of tap (0, 0) at zero offset
};

// Writes `count` pixels of the batch's output, from `first` on.
static void LocatePixels(const Geometry& g, int64_t first, int64_t count,
                         Pixel* to) {
  int64_t n = first / g.pixels, q = first % g.pixels;
  for (int64_t row = 0; row < count; ++row) {
    to[row] = {n, (first + row) * g.offset_groups * g.taps,
               q / g.out_w * g.stride_h - g.pad_top,
               q % g.out_w * g.stride_w - g.pad_left};
    if (++q == g.pixels) ++n, q = 0;
  }
}

// Where one tap of one output pixel reads, for all channels of an offset group.
template <typename E>
struct Sample {
  // Corners inside the image, and axes along which the edge is held (no
  // derivative there). No flag at all: the sample lies outside and counts 0.
  enum : uint32_t {
    kTopLeft = 1,
    kTopRight = 2,
    kBottomLeft = 4,
    kBottomRight = 8,
    kInside = 15,  // all four
    kHeldY = 16,
    kHeldX = 32
  };

  int64_t corner;  // element of the top left corner, channel 0, in its image
  int32_t top;     // its row
  uint32_t flags;
  E ly, lx;  // distance from the top left corner, in [0, 1)
  E mask;
};

// Where along one axis samples count, in the coordinate type.
template <typename E>
struct AxisRange {
  E above, below;  // positions between the two, both excluded
  int64_t last;    // the last pixel
  bool clamp;

  AxisRange(Boundary boundary, int64_t size)
      : above(E(-1)),
        below(static_cast<E>(size)),
        last(size - 1),
        clamp(boundary == Boundary::kClamp) {
    // From 0 on, 0 included: above the largest number below it.
    if (clamp) above = -LeastPositive(E());
  }

 private:
  static float LeastPositive(float) { return __FLT_DENORM_MIN__; }
  static double LeastPositive(double) { return __DBL_DENORM_MIN__; }
};

// What all samples of a call have in common.
template <typename E>
struct Sampling {
  AxisRange<E> y, x;
  int64_t row, pixel;  // elements from one row, one pixel to the next
  const E* offset;
  const E* mask;

  Sampling(const Geometry& g, const E* offset, const E* mask)
      : y(g.boundary, g.height),
        x(g.boundary, g.width),
        row(g.width * g.channels),
        pixel(g.channels),
        offset(offset),
        mask(mask) {}
};

template <typename E>
static inline Sample<E> Locate(const Sampling<E>& in, const Pixel& pixel,
                               const Run& run) {
  using S = Sample<E>;
  const int64_t field = pixel.fields + run.field;
  const E y = static_cast<E>(pixel.y + run.tap_y) + in.offset[2 * field];
  const E x = static_cast<E>(pixel.x + run.tap_x) + in.offset[2 * field + 1];
  S sample;
  sample.flags = 0;
  // Written so that NaN lies outside.
  if (!(y > in.y.above && y < in.y.below && x > in.x.above && x < in.x.below)) {
    return sample;
  }
  // Sizes are below 2^31, so positions inside fit in an int.
  int64_t top = static_cast<int>(y), left = static_cast<int>(x);
  top -= y < static_cast<E>(static_cast<int>(y));
  left -= x < static_cast<E>(static_cast<int>(x));
  sample.ly = y - static_cast<E>(static_cast<int>(top));
  sample.lx = x - static_cast<E>(static_cast<int>(left));
  sample.mask = in.mask == nullptr ? E(1) : in.mask[field];
  if (top >= 0 && top < in.y.last && left >= 0 && left < in.x.last) {
    sample.flags = S::kInside;
  } else {
    if (in.y.clamp && top >= in.y.last) {
      top = in.y.last;
      sample.ly = 0;
      sample.flags |= S::kHeldY;
    }
    if (in.x.clamp && left >= in.x.last) {
      left = in.x.last;
      sample.lx = 0;
      sample.flags |= S::kHeldX;
    }
    const bool has_top = top >= 0 && top <= in.y.last;
    const bool has_left = left >= 0 && left <= in.x.last;
    const bool has_bottom = top < in.y.last, has_right = left < in.x.last;
    if (has_top && has_left) sample.flags |= S::kTopLeft;
    if (has_top && has_right) sample.flags |= S::kTopRight;
    if (has_bottom && has_left) sample.flags |= S::kBottomLeft;
    if (has_bottom && has_right) sample.flags |= S::kBottomRight;
    // An image without pixels has no corner to hold.
    if (!(sample.flags & S::kInside)) sample.flags = 0;
  }
  sample.corner = top * in.row + left * in.pixel;
  sample.top = static_cast<int32_t>(top);
  return sample;
}

// The corners of a sample from `channel` on; a corner outside the image reads
// zeros.
template <typename T>
struct Corners {
  const T *top_left, *top_right, *bottom_left, *bottom_right;

  template <typename E>
  Corners(const Sampling<E>& in, const Sample<E>& sample, const T* image,
          int64_t channel, const T* zeros) {
    using S = Sample<E>;
    top_left = image + sample.corner + channel;
    top_right = top_left + in.pixel;
    bottom_left = top_left + in.row;
    bottom_right = bottom_left + in.pixel;
    if ((sample.flags & S::kInside) == S::kInside) return;
    if (!(sample.flags & S::kTopLeft)) top_left = zeros;
    if (!(sample.flags & S::kTopRight)) top_right = zeros;
    if (!(sample.flags & S::kBottomLeft)) bottom_left = zeros;
    if (!(sample.flags & S::kBottomRight)) bottom_right = zeros;
  }
};

// Bilinear weights of the four corners of a sample.
template <typename E>
struct Weights {
  E top_left, top_right, bottom_left, bottom_right;

  explicit Weights(const Sample<E>& s)
      : top_left((1 - s.ly) * (1 - s.lx)),
        top_right((1 - s.ly) * s.lx),
        bottom_left(s.ly * (1 - s.lx)),
        bottom_right(s.ly * s.lx) {}

  // The sample of kN channels from i on.
  template <int kN, typename T>
  Vector<E, kN> Mix(const Corners<T>& from, int64_t i) const {
    return top_left * Load<kN>(from.top_left + i) +
           top_right * Load<kN>(from.top_right + i) +
           bottom_left * Load<kN>(from.bottom_left + i) +
           bottom_right * Load<kN>(from.bottom_right + i);
  }
};

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

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
    kHeldY = 16,
    kHeldX = 32
  };

  int64_t corner;  // element of the top left corner, channel 0, in its image
  uint32_t flags;
  E ly, lx;  // distance from the top left corner, in [0, 1)
  E mask;
};

// One axis of a sample.
template <typename E>
struct Axis {
  int64_t low = 0;  // the pixel at or before the sample
  E fraction = 0;   // distance from it, in [0, 1)
  bool inside = false, has_low = false, has_high = false, held = false;

  // Comparisons are written so that NaN lies outside.
  Axis(Boundary boundary, E position, int64_t size) {
    const E limit = static_cast<E>(size);
    const bool zeros = boundary == Boundary::kZeros;
    if (!(position < limit) || !(zeros ? position > E(-1) : position >= E(0))) {
      return;
    }
    inside = true;
    low = static_cast<int64_t>(position);
    low -= position < static_cast<E>(low);
    fraction = position - static_cast<E>(low);
    if (!zeros && low >= size - 1) {
      low = size - 1;
      fraction = 0;
      held = true;
    }
    has_low = low >= 0 && low < size;  // `limit` may have been rounded up
    has_high = low + 1 < size;
  }
};

template <typename E>
static inline Sample<E> Locate(const Geometry& g, const Pixel& pixel,
                               const Run& run, const E* offset, const E* mask) {
  using S = Sample<E>;
  const int64_t field = pixel.fields + run.field;
  const Axis<E> y(g.boundary,
                  static_cast<E>(pixel.y + run.tap_y) + offset[2 * field],
                  g.height);
  const Axis<E> x(g.boundary,
                  static_cast<E>(pixel.x + run.tap_x) + offset[2 * field + 1],
                  g.width);
  S sample;
  sample.flags = 0;
  if (!y.inside || !x.inside) return sample;
  sample.corner = (y.low * g.width + x.low) * g.channels;
  sample.flags = (y.has_low && x.has_low ? S::kTopLeft : 0u) |
                 (y.has_low && x.has_high ? S::kTopRight : 0u) |
                 (y.has_high && x.has_low ? S::kBottomLeft : 0u) |
                 (y.has_high && x.has_high ? S::kBottomRight : 0u);
  if (sample.flags == 0) return sample;  // an image without pixels
  sample.flags |= (y.held ? S::kHeldY : 0u) | (x.held ? S::kHeldX : 0u);
  sample.ly = y.fraction;
  sample.lx = x.fraction;
  sample.mask = mask == nullptr ? E(1) : mask[field];
  return sample;
}

// The corners of a sample from `channel` on; a corner outside the image reads
// zeros.
template <typename T, typename E>
struct Corners {
  const T *top_left, *top_right, *bottom_left, *bottom_right;

  Corners(const Geometry& g, const Sample<E>& sample, const T* image,
          int64_t channel, const T* zeros) {
    using S = Sample<E>;
    const T* first = image + sample.corner + channel;
    const int64_t row = g.width * g.channels;
    top_left = sample.flags & S::kTopLeft ? first : zeros;
    top_right = sample.flags & S::kTopRight ? first + g.channels : zeros;
    bottom_left = sample.flags & S::kBottomLeft ? first + row : zeros;
    bottom_right =
        sample.flags & S::kBottomRight ? first + row + g.channels : zeros;
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
  Vector<E, kN> Mix(const Corners<T, E>& from, int64_t i) const {
    return top_left * Load<kN>(from.top_left + i) +
           top_right * Load<kN>(from.top_right + i) +
           bottom_left * Load<kN>(from.bottom_left + i) +
           bottom_right * Load<kN>(from.bottom_right + i);
  }
};

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

// Vectors of any width, conversions of 16-bit types, and the matrix product of a tile.
// SPDX-License-Identifier: Apache-2.0
//
// No include guard: *_cpu.cc includes this file once per instruction set, each time in another namespace
// TF_DEFORM_ISA with another TF_DEFORM_VECTOR_BYTES. Nothing here may call a function or template of the standard
// library: the linker would keep one copy of it for all instruction sets.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

static inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// Sums, coordinates and columns of a tensor of T are in this type.
template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};

template <typename E, int kLanes>
struct VectorOf {
  typedef E Type __attribute__((vector_size(kLanes * sizeof(E))));
};
template <typename E, int kLanes>
using Vector = typename VectorOf<E, kLanes>::Type;

// Lanes of the widest vector of E.
template <typename E>
constexpr int kLanes = TF_DEFORM_VECTOR_BYTES / static_cast<int>(sizeof(E));

template <typename To, typename From>
static inline To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <int kN, typename E>
static inline Vector<E, kN> LoadSame(const E* from) {
  Vector<E, kN> vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <int kN>
static inline Vector<uint32_t, kN> LoadBits(const uint16_t* from) {
  return __builtin_convertvector(LoadSame<kN>(from), Vector<uint32_t, kN>);
}

// kN consecutive elements, widened. Pointers need no alignment beyond the element's.
template <int kN>
static inline Vector<float, kN> Load(const float* from) {
  return LoadSame<kN>(from);
}

template <int kN>
static inline Vector<double, kN> Load(const double* from) {
  return LoadSame<kN>(from);
}

template <int kN>
static inline Vector<float, kN> Load(const BFloat16* from) {
  return BitCast<Vector<float, kN>>(LoadBits<kN>(&from->bits) << 16);
}

template <int kN>
static inline Vector<float, kN> Load(const Float16* from) {
  const Vector<uint32_t, kN> bits = LoadBits<kN>(&from->bits);
  const Vector<uint32_t, kN> magnitude = (bits & 0x7fffu) << 13;
  // Exponent bias 15 to 127. Subnormals come out exact because tasks run with denormals on.
  const Vector<uint32_t, kN> finite = BitCast<Vector<uint32_t, kN>>(BitCast<Vector<float, kN>>(magnitude) * 0x1p112f);
  const Vector<uint32_t, kN> special = BitCast<Vector<uint32_t, kN>>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return BitCast<Vector<float, kN>>(finite | special | ((bits & 0x8000u) << 16));
}

template <typename V, typename E>
static inline void Store(const V& vector, E* to) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// Rounds to nearest, ties to even.
static inline void Narrow(float value, BFloat16* to) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40u);
}

static inline void Narrow(float value, Float16* to) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // From 65520 on the nearest half is infinity; below 2^-14 it is subnormal, and adding 0.5 rounds at its last bit.
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t subnormal = BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t rounded = magnitude >= 0x477ff000u ? overflow : magnitude < 0x38800000u ? subnormal : normal;
  to->bits = static_cast<uint16_t>(sign | rounded);
}

static inline void Narrow(float value, float* to) { *to = value; }
static inline void Narrow(double value, double* to) { *to = value; }

// Calls step(std::integral_constant<int, lanes>, first) for vectors that cover [0, n): the widest first, then ever
// narrower ones. Always inlined, as a lambda's code must be compiled for this instruction set.
template <typename E, int kN = kLanes<E>, typename Step>
static inline __attribute__((always_inline)) void ForEachVector(int64_t n, const Step& step, int64_t first = 0) {
  if constexpr (kN == kLanes<E>) {
    for (; first + kN <= n; first += kN) step(std::integral_constant<int, kN>(), first);
  } else if (first + kN <= n) {
    step(std::integral_constant<int, kN>(), first);
    first += kN;
  }
  if constexpr (kN > 1) ForEachVector<E, kN / 2>(n, step, first);
}

// n elements of T, widened to E.
template <typename T, typename E>
static inline void WidenRow(const T* from, int64_t n, E* to) {
  ForEachVector<E>(n, [&](auto lanes, int64_t i) { Store(Load<lanes.value>(from + i), to + i); });
}

template <typename T, typename E>
static inline void NarrowRow(const E* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) Narrow(from[i], to + i);
}

// ---------------------------------------------------------------------------------------------------------------------
// The matrix product of a tile: C (m x n) = or += A (m x k) B (k x n).
//
// B is packed in panels of kPanel columns (two vectors): panel after panel, each k rows of kPanel elements, zeros past n.
// A last panel of at most one vector of columns is one vector wide. A and C are not packed. A lives in a scratch tile of
// row stride kTileStride, or of that column stride if kTransposed, so that its addresses are constants. The microkernel
// keeps kMicroRows x kPanel sums in registers over all of k.

#if TF_DEFORM_VECTOR_BYTES == 64
constexpr int kMicroRows = 14;  // 28 sums, 2 vectors of B, 1 broadcast of 32 registers
#else
constexpr int kMicroRows = 6;  // 12 sums, 2 vectors of B, 1 broadcast of 16 registers
#endif

template <typename E>
constexpr int kPanel = 2 * kLanes<E>;

// Inner dimension of one product: A's micro rows and B's panel stay in the first-level cache. It fixes the order of sums.
constexpr int64_t kInner = 256;
constexpr int64_t kTileStride = kInner + 16;  // not a power of two, which would map all rows to few cache sets

template <typename E>
static inline int64_t PackedColumns(int64_t n) {
  return RoundUp(n, kLanes<E>);
}

template <typename E, bool kTransposed, int kRows, int kVectors>
static void MicroKernel(int64_t k, const E* a, const E* b, E* c, int64_t c_stride, int64_t columns, bool accumulate) {
  constexpr int kN = kLanes<E>;
  constexpr int64_t kRowStride = kTransposed ? 1 : kTileStride;
  constexpr int64_t kStep = kTransposed ? kTileStride : 1;
  Vector<E, kN> sums[kRows][kVectors] = {};
  for (; k > 0; --k, a += kStep, b += kVectors * kN) {
    Vector<E, kN> row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = Load<kN>(b + v * kN);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const E element = a[i * kRowStride];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[i][v] += element * row[v];
    }
  }
  if (columns == kVectors * kN) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        E* to = c + i * c_stride + v * kN;
        Store(accumulate ? Load<kN>(to) + sums[i][v] : sums[i][v], to);
      }
    }
    return;
  }
  for (int i = 0; i < kRows; ++i) {
    E edge[kVectors * kN];
    __builtin_memcpy(edge, sums[i], sizeof(edge));
    E* to = c + i * c_stride;
    for (int64_t j = 0; j < columns; ++j) to[j] = accumulate ? to[j] + edge[j] : edge[j];
  }
}

template <typename E>
using MicroKernelFunction = void (*)(int64_t, const E*, const E*, E*, int64_t, int64_t, bool);

// The microkernel for `rows` in [1, kMicroRows].
template <typename E, bool kTransposed, int kVectors, int kRows = kMicroRows>
static inline MicroKernelFunction<E> FindMicroKernel(int64_t rows) {
  if constexpr (kRows == 1) {
    return MicroKernel<E, kTransposed, 1, kVectors>;
  } else {
    if (rows == kRows) return MicroKernel<E, kTransposed, kRows, kVectors>;
    return FindMicroKernel<E, kTransposed, kVectors, kRows - 1>(rows);
  }
}

template <bool kTransposed, typename E>
static void MatrixProduct(int64_t m, int64_t n, int64_t k, const E* a, const E* packed_b, E* c, int64_t c_stride,
                          bool accumulate) {
  const int64_t pieces = CeilDiv(m, kMicroRows);  // of nearly equal rows: a short last one would run at a fraction
  for (int64_t column = 0; column < n; column += kPanel<E>) {
    const int64_t columns = Min(kPanel<E>, n - column);
    const E* b = packed_b + column * k;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = m * piece / pieces;
      const int64_t rows = m * (piece + 1) / pieces - first;
      const auto kernel = columns > kLanes<E> ? FindMicroKernel<E, kTransposed, 2>(rows)
                                              : FindMicroKernel<E, kTransposed, 1>(rows);
      kernel(k, a + first * (kTransposed ? 1 : kTileStride), b, c + first * c_stride + column, c_stride, columns,
             accumulate);
    }
  }
}

// Packs k x n elements as MatrixProduct wants B: element (row, column) is from[row * row_stride + column * column_stride].
template <typename T, typename E>
static void PackPanels(const T* from, int64_t row_stride, int64_t column_stride, int64_t k, int64_t n, E* to) {
  for (int64_t column = 0; column < n; column += kPanel<E>) {
    const int64_t columns = Min(kPanel<E>, n - column);
    const int64_t width = columns > kLanes<E> ? kPanel<E> : kLanes<E>;
    for (int64_t row = 0; row < k; ++row, to += width) {
      const T* source = from + row * row_stride + column * column_stride;
      if (column_stride == 1) {
        WidenRow(source, columns, to);
      } else {
        for (int64_t j = 0; j < columns; ++j) to[j] = Load<1>(source + j * column_stride)[0];
      }
      for (int64_t j = columns; j < width; ++j) to[j] = 0;
    }
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

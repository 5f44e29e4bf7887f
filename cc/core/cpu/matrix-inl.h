// SPDX-License-Identifier: Apache-2.0
// Computes the matrix product of a tile: C (m x n) = or += A (m x k) B (k x n).
//
// The file has no include guard: see simd-inl.h.
//
// B is packed in panels of kPanel columns (two vectors): panel after panel,
// each k rows of kPanel elements, zeros past n. A last panel of at most one
// vector of columns is one vector wide. A and C are not packed. A lives in a
// scratch tile of row stride kTileStride, so that its addresses are constants,
// or of any column stride if kTransposed. The microkernel keeps
// kMicroRows x kPanel sums in registers over all of k.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// All but two or three registers hold sums: the others hold two vectors of B
// and a broadcast element of A.
#if TF_DEFORM_VECTOR_BYTES == 64
constexpr int kMicroRows = 14;  // of 32 registers
#else
constexpr int kMicroRows = 6;  // of 16
#endif

template <typename E>
constexpr int kPanel = 2 * kLanes<E>;

// Inner dimension of one product, which keeps A's micro rows and B's panel in
// the first-level cache, and fixes the order of sums.
constexpr int64_t kInner = 256;

// The stride is no power of two, which would map all rows to few cache sets.
constexpr int64_t kTileStride = kInner + 16;

// Return the columns of a packed B, including the columns that fill up its last
// panel, and its rows. In bfloat16 a packed B is laid out as
// matrix_bfloat16-inl.h says.
template <typename E>
static inline int64_t PackedColumns(int64_t n) {
  return RoundUp(n, std::is_same<E, BFloat16>::value ? 16 : kLanes<E>);
}
template <typename E>
static inline int64_t PackedInner(int64_t k) {
  return std::is_same<E, BFloat16>::value ? RoundUp(k, 32) : k;
}

// Adds a[i * kStride] * b[v] to sums[i * kVectors + v] for all i and v. Every
// index is a constant of the language, so that any compiler keeps the sums in
// registers.
template <int64_t kStride, int kVectors, typename E, typename V, int... kIndex>
static inline __attribute__((always_inline)) void MultiplyAdd(
    const E* a, const V* b, V* sums, std::integer_sequence<int, kIndex...>) {
  ((sums[kIndex] += a[kIndex / kVectors * kStride] * b[kIndex % kVectors]),
   ...);
}

// Stores the sums to rows of C that are c_stride apart, or adds them.
template <bool kAccumulate, int kVectors, typename E, typename V, int... kIndex>
static inline __attribute__((always_inline)) void StoreSums(
    const V* sums, E* c, int64_t c_stride,
    std::integer_sequence<int, kIndex...>) {
  constexpr int kN = kLanes<E>;
  const auto store = [](V sum, E* to) __attribute__((always_inline)) {
    Store(kAccumulate ? Load<kN>(to) + sum : sum, to);
  };
  (store(sums[kIndex],
         c + kIndex / kVectors * c_stride + kIndex % kVectors * kN),
   ...);
}

// Stores or adds the sums of kRows x kVectors; C has `columns` of these
// columns.
template <int kRows, int kVectors, typename E, typename V>
static inline __attribute__((always_inline)) void StoreTile(const V* sums, E* c,
                                                            int64_t c_stride,
                                                            int64_t columns,
                                                            bool accumulate) {
  constexpr int kN = kLanes<E>;
  if (columns == kVectors * kN) {
    constexpr auto kAll = std::make_integer_sequence<int, kRows * kVectors>();
    if (accumulate) {
      StoreSums<true, kVectors>(sums, c, c_stride, kAll);
    } else {
      StoreSums<false, kVectors>(sums, c, c_stride, kAll);
    }
    return;
  }
  E done[kRows * kVectors * kN];
  __builtin_memcpy(done, sums, sizeof(done));
  for (int i = 0; i < kRows; ++i) {
    const E* from = done + i * kVectors * kN;
    E* to = c + i * c_stride;
    ForEachVector<E>(columns, [&](auto lanes, int64_t j) {
      const Vector<E, lanes.value> sum = Load<lanes.value>(from + j);
      Store(accumulate ? Load<lanes.value>(to + j) + sum : sum, to + j);
    });
  }
}

template <typename E, bool kTransposed, int kRows, int kVectors>
static void MicroKernel(int64_t k, const E* a, int64_t a_stride, const E* b,
                        E* c, int64_t c_stride, int64_t columns,
                        bool accumulate) {
  constexpr int kN = kLanes<E>;
  constexpr int64_t kRowStride = kTransposed ? 1 : kTileStride;
  const int64_t step = kTransposed ? a_stride : 1;
  using V = Vector<E, kN>;
  // C waits in the second-level cache, or further away.
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(c + i * c_stride + v * kN, 1);
    }
  }
  V sums[kRows * kVectors] = {};
  for (; k > 0; --k, a += step, b += kVectors * kN) {
    V row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = Load<kN>(b + v * kN);
    MultiplyAdd<kRowStride, kVectors>(
        a, row, sums, std::make_integer_sequence<int, kRows * kVectors>());
  }
  StoreTile<kRows, kVectors>(sums, c, c_stride, columns, accumulate);
}

template <typename E>
using MicroKernelFunction = void (*)(int64_t, const E*, int64_t, const E*, E*,
                                     int64_t, int64_t, bool);

// Returns the microkernel for `rows` in [1, kMicroRows].
template <typename E, bool kTransposed, int kVectors, int kRows = kMicroRows>
static inline MicroKernelFunction<E> FindMicroKernel(int64_t rows) {
  if constexpr (kRows == 1) {
    return MicroKernel<E, kTransposed, 1, kVectors>;
  } else {
    if (rows == kRows) return MicroKernel<E, kTransposed, kRows, kVectors>;
    return FindMicroKernel<E, kTransposed, kVectors, kRows - 1>(rows);
  }
}

// If B `is_far`, beyond the second-level cache, each panel is fetched while the
// panel before it is multiplied.
template <bool kTransposed, typename E>
static void MatrixProduct(int64_t m, int64_t n, int64_t k, const E* a,
                          const E* packed_b, E* c, int64_t c_stride,
                          bool accumulate, int64_t a_stride = kTileStride,
                          bool is_far = false) {
  // Parts have nearly equal numbers of rows: a short last part would run at a
  // fraction of the speed.
  const int64_t parts = CeilDiv(m, kMicroRows);
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(E));
  for (int64_t column = 0; column < n; column += kPanel<E>) {
    const int64_t columns = Min(kPanel<E>, n - column);
    const E* b = packed_b + column * k;
    const int64_t lines = is_far && column + 2 * kPanel<E> <= n
                              ? CeilDiv(kPanel<E> * k, kLine)
                              : 0;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = m * part / parts;
      const int64_t rows = m * (part + 1) / parts - first;
      for (int64_t line = lines * part / parts;
           line < lines * (part + 1) / parts; ++line) {
        __builtin_prefetch(b + kPanel<E> * k + line * kLine);
      }
      const auto kernel = columns > kLanes<E>
                              ? FindMicroKernel<E, kTransposed, 2>(rows)
                              : FindMicroKernel<E, kTransposed, 1>(rows);
      kernel(k, a + first * (kTransposed ? 1 : kTileStride), a_stride, b,
             c + first * c_stride + column, c_stride, columns, accumulate);
    }
  }
}

// Stores a vector of columns in the type of the products' elements.
template <typename V, typename E>
static inline void StoreColumns(const V& values, E* to) {
  Store(values, to);
}

// Packs k x n elements to a B of MatrixProduct: element (row, column) is
// from[row * row_stride + column * column_stride].
template <typename T, typename E>
static void PackPanels(const T* from, int64_t row_stride, int64_t column_stride,
                       int64_t k, int64_t n, E* to) {
  constexpr int kN = kLanes<E>;
  for (int64_t column = 0; column < n; column += kPanel<E>) {
    const int64_t columns = Min(kPanel<E>, n - column);
    const int64_t width = columns > kN ? kPanel<E> : kN;
    int64_t row = 0;
    // Columns that lie one after the other are transposed in registers, which
    // takes a quarter of the time.
    for (; row_stride == 1 && row + kN <= k; row += kN, to += kN * width) {
      const T* source = from + row + column * column_stride;
      for (int64_t j = 0; j < width; j += kN) {
        Vector<E, kN> square[kN] = {};
        for (int i = 0; i < kN && j + i < columns; ++i) {
          square[i] = Load<kN>(source + (j + i) * column_stride);
        }
        Transpose<kN>(square);
        for (int i = 0; i < kN; ++i) Store(square[i], to + i * width + j);
      }
    }
    for (; row < k; ++row, to += width) {
      const T* source = from + row * row_stride + column * column_stride;
      if (column_stride == 1) {
        WidenRow(source, columns, to);
      } else {
        for (int64_t j = 0; j < columns; ++j)
          to[j] = Load<1>(source + j * column_stride)[0];
      }
      for (int64_t j = columns; j < width; ++j) to[j] = 0;
    }
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

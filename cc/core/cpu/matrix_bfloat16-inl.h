// SPDX-License-Identifier: Apache-2.0
// Computes the matrix product of a tile in bfloat16: C (m x n) = or += A (m x
// k) B (k x n), in float.
//
// No include guard: see simd-inl.h. Part of the namespace avx512 alone, and
// used where HasBFloat16Products().
//
// An instruction of AMX adds the products of 16 x 32 elements of A and 32 x 16
// elements of B to 16 x 16 sums; without AMX, an instruction of AVX-512 BF16
// adds the products of 1 x 2 and 2 x 16 elements. Products are exact; numbers
// below 2^-126 count 0. A is a scratch tile of row stride kTileStride with
// zeros from column k up to the next multiple of 32; its rows past m may hold
// anything. B is packed in panels of 16 columns, each with 16 pairs for every
// two rows (up to the same multiple of 32). C is not packed.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

constexpr int64_t kAmxRows = 16;   // of A's and C's registers; columns of B's
constexpr int64_t kAmxInner = 32;  // elements of a row of A's register

// The shape of every register: 16 rows of 64 bytes.
struct alignas(64) AmxShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Instructions on registers by number, as assembly: it needs no target of its
// own and lets no compiler move or spill the registers.
template <int kRegister>
static inline void AmxLoad(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes),
               "i"(kRegister)
               : "memory");
}
template <int kRegister>
static inline void AmxStore(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes),
               "i"(kRegister)
               : "memory");
}
template <int kRegister>
static inline void AmxZero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kRegister));
}
template <int kSums, int kA, int kB>
static inline void AmxMultiplyAdd() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA),
               "i"(kB));
}

// Copies sums between a register and `rows` x `columns` elements of C. An edge
// goes through memory of a register's shape, so that an element's sum is made
// the same way in every place.
template <int kRegister>
static inline void AmxLoadSums(const float* c, int64_t c_stride, int64_t rows,
                               int64_t columns, bool accumulate) {
  if (!accumulate) return AmxZero<kRegister>();
  if (rows >= kAmxRows && columns >= kAmxRows) {
    return AmxLoad<kRegister>(c, c_stride * 4);
  }
  alignas(64) float edge[kAmxRows * kAmxRows] = {};
  for (int64_t i = 0; i < Min(rows, kAmxRows); ++i) {
    for (int64_t j = 0; j < Min(columns, kAmxRows); ++j) {
      edge[i * kAmxRows + j] = c[i * c_stride + j];
    }
  }
  AmxLoad<kRegister>(edge, kAmxRows * 4);
}
template <int kRegister>
static inline void AmxStoreSums(float* c, int64_t c_stride, int64_t rows,
                                int64_t columns) {
  if (rows >= kAmxRows && columns >= kAmxRows) {
    return AmxStore<kRegister>(c, c_stride * 4);
  }
  alignas(64) float edge[kAmxRows * kAmxRows];
  AmxStore<kRegister>(edge, kAmxRows * 4);
  for (int64_t i = 0; i < Min(rows, kAmxRows); ++i) {
    for (int64_t j = 0; j < Min(columns, kAmxRows); ++j) {
      c[i * c_stride + j] = edge[i * kAmxRows + j];
    }
  }
}

// The microkernel of AMX: one or two registers of rows by one or two registers
// of columns. Registers 0 to 3 hold sums, 4 and 5 A, 6 and 7 B.
template <bool kTwoRows, bool kTwoColumns>
static void AmxKernel(int64_t inner, const BFloat16* a, const BFloat16* b,
                      float* c, int64_t c_stride, int64_t rows, int64_t columns,
                      bool accumulate) {
  const int64_t panel = inner * kAmxRows;
  float* const below = c + kAmxRows * c_stride;
  AmxLoadSums<0>(c, c_stride, rows, columns, accumulate);
  if (kTwoColumns) {
    AmxLoadSums<1>(c + kAmxRows, c_stride, rows, columns - kAmxRows,
                   accumulate);
  }
  if (kTwoRows) {
    AmxLoadSums<2>(below, c_stride, rows - kAmxRows, columns, accumulate);
  }
  if (kTwoRows && kTwoColumns) {
    AmxLoadSums<3>(below + kAmxRows, c_stride, rows - kAmxRows,
                   columns - kAmxRows, accumulate);
  }
  for (int64_t k = 0; k < inner; k += kAmxInner) {
    AmxLoad<4>(a + k, kTileStride * 2);
    AmxLoad<6>(b + k * kAmxRows, 64);
    AmxMultiplyAdd<0, 4, 6>();
    if (kTwoColumns) {
      AmxLoad<7>(b + panel + k * kAmxRows, 64);
      AmxMultiplyAdd<1, 4, 7>();
    }
    if (kTwoRows) {
      AmxLoad<5>(a + kAmxRows * kTileStride + k, kTileStride * 2);
      AmxMultiplyAdd<2, 5, 6>();
    }
    if (kTwoRows && kTwoColumns) AmxMultiplyAdd<3, 5, 7>();
  }
  AmxStoreSums<0>(c, c_stride, rows, columns);
  if (kTwoColumns) {
    AmxStoreSums<1>(c + kAmxRows, c_stride, rows, columns - kAmxRows);
  }
  if (kTwoRows) AmxStoreSums<2>(below, c_stride, rows - kAmxRows, columns);
  if (kTwoRows && kTwoColumns) {
    AmxStoreSums<3>(below + kAmxRows, c_stride, rows - kAmxRows,
                    columns - kAmxRows);
  }
}

// Adds the dot products of a pair of A's row i and the pairs b[v] to
// sums[i * kVectors + v], for all i and v, as MultiplyAdd does.
template <int kVectors, int... kIndex>
static inline __attribute__((always_inline)) void DotAdd(
    const BFloat16* a, const Vector<uint32_t, 16>* b, Vector<float, 16>* sums,
    std::integer_sequence<int, kIndex...>) {
  const auto add = [](const BFloat16* pair, const Vector<uint32_t, 16>& row,
                      Vector<float, 16>& sum) __attribute__((always_inline)) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(row), "m"(*reinterpret_cast<const uint32_t (*)[1]>(pair)));
  };
  (add(a + kIndex / kVectors * kTileStride, b[kIndex % kVectors], sums[kIndex]),
   ...);
}

// The microkernel of AVX-512 BF16: kRows rows by one or two panels.
template <int kRows, int kVectors>
static void DotKernel(int64_t inner, const BFloat16* a, const BFloat16* b,
                      float* c, int64_t c_stride, int64_t columns,
                      bool accumulate) {
  constexpr int kN = static_cast<int>(kAmxRows);
  Vector<float, kN> sums[kRows * kVectors] = {};
  for (int64_t k = 0; k < inner; k += 2, a += 2, b += 2 * kN) {
    Vector<uint32_t, kN> row[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      __builtin_memcpy(&row[v], b + v * inner * kN, sizeof(row[v]));
    }
    DotAdd<kVectors>(a, row, sums,
                     std::make_integer_sequence<int, kRows * kVectors>());
  }
  StoreTile<kRows, kVectors>(sums, c, c_stride, columns, accumulate);
}

template <int kVectors, int kRows = kMicroRows>
static inline auto FindDotKernel(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return FindDotKernel<kVectors, kRows - 1>(rows);
  }
  return DotKernel<kRows, kVectors>;
}

static void DotProduct(int64_t m, int64_t n, int64_t inner, const BFloat16* a,
                       const BFloat16* packed_b, float* c, int64_t c_stride,
                       bool accumulate) {
  const int64_t parts = CeilDiv(m, kMicroRows);  // as in MatrixProduct
  for (int64_t column = 0; column < n; column += 2 * kAmxRows) {
    const int64_t columns = Min(2 * kAmxRows, n - column);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = m * part / parts;
      const int64_t rows = m * (part + 1) / parts - first;
      const auto kernel =
          columns > kAmxRows ? FindDotKernel<2>(rows) : FindDotKernel<1>(rows);
      kernel(inner, a + first * kTileStride, packed_b + column * inner,
             c + first * c_stride + column, c_stride, columns, accumulate);
    }
  }
}

template <bool kTransposed>
static void MatrixProduct(int64_t m, int64_t n, int64_t k, const BFloat16* a,
                          const BFloat16* packed_b, float* c, int64_t c_stride,
                          bool accumulate, int64_t = kTileStride,
                          bool /*is_far*/ = false) {
  static_assert(!kTransposed, "A's pairs lie in its rows");
  const int64_t inner = PackedInner<BFloat16>(k);
  if (!HasAmx()) {
    return DotProduct(m, n, inner, a, packed_b, c, c_stride, accumulate);
  }
  const AmxShapes shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
  for (int64_t column = 0; column < n; column += 2 * kAmxRows) {
    const int64_t columns = n - column;
    for (int64_t row = 0; row < m; row += 2 * kAmxRows) {
      const int64_t rows = m - row;
      const bool two_rows = rows > kAmxRows, two_columns = columns > kAmxRows;
      const auto kernel =
          two_rows
              ? (two_columns ? AmxKernel<true, true> : AmxKernel<true, false>)
              : (two_columns ? AmxKernel<false, true>
                             : AmxKernel<false, false>);
      kernel(inner, a + row * kTileStride, packed_b + column * inner,
             c + row * c_stride + column, c_stride, rows, columns, accumulate);
    }
  }
  asm volatile("tilerelease");
}

// Stores a vector of columns, rounded to nearest, ties to even.
template <typename V>
static inline void StoreColumns(const V& values, BFloat16* to) {
  constexpr int kN = sizeof(V) / sizeof(float);
  if constexpr (kN == 16) {
    Vector<uint16_t, kN> bits;
    asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(values));
    Store(bits, to);
  } else {
    NarrowRow(reinterpret_cast<const float*>(&values), kN, to);
  }
}

// Packs k x n elements to a B of this product: element (row, column) is
// from[row * row_stride + column * column_stride].
static void PackPanels(const BFloat16* from, int64_t row_stride,
                       int64_t column_stride, int64_t k, int64_t n,
                       BFloat16* to) {
  constexpr int kN = static_cast<int>(kAmxRows);
  for (int64_t column = 0; column < n; column += kN) {
    const int64_t columns = Min(kN, n - column);
    int64_t row = 0;
    for (; row_stride == 1 && row + 2 * kN <= k;
         row += 2 * kN, to += 2 * kN * kN) {
      Vector<uint32_t, kN> square[kN] = {};  // of pairs
      for (int i = 0; i < columns; ++i) {
        __builtin_memcpy(&square[i], from + row + (column + i) * column_stride,
                         sizeof(square[i]));
      }
      Transpose<kN>(square);
      for (int i = 0; i < kN; ++i) Store(square[i], to + 2 * i * kN);
    }
    for (; row < PackedInner<BFloat16>(k); row += 2, to += 2 * kN) {
      const BFloat16* first = from + row * row_stride + column * column_stride;
      const BFloat16* second = first + row_stride;
      Vector<uint32_t, kN> low = {}, high = {};
      if (column_stride == 1 && columns == kN) {
        if (row < k) low = LoadBits<kN>(&first->bits);
        if (row + 1 < k) high = LoadBits<kN>(&second->bits);
      } else {
        for (int64_t j = 0; j < columns; ++j) {
          if (row < k) low[j] = first[j * column_stride].bits;
          if (row + 1 < k) high[j] = second[j * column_stride].bits;
        }
      }
      Store(low | high << 16, to);
    }
  }
}

// Copies k x m elements, transposed, to an A of this product.
static void TransposePairs(const BFloat16* from, int64_t stride, int64_t k,
                           int64_t m, BFloat16* to) {
  constexpr int kN = static_cast<int>(kAmxRows);
  Vector<int32_t, kN> places;
  for (int i = 0; i < kN; ++i) places[i] = i * static_cast<int>(kTileStride);
  for (int64_t row = 0; row < PackedInner<BFloat16>(k); row += 2) {
    const BFloat16* first = from + row * stride;
    const BFloat16* second = first + stride;
    int64_t i = 0;
    for (; i + kN <= m; i += kN) {
      Vector<uint32_t, kN> low = {}, high = {};
      if (row < k) low = LoadBits<kN>(&first[i].bits);
      if (row + 1 < k) high = LoadBits<kN>(&second[i].bits);
      _mm512_i32scatter_epi32(to + i * kTileStride + row,
                              BitCast<__m512i>(places),
                              BitCast<__m512i>(low | high << 16), 2);
    }
    for (; i < m; ++i) {
      BFloat16* pair = to + i * kTileStride + row;
      pair[0] = row < k ? first[i] : BFloat16{};
      pair[1] = row + 1 < k ? second[i] : BFloat16{};
    }
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

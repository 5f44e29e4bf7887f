// SPDX-License-Identifier: Apache-2.0
// Defines vectors of any width, and converts 16-bit types.
//
// No include guard: *.cc here includes this file once per instruction set, each
// time in another namespace TF_DEFORM_ISA with another TF_DEFORM_VECTOR_BYTES.
// Nothing here may call a function or template of the standard library: the
// linker would keep one copy of it for all instruction sets.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

static inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t RoundUp(int64_t a, int64_t b) {
  return CeilDiv(a, b) * b;
}

// The type of the sums, coordinates and columns of a tensor of T.
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
#if TF_DEFORM_VECTOR_BYTES == 64
  if constexpr (kN == 16) {  // one instruction, of which GCC would make six
    return BitCast<Vector<uint32_t, kN>>(
        _mm512_cvtepu16_epi32(BitCast<__m256i>(LoadSame<kN>(from))));
  }
#endif
  return __builtin_convertvector(LoadSame<kN>(from), Vector<uint32_t, kN>);
}

// Loads kN consecutive elements, widened. Pointers need no alignment beyond the
// element's.
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
#if TF_DEFORM_VECTOR_BYTES == 64
  if constexpr (kN == 16) {
    return BitCast<Vector<float, kN>>(
        _mm512_cvtph_ps(BitCast<__m256i>(LoadSame<kN>(&from->bits))));
  }
#endif
#if TF_DEFORM_VECTOR_BYTES >= 32
  if constexpr (kN == 8) {
    return BitCast<Vector<float, kN>>(
        _mm256_cvtph_ps(BitCast<__m128i>(LoadSame<kN>(&from->bits))));
  }
#endif
  const Vector<uint32_t, kN> bits = LoadBits<kN>(&from->bits);
  const Vector<uint32_t, kN> magnitude = (bits & 0x7fffu) << 13;
  // Changes the exponent bias from 15 to 127. Subnormal numbers are exact
  // because tasks run with denormals on.
  const Vector<uint32_t, kN> finite = BitCast<Vector<uint32_t, kN>>(
      BitCast<Vector<float, kN>>(magnitude) * 0x1p112f);
  const Vector<uint32_t, kN> special =
      BitCast<Vector<uint32_t, kN>>(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return BitCast<Vector<float, kN>>(finite | special |
                                    ((bits & 0x8000u) << 16));
}

template <typename V, typename E>
static inline void Store(const V& vector, E* to) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// Rounds to nearest, ties to even.
static inline void Narrow(float value, BFloat16* to) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits =
      static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40u);
}

static inline void Narrow(float value, Float16* to) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // From 65520 on the nearest half is infinity; below 2^-14 it is subnormal,
  // and adding 0.5 rounds at its last bit.
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t subnormal =
      BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal =
      (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t rounded = magnitude >= 0x477ff000u  ? overflow
                           : magnitude < 0x38800000u ? subnormal
                                                     : normal;
  to->bits = static_cast<uint16_t>(sign | rounded);
}

static inline void Narrow(float value, float* to) { *to = value; }
static inline void Narrow(double value, double* to) { *to = value; }

// Returns the sum of a vector's lanes: adds the two halves, then the halves of
// the result, and so on.
template <typename E, int kN>
static inline E SumLanes(const Vector<E, kN>& vector) {
  if constexpr (kN == 1) {
    return vector[0];
  } else {
    Vector<E, kN / 2> halves[2];
    __builtin_memcpy(halves, &vector, sizeof(vector));
    return SumLanes<E, kN / 2>(halves[0] + halves[1]);
  }
}

// Exchanges lanes of `a` and `b` whose numbers differ in the bit kStep.
template <int kStep, typename V, int... kLane>
static inline __attribute__((always_inline)) void ExchangeLanes(
    V* a, V* b, std::integer_sequence<int, kLane...>) {
  constexpr int kN = sizeof...(kLane);
  const V low = *a, high = *b;
  *a = __builtin_shufflevector(low, high,
                               (kLane & kStep ? kN + kLane - kStep : kLane)...);
  *b = __builtin_shufflevector(low, high,
                               (kLane & kStep ? kN + kLane : kLane + kStep)...);
}

// Transposes a square of kN vectors of kN lanes.
template <int kN, typename V, int kStep = kN / 2>
static inline __attribute__((always_inline)) void Transpose(V* rows) {
  if constexpr (kStep > 0) {
    for (int i = 0; i < kN; ++i) {
      if (i & kStep) continue;
      ExchangeLanes<kStep>(rows + i, rows + i + kStep,
                           std::make_integer_sequence<int, kN>());
    }
    Transpose<kN, V, kStep / 2>(rows);
  }
}

// Calls step(std::integral_constant<int, lanes>, first) for vectors that cover
// [0, n): the widest first, then ever narrower ones. Always inlined, as a
// lambda's code must be compiled for this instruction set.
template <typename E, int kN = kLanes<E>, typename Step>
static inline __attribute__((always_inline)) void ForEachVector(
    int64_t n, const Step& step, int64_t first = 0) {
  if constexpr (kN == kLanes<E>) {
    for (; first + kN <= n; first += kN)
      step(std::integral_constant<int, kN>(), first);
  } else if (first + kN <= n) {
    step(std::integral_constant<int, kN>(), first);
    first += kN;
  }
  if constexpr (kN > 1) ForEachVector<E, kN / 2>(n, step, first);
}

// Copies n elements of T, widened to E unless both have 16 bits.
template <typename T, typename E>
static inline void WidenRow(const T* from, int64_t n, E* to) {
  if constexpr (sizeof(E) == 2) {
    __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(E));
  } else {
    ForEachVector<E>(n, [&](auto lanes, int64_t i) {
      Store(Load<lanes.value>(from + i), to + i);
    });
  }
}

// Copies n elements of E, narrowed to T.
template <typename T, typename E>
static inline void NarrowRow(const E* from, int64_t n, T* to) {
  int64_t i = 0;
#if TF_DEFORM_VECTOR_BYTES >= 32
  if constexpr (std::is_same<T, Float16>::value) {
    for (; i + 8 <= n; i += 8) {
      Store(_mm256_cvtps_ph(BitCast<__m256>(LoadSame<8>(from + i)),
                            _MM_FROUND_TO_NEAREST_INT),
            to + i);
    }
  }
#endif
  for (; i < n; ++i) Narrow(from[i], to + i);
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// Computes the matrix product of a block of threads: sums (kM x kN), in
// registers, += A (kM x kK) B (kK x kN), in shared memory.
//
// Either operand is stored with its inner dimension last, [kM][kK] and
// [kN][kK], or first, [kK][kM] and [kK][kN]. Rows are padded by 16 bytes, so
// that eight consecutive rows lie in different banks.
//
// Tensor cores compute products of half, bfloat16 and (as tf32) float;
// multiply-adds compute other products of float.

#ifndef TF_DEFORM_CC_CORE_CUDA_MATRIX_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_MATRIX_INL_H_

#include "cc/core/cuda/device-inl.h"

namespace tf_deform {
namespace cuda {

constexpr int kThreads = 256;  // of a block of kernels without products

// The inner dimension of a step: 64 bytes.
template <typename T>
constexpr int kInner = 64 / static_cast<int>(sizeof(T));

// The layout of an operand in shared memory: `kOuter` rows or columns by
// kInner.
template <typename T, int kOuter, bool kInnerLast>
struct Panel {
  static constexpr int kRows = kInnerLast ? kOuter : kInner<T>;
  static constexpr int kColumns = kInnerLast ? kInner<T> : kOuter;
  static constexpr int kStride =
      kColumns + (!kInnerLast && sizeof(T) == 4 ? 2 : 1) * kPack<T>;
  static constexpr int kElements = kRows * kStride;
  static constexpr int kPacks = kColumns / kPack<T>;  // of a row
};

// A product and the layouts of A and B. `kTf32` counts for float alone. If
// `kIsColumns`, A is rounded to it already.
template <typename T, bool kTf32, int kM, int kN, bool kAInnerLast,
          bool kBInnerLast, bool kIsColumns>
struct Product;

// The product on the tensor cores: 16 warps, 4 x 4, or 8 x 2 for narrow sums,
// each with a part of 16 x 8 pieces. With half as many warps, a thread's
// registers would not hold its sums and the columns that are under way.
template <typename T, bool kTf32, int kM, int kN, bool kAInnerLast,
          bool kBInnerLast, bool kIsColumns>
struct TensorProduct {
  static constexpr bool kIsTf32 = kTf32;
  using A = Panel<T, kM, kAInnerLast>;
  using B = Panel<T, kN, kBInnerLast>;
  static constexpr int kThreads = 512;               // of the block
  static constexpr int kAcross = kN >= 128 ? 4 : 2;  // warps along columns
  static constexpr int kDown = kThreads / 32 / kAcross;
  static constexpr int kPiecesM = kM / kDown / 16;
  static constexpr int kPiecesN = kN / kAcross / 8;
  static constexpr int kDepth = kTf32 ? 8 : 16;  // of an instruction
  static_assert(kPiecesN % 2 == 0, "pieces of columns are loaded in pairs");

  float sums[kPiecesM][kPiecesN][4];

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kPiecesM; ++i) {
#pragma unroll
      for (int j = 0; j < kPiecesN; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[i][j][k] = 0;
      }
    }
  }

  __device__ __forceinline__ void Step(const T* a, const T* b) {
    const int row = FirstRow(), column = FirstColumn();
#pragma unroll
    for (int k = 0; k < kInner<T>; k += kDepth) {
      uint32_t from_a[kPiecesM][4];
#pragma unroll
      for (int i = 0; i < kPiecesM; ++i) {
        Load<A, kAInnerLast, false>(a, row + 16 * i, k, from_a[i]);
      }
#pragma unroll
      for (int j = 0; j < kPiecesN; j += 2) {
        uint32_t from_b[4];
        Load<B, kBInnerLast, true>(b, column + 8 * j, k, from_b);
#pragma unroll
        for (int i = 0; i < kPiecesM; ++i) {
          const uint32_t first[2] = {from_b[0], from_b[1]};
          const uint32_t second[2] = {from_b[2], from_b[3]};
          Multiply(sums[i][j], from_a[i], first);
          Multiply(sums[i][j + 1], from_a[i], second);
        }
      }
    }
  }

  // Calls body(row, column, next, first, second) for all pairs of this thread's
  // sums: `first` at `column`, `second` at `next`.
  template <typename Body>
  __device__ __forceinline__ void ForEachPair(const Body& body) const {
    const int lane = threadIdx.x % 32;
    const int row = FirstRow() + lane / 4;
    const int column = FirstColumn() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kPiecesM; ++i) {
#pragma unroll
      for (int j = 0; j < kPiecesN; ++j) {
        const float (&s)[4] = sums[i][j];
        const int at = column + 8 * j;
        body(row + 16 * i, at, at + 1, s[0], s[1]);
        body(row + 16 * i + 8, at, at + 1, s[2], s[3]);
      }
    }
  }

 private:
  __device__ __forceinline__ static int FirstRow() {
    return static_cast<int>(threadIdx.x) / 32 / kAcross * (kM / kDown);
  }
  __device__ __forceinline__ static int FirstColumn() {
    return static_cast<int>(threadIdx.x) / 32 % kAcross * (kN / kAcross);
  }

  // Loads 16 rows or columns from `outer` on by kDepth from `inner` on, in the
  // order of the instructions (see device-inl.h); of B two pieces of 8 columns.
  // These are four matrices of 8 x 8 (tf32: 8 x 4) elements; the second is the
  // next 8 rows of A, or the next inner elements of B.
  template <typename Shape, bool kInnerLast, bool kIsB>
  __device__ __forceinline__ static void Load(const T* panel, int outer,
                                              int inner, uint32_t (&to)[4]) {
    constexpr int kHalf = kDepth / 2;  // inner elements of a matrix
    const int lane = threadIdx.x % 32;
    if constexpr (kInnerLast || !kTf32) {
      const int matrix = lane / 8;
      const int outer_part = kIsB ? matrix / 2 : matrix % 2;
      const int inner_part = kIsB ? matrix % 2 : matrix / 2;
      if constexpr (kInnerLast) {
        outer += lane % 8 + 8 * outer_part;
        inner += kHalf * inner_part;
        LoadMatrices<false>(panel + outer * Shape::kStride + inner, to);
      } else {
        outer += 8 * outer_part;
        inner += lane % 8 + kHalf * inner_part;
        LoadMatrices<true>(panel + inner * Shape::kStride + outer, to);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int outer_part = kIsB ? i / 2 : i % 2;
        const int inner_part = kIsB ? i % 2 : i / 2;
        to[i] = FloatToBits(
            panel[(inner + lane % 4 + kHalf * inner_part) * Shape::kStride +
                  outer + lane / 4 + 8 * outer_part]);
      }
    }
    if constexpr (kTf32 && (kIsB || !kIsColumns)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = FloatToTf32(BitsToFloat(to[i]));
    }
  }

  __device__ __forceinline__ static void Multiply(float (&sum)[4],
                                                  const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    if constexpr (kTf32) {
      MultiplyTf32(sum, a, b);
    } else {
      MultiplyElements(sum, a, b, static_cast<const T*>(nullptr));
    }
  }
  __device__ __forceinline__ static void MultiplyElements(
      float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
      const Half*) {
    MultiplyHalf(sum, a, b);
  }
  __device__ __forceinline__ static void MultiplyElements(
      float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
      const BFloat16*) {
    MultiplyBFloat16(sum, a, b);
  }
};

template <typename T, bool kTf32, int kM, int kN, bool kAInnerLast,
          bool kBInnerLast, bool kIsColumns>
struct Product
    : TensorProduct<T, kTf32, kM, kN, kAInnerLast, kBInnerLast, kIsColumns> {};

// The product in float: 16 x 16 threads. Where an operand's inner dimension is
// last, a thread's rows are 16 apart; where it is first, they come in fours.
// Either way a load is 16 bytes and free of conflicts.
template <int kM, int kN, bool kAInnerLast, bool kBInnerLast, bool kIsColumns>
struct Product<float, false, kM, kN, kAInnerLast, kBInnerLast, kIsColumns> {
  static constexpr bool kIsTf32 = false;
  using A = Panel<float, kM, kAInnerLast>;
  using B = Panel<float, kN, kBInnerLast>;
  static constexpr int kThreads = 256;                       // of the block
  static constexpr int kRows = kM / 16, kColumns = kN / 16;  // of a thread

  float sums[kRows][kColumns];

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[i][j] = 0;
    }
  }

  __device__ __forceinline__ void Step(const float* a, const float* b) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
    for (int k = 0; k < kInner<float>; k += 4) {
      float from_a[kRows][4], from_b[kColumns][4];
      Load<A, kAInnerLast>(a, y, k, from_a);
      Load<B, kBInnerLast>(b, x, k, from_b);
#pragma unroll
      for (int l = 0; l < 4; ++l) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            sums[i][j] += from_a[i][l] * from_b[j][l];
          }
        }
      }
    }
  }

  template <typename Body>
  __device__ __forceinline__ void ForEachPair(const Body& body) const {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        body(Place<kAInnerLast>(y, i), Place<kBInnerLast>(x, j),
             Place<kBInnerLast>(x, j + 1), sums[i][j], sums[i][j + 1]);
      }
    }
  }

 private:
  // Returns the i-th row or column of a thread.
  template <bool kInnerLast>
  __device__ __forceinline__ static int Place(int thread, int i) {
    return kInnerLast ? thread + 16 * i : thread * 4 + i / 4 * 64 + i % 4;
  }

  template <typename Shape, bool kInnerLast, int kCount>
  __device__ __forceinline__ static void Load(const float* panel, int thread,
                                              int k, float (&to)[kCount][4]) {
    if constexpr (kInnerLast) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const auto pack = *reinterpret_cast<const Pack<float, 4>*>(
            panel + Place<true>(thread, i) * Shape::kStride + k);
#pragma unroll
        for (int l = 0; l < 4; ++l) to[i][l] = pack.values[l];
      }
    } else {
#pragma unroll
      for (int l = 0; l < 4; ++l) {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
          const auto pack = *reinterpret_cast<const Pack<float, 4>*>(
              panel + (k + l) * Shape::kStride + Place<false>(thread, i));
#pragma unroll
          for (int m = 0; m < 4; ++m) to[i + m][l] = pack.values[m];
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_MATRIX_INL_H_

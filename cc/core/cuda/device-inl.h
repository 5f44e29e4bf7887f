// SPDX-License-Identifier: Apache-2.0
// Defines element types, launches, and instructions that C++ cannot express,
// for all CUDA kernels here.
//
// tests/lib/emulated_cuda.h replaces the part inside #ifdef __CUDACC__ on the
// host, so that a kernel runs, thread by thread, without a GPU.

#ifndef TF_DEFORM_CC_CORE_CUDA_DEVICE_INL_H_
#define TF_DEFORM_CC_CORE_CUDA_DEVICE_INL_H_

#include <cstdint>

#include "cc/core/common.h"
#include "cc/core/cuda.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace tf_deform {
namespace cuda {

// Returns the dynamic shared memory of a block, aligned to 16 bytes.
__device__ __forceinline__ char* SharedMemory() {
  extern __shared__ uint4 shared_memory[];
  return reinterpret_cast<char*>(shared_memory);
}

__device__ __forceinline__ float HalfToFloat(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ uint16_t FloatToHalf(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

__device__ __forceinline__ uint16_t FloatToBFloat16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// Return two numbers in a word, the first in the low half.
__device__ __forceinline__ uint32_t FloatsToHalfs(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ uint32_t FloatsToBFloat16s(float first,
                                                      float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Returns the nearest number with 10 bits of mantissa, for the tensor cores.
__device__ __forceinline__ uint32_t FloatToTf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Copies 16 bytes from global to shared memory in the background, zeros if not
// `valid`; both are aligned to 16 bytes. CommitCopies ends a group of copies.
// WaitCopies<n> waits until at most n of this thread's latest groups are under
// way.
__device__ __forceinline__ void CopyAsync(void* shared, const void* global,
                                          bool valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
               "l"(global), "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;");
}
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane i gives
// the address of row i % 8 of matrix i / 8, 16 bytes, and gets of each matrix
// (if kTransposed, of the transposed matrix) the elements 2 * (i % 4) and the
// next in row i / 4.
template <bool kTransposed>
__device__ __forceinline__ void LoadMatrices(const void* row,
                                             uint32_t (&to)[4]) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (kTransposed) {
    asm volatile(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
        : "r"(from));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// Sums (16 x 8) += A (16 x 16) B (16 x 8) of a warp, in bfloat16 or half; in
// tf32 A is 16 x 8 and B 8 x 8. With g = lane / 4 and t = lane % 4:
//   sums[i]  row g + 8 * (i / 2), column 2 * t + i % 2
//   16 bits  a[i]: row g + 8 * (i % 2), columns 2 * t + 8 * (i / 2) and next
//            b[i]: rows 2 * t + 8 * i and next, column g
//   tf32     a[i]: row g + 8 * (i % 2), column t + 4 * (i / 2)
//            b[i]: row t + 4 * i, column g
__device__ __forceinline__ void MultiplyHalf(float (&sums)[4],
                                             const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void MultiplyBFloat16(float (&sums)[4],
                                                 const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void MultiplyTf32(float (&sums)[4],
                                             const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Adds to numbers in global memory that other threads add to as well. To add
// four at once, the address must be aligned to 16 bytes.
__device__ __forceinline__ void AddAtomically(float* to, float value) {
  atomicAdd(to, value);
}
__device__ __forceinline__ void AddAtomically(double* to, double value) {
  atomicAdd(to, value);
}
#if __CUDA_ARCH__ >= 900 && \
    (__CUDACC_VER_MAJOR__ > 12 || __CUDACC_VER_MINOR__ >= 1)
#define TF_DEFORM_ADDS_FOUR 1
#else
#define TF_DEFORM_ADDS_FOUR 0
#endif
// Says whether the device adds four numbers at once. If not, kernels are faster
// if the lanes of a warp add to neighbouring numbers.
constexpr bool kAddsFour = TF_DEFORM_ADDS_FOUR;
__device__ __forceinline__ void AddAtomically(float* to,
                                              const float (&values)[4]) {
#if TF_DEFORM_ADDS_FOUR
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to),
               "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, values[i]);
#endif
}

// Returns the sum of a value over the lanes of a warp, in an order that is
// always the same. All lanes call it.
template <typename E>
__device__ __forceinline__ E SumOfWarp(E value) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

// Returns the number of multiprocessors of the current device; 1 if the driver
// does not tell.
inline int Multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) !=
          cudaSuccess) {
    (void)cudaGetLastError();
    return 1;
  }
  return count;
}

inline Status ToStatus(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return Status();
  (void)cudaGetLastError();  // or the next call would report it again
  return Internal("%s failed: %s (%s)", call, cudaGetErrorString(error),
                  cudaGetErrorName(error));
}

// Queues a kernel. A grid has at most 2^31 - 1 blocks.
template <typename... Parameters, typename... Arguments>
Status Launch(const char* name, void (*kernel)(Parameters...), int64_t blocks,
              int threads, int64_t shared_bytes, const CudaStream& stream,
              Arguments... arguments) {
  if (blocks <= 0) return Status();
  if (blocks > 0x7fffffff) {
    return Internal(
        "Expected %s to have at most 2^31 - 1 blocks. Received: "
        "%lld",
        name, static_cast<long long>(blocks));
  }
  if (shared_bytes > 48 * 1024) {
    TF_DEFORM_RETURN_IF_ERROR(ToStatus(
        cudaFuncSetAttribute(kernel,
                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        name));
  }
  kernel<<<static_cast<unsigned>(blocks), threads,
           static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream.stream)>>>(arguments...);
  return ToStatus(cudaGetLastError(), name);
}

// Queues a task that writes zeros.
inline Status Clear(void* memory, int64_t bytes, const CudaStream& stream) {
  if (bytes == 0) return Status();
  return ToStatus(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes),
                                  static_cast<cudaStream_t>(stream.stream)),
                  "cudaMemsetAsync");
}

}  // namespace cuda
}  // namespace tf_deform
#endif  // __CUDACC__

namespace tf_deform {
namespace cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type in which numbers of T are computed and summed, and of coordinates.
template <typename T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::Type;

__host__ __device__ __forceinline__ float BitsToFloat(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
__host__ __device__ __forceinline__ uint32_t FloatToBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

__device__ __forceinline__ float Widen(float value) { return value; }
__device__ __forceinline__ double Widen(double value) { return value; }
__device__ __forceinline__ float Widen(Half value) {
  return HalfToFloat(value.bits);
}
__device__ __forceinline__ float Widen(BFloat16 value) {
  return BitsToFloat(static_cast<uint32_t>(value.bits) << 16);
}

// Rounds to the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ void Narrow(float value, float* to) { *to = value; }
__device__ __forceinline__ void Narrow(double value, double* to) {
  *to = value;
}
__device__ __forceinline__ void Narrow(float value, Half* to) {
  to->bits = FloatToHalf(value);
}
__device__ __forceinline__ void Narrow(float value, BFloat16* to) {
  to->bits = FloatToBFloat16(value);
}

// kN elements that are read and written at once.
template <typename T, int kN>
struct alignas(sizeof(T) * kN) Pack {
  T values[kN];
};

// The elements of a word of 32 bits. Packs that wait in registers are kept as
// words: a compiler takes packs of 16-bit elements apart as soon as they are
// read, which waits for memory.
template <typename T>
struct Word;
template <>
struct Word<float> {
  static constexpr int kCount = 1;
  __device__ static float At(uint32_t word, int) { return BitsToFloat(word); }
  __device__ static uint32_t Of(float value, float) {
    return FloatToBits(value);
  }
};
template <>
struct Word<Half> {
  static constexpr int kCount = 2;
  __device__ static float At(uint32_t word, int i) {
    return HalfToFloat(static_cast<uint16_t>(word >> 16 * i));
  }
  __device__ static uint32_t Of(float first, float second) {
    return FloatsToHalfs(first, second);
  }
};
template <>
struct Word<BFloat16> {
  static constexpr int kCount = 2;
  __device__ static float At(uint32_t word, int i) {
    return BitsToFloat(i == 0 ? word << 16 : word & 0xffff0000u);
  }
  __device__ static uint32_t Of(float first, float second) {
    return FloatsToBFloat16s(first, second);
  }
};

// Elements in 16 bytes.
template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

__host__ __device__ constexpr int64_t CeilDiv(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
__host__ __device__ constexpr int64_t RoundUp(int64_t a, int64_t b) {
  return CeilDiv(a, b) * b;
}
__host__ __device__ constexpr int64_t Min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
__host__ __device__ constexpr int64_t Max(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// A number above 0 by which kernels divide often. A division of 64 bits takes a
// subroutine, about as long as a read from memory; a Divider takes one product.
struct Divider {
  int64_t value;
  uint64_t factor;  // 2^(63 + shift) / value, rounded up
  int shift;        // log2(value), rounded up

  Divider(int64_t by) : value(by), shift(0) {  // NOLINT: stands for a number
    while (shift < 62 && (int64_t{1} << shift) < by) ++shift;
    const unsigned __int128 power = static_cast<unsigned __int128>(1)
                                    << (63 + shift);
    const auto divisor = static_cast<unsigned __int128>(by);
    factor = static_cast<uint64_t>((power + divisor - 1) / divisor);
  }
  __host__ __device__ operator int64_t() const { return value; }

  // `number` must not be negative.
  __device__ __forceinline__ friend int64_t operator/(int64_t number,
                                                      const Divider& by) {
    return static_cast<int64_t>(
        __umul64hi(2 * static_cast<uint64_t>(number), by.factor) >> by.shift);
  }
  __device__ __forceinline__ friend int64_t operator%(int64_t number,
                                                      const Divider& by) {
    return number - number / by * by.value;
  }
};

// Calls body(T()) for the type of the elements.
template <typename Body>
Status WithType(DataType type, const Body& body) {
  switch (type) {
    case DataType::kFloat16:
      return body(Half());
    case DataType::kBFloat16:
      return body(BFloat16());
    case DataType::kFloat32:
      return body(float());
    case DataType::kFloat64:
      return body(double());
  }
  return InvalidArgument("Expected a type from 0 to 3. Received: %d",
                         static_cast<int>(type));
}

inline bool IsAligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) ==
         0;
}

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CUDA_DEVICE_INL_H_

// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the host, for tests on machines without a GPU: defines
// the parts of CUDA that kernels and cc/core/cuda/device-inl.h use.
//
// Included before everything else (g++ -include). Every thread of a block is a
// fiber with a stack of its own, which runs until it has to wait for others:
// at __syncthreads, or where a warp's lanes exchange values. Blocks run one
// after the other. What a GPU leaves open is made hard on purpose:
//   - TfDeformEmulatedOrder(1) runs the fibers backwards: results that change
//     show that a barrier is missing;
//   - background copies land only when they are waited for;
//   - shared memory starts as NaN.
// A wait that never ends aborts with a message.

#ifndef TF_DEFORM_TESTS_CORE_EMULATED_CUDA_H_
#define TF_DEFORM_TESTS_CORE_EMULATED_CUDA_H_

#undef _FORTIFY_SOURCE  // its longjmp takes a change of stacks for an error
#include <setjmp.h>
#include <ucontext.h>
#include <xmmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cc/core/common.h"

#define __host__
#define __device__
#define __global__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static  // blocks run one at a time

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

// Counts the arrivals of a group of threads; waiters go on when `generation`
// changes.
struct Barrier {
  int64_t generation = 0;
  int arrived = 0, expected = 0;
  int votes = 0, result = 0;  // of __syncthreads_or
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  ucontext_t start;
  jmp_buf place;
  bool started, done;
  const Barrier* waits_for;
  int64_t generation;  // that it waits to pass
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> copies;  // of the group that is open
  char* stack = nullptr;
};

struct Warp {
  Barrier barrier;
  uint64_t values[kWarp][6];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<uint4> shared;
  jmp_buf scheduler;
  int current = 0;
  bool backwards = false;
  void* stream = nullptr;  // of the last launch
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

inline Block block;

inline void Wait(Barrier* barrier) {
  Thread& thread = block.threads[block.current];
  if (++barrier->arrived == barrier->expected) {
    barrier->arrived = 0;
    ++barrier->generation;
    barrier->result = barrier->votes;
    barrier->votes = 0;
    return;
  }
  thread.waits_for = barrier;
  thread.generation = barrier->generation;
  if (_setjmp(thread.place) == 0) _longjmp(block.scheduler, 1);
}

inline void Enter() {
  block.body(block.argument);
  block.threads[block.current].done = true;
  _longjmp(block.scheduler, 1);
}

}  // namespace emulated

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulated::Wait(&emulated::block.barrier); }
inline int __syncthreads_or(int predicate) {
  emulated::block.barrier.votes += predicate != 0;
  __syncthreads();
  return emulated::block.barrier.result != 0;
}

namespace emulated {

inline int Lane() { return block.current % kWarp; }
inline Warp& MyWarp() { return block.warps[block.current / kWarp]; }

// Every lane gives `words` and reads the words of all lanes.
template <typename Read>
void Exchange(const uint64_t* words, int count, const Read& read) {
  Warp& warp = MyWarp();
  for (int i = 0; i < count; ++i) warp.values[Lane()][i] = words[i];
  Wait(&warp.barrier);
  read(warp.values);
  Wait(&warp.barrier);
}

template <typename E>
E Shuffle(E value, int lane) {
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(value));
  Exchange(&word, 1, [&](const auto& values) {
    memcpy(&value, values[lane], sizeof(value));
  });
  return value;
}

// Makes a thread compute with subnormal numbers, as a GPU does; TensorFlow's
// threads treat them as 0.
class Subnormals {
 public:
  Subnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~Subnormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
};

inline void Run(int64_t blocks, int threads, int64_t shared_bytes,
                void (*body)(void*), void* argument) {
  static std::mutex one_launch;  // TensorFlow calls from several threads
  const std::lock_guard<std::mutex> lock(one_launch);
  const Subnormals subnormals;
  if (block.threads.size() < static_cast<size_t>(threads)) {
    block.threads.resize(threads);
  }
  if (threads % kWarp != 0 || threads > 1024 || shared_bytes > 99 * 1024) {
    fprintf(stderr, "emulated CUDA: %d threads, %lld bytes shared\n", threads,
            static_cast<long long>(shared_bytes));
    abort();
  }
  block.body = body;
  block.argument = argument;
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    block.barrier = Barrier();
    block.barrier.expected = threads;
    block.warps.assign(threads / kWarp, Warp());
    for (Warp& warp : block.warps) warp.barrier.expected = kWarp;
    block.shared.assign(shared_bytes / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});
    for (int i = 0; i < threads; ++i) {
      Thread& t = block.threads[i];
      if (t.stack == nullptr) t.stack = static_cast<char*>(malloc(kStack));
      t.started = t.done = false;
      t.waits_for = nullptr;
      t.groups.clear();
      t.copies.clear();
    }
    for (int left = threads; left > 0;) {
      bool moved = false;
      for (int k = 0; k < threads; ++k) {
        const int i = block.backwards ? threads - 1 - k : k;
        Thread& t = block.threads[i];
        if (t.done || (t.waits_for != nullptr &&
                       t.waits_for->generation == t.generation)) {
          continue;
        }
        moved = true;
        t.waits_for = nullptr;
        block.current = i;
        threadIdx.x = static_cast<unsigned>(i);
        if (_setjmp(block.scheduler) == 0) {
          if (t.started) _longjmp(t.place, 1);
          t.started = true;
          getcontext(&t.start);
          t.start.uc_stack.ss_sp = t.stack;
          t.start.uc_stack.ss_size = kStack;
          t.start.uc_link = nullptr;
          makecontext(&t.start, Enter, 0);
          setcontext(&t.start);
        }
        if (block.threads[block.current].done) --left;
      }
      if (!moved) {
        fprintf(stderr, "emulated CUDA: threads wait for ever\n");
        abort();
      }
    }
  }
}

}  // namespace emulated

template <typename E>
E __shfl_xor_sync(unsigned, E value, int mask) {
  return emulated::Shuffle(value, emulated::Lane() ^ mask);
}
template <typename E>
E __shfl_sync(unsigned, E value, int lane) {
  return emulated::Shuffle(value, lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned bits = 0;
  const uint64_t word = predicate != 0;
  emulated::Exchange(&word, 1, [&](const auto& values) {
    for (int i = 0; i < emulated::kWarp; ++i) {
      bits |= static_cast<unsigned>(values[i][0]) << i;
    }
  });
  return bits;
}
inline void __syncwarp() { emulated::Wait(&emulated::MyWarp().barrier); }
// Returns a product that no fused multiply-add takes on; compiled with
// -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
// Returns a quotient that is off, as it may be on a GPU.
inline float __fdividef(float a, float b) {
  const float quotient = std::fabs(b) > 0x1p126f ? 0 * a : a / b;
  return quotient == 0 ? quotient : std::nextafter(quotient, INFINITY);
}
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <typename E>
E __ldg(const E* from) {
  return *from;
}

namespace tf_deform {
namespace cuda {

inline char* SharedMemory() {
  return reinterpret_cast<char*>(emulated::block.shared.data());
}

inline float HalfToFloat(uint16_t bits) {
  if ((bits & 0x7c00) == 0x7c00) {
    return bits & 0x3ff ? NAN : bits >> 15 ? -INFINITY : INFINITY;
  }
  const uint32_t small = (bits & 0x8000u) << 16 | (bits & 0x7fffu) << 13;
  float value;
  memcpy(&value, &small, 4);
  return value * 0x1p112f;  // exact: the biases of the exponents differ by 112
}

inline uint16_t FloatToHalf(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (size != size) return sign | 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < std::ldexp(1.0f, -14)) {  // steps of 2^-24, nearest even
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  }
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

inline uint16_t FloatToBFloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t FloatsToHalfs(float first, float second) {
  return FloatToHalf(first) | uint32_t{FloatToHalf(second)} << 16;
}
inline uint32_t FloatsToBFloat16s(float first, float second) {
  return FloatToBFloat16(first) | uint32_t{FloatToBFloat16(second)} << 16;
}

inline uint32_t FloatToTf32(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000) == 0x7f800000) return bits;
  return (bits + 0x1000) & ~0x1fffu;
}

inline void CopyAsync(void* shared, const void* global, bool valid) {
  auto& thread = emulated::block.threads[emulated::block.current];
  thread.copies.push_back({shared, global, valid});
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    fprintf(stderr, "emulated CUDA: unaligned background copy\n");
    abort();
  }
}
inline void CommitCopies() {
  auto& thread = emulated::block.threads[emulated::block.current];
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}
template <int kPending>
void WaitCopies() {
  auto& groups = emulated::block.threads[emulated::block.current].groups;
  while (groups.size() > kPending) {
    for (const auto& copy : groups.front()) {
      if (copy.valid) {
        memcpy(copy.to, copy.from, 16);
      } else {
        memset(copy.to, 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

template <bool kTransposed>
void LoadMatrices(const void* row, uint32_t (&to)[4]) {
  const uint64_t word = reinterpret_cast<uint64_t>(row);
  const int lane = emulated::Lane();
  if (word % 16 != 0) {
    fprintf(stderr, "emulated CUDA: unaligned row of a matrix\n");
    abort();
  }
  emulated::Exchange(&word, 1, [&](const auto& rows) {
    for (int m = 0; m < 4; ++m) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int r = kTransposed ? lane % 4 * 2 + i : lane / 4;
        const int c = kTransposed ? lane / 4 : lane % 4 * 2 + i;
        pair[i] = reinterpret_cast<const uint16_t*>(rows[m * 8 + r][0])[c];
      }
      memcpy(&to[m], pair, 4);
    }
  });
}

// Multiplies a lane's part of a product. `widen` finds the elements of a word of
// operands.
template <int kInner, typename Widen>
void Multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              const Widen& widen) {
  constexpr int kEach = kInner == 16 ? 2 : 1;  // elements of a word
  constexpr int kWords = 6;
  float mine[kWords][2] = {};
  for (int i = 0; i < kWords; ++i) {
    for (int half = 0; half < kEach; ++half) {
      mine[i][half] = widen(i < 4 ? a[i] : b[i - 4], half);
    }
  }
  uint64_t words[kWords];
  memcpy(words, mine, sizeof(words));
  const int g = emulated::Lane() / 4, t = emulated::Lane() % 4;
  emulated::Exchange(words, kWords, [&](const auto& values) {
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
      double sum = 0;
      for (int k = 0; k < kInner; ++k) {
        const int half = k % kEach;
        const int t_of_k = k % (kInner / 2) / kEach;
        const int part = k / (kInner / 2);
        float pair_a[2], pair_b[2];
        memcpy(pair_a, &values[row % 8 * 4 + t_of_k][row / 8 + 2 * part], 8);
        memcpy(pair_b, &values[column * 4 + t_of_k][4 + part], 8);
        sum += double(pair_a[half]) * double(pair_b[half]);
      }
      sums[i] += static_cast<float>(sum);
    }
  });
}
inline void MultiplyHalf(float (&sums)[4], const uint32_t (&a)[4],
                         const uint32_t (&b)[2]) {
  Multiply<16>(sums, a, b, [](uint32_t word, int half) {
    return HalfToFloat(static_cast<uint16_t>(word >> 16 * half));
  });
}
inline void MultiplyBFloat16(float (&sums)[4], const uint32_t (&a)[4],
                             const uint32_t (&b)[2]) {
  Multiply<16>(sums, a, b, [](uint32_t word, int half) {
    const uint32_t bits = word >> 16 * half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  });
}
inline void MultiplyTf32(float (&sums)[4], const uint32_t (&a)[4],
                         const uint32_t (&b)[2]) {
  Multiply<8>(sums, a, b, [](uint32_t word, int) {
    float value;
    memcpy(&value, &word, 4);
    return value;
  });
}

constexpr bool kAddsFour = true;
template <typename E>
void AddAtomically(E* to, E value) {
  *to += value;
}
inline void AddAtomically(float* to, const float (&values)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    fprintf(stderr, "emulated CUDA: unaligned sum of four\n");
    abort();
  }
  for (int i = 0; i < 4; ++i) to[i] += values[i];
}

template <typename E>
E SumOfWarp(E value) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

inline int Multiprocessors() { return 3; }

template <typename... Parameters, typename... Arguments>
Status Launch(const char*, void (*kernel)(Parameters...), int64_t blocks,
              int threads, int64_t shared_bytes, const CudaStream& stream,
              Arguments... arguments) {
  emulated::block.stream = stream.stream;
  auto body = [&] { kernel(arguments...); };
  emulated::Run(
      blocks, threads, shared_bytes,
      [](void* argument) { (*static_cast<decltype(body)*>(argument))(); },
      &body);
  return Status();
}

inline Status Clear(void* memory, int64_t bytes, const CudaStream&) {
  memset(memory, 0, static_cast<size_t>(bytes));
  return Status();
}

}  // namespace cuda
}  // namespace tf_deform

#endif  // TF_DEFORM_TESTS_CORE_EMULATED_CUDA_H_

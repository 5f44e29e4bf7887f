// Peaks of this machine, as lines of "name value": GFLOP/s and GB/s.
// SPDX-License-Identifier: Apache-2.0
//
//     c++ -O3 -march=native -std=c++17 -pthread peaks.cc -o peaks && ./peaks 2
//
// The argument is the number of threads, the value that of all together:
//
// fma.BITS     float32 multiply-adds on registers, with vectors of so many bits
// kernel.BITS  the same on operands from the first-level cache, as a matrix
//              microkernel reads them (14 x 2 vectors of sums of 512 bits, else
//              6 x 2): the reachable peak
// bf16.512     bfloat16 multiply-adds with float32 sums (vdpbf16ps)
// bf16.amx     the same of AMX (tdpbf16ps)
// read.LEVEL   reading from a cache or from memory
//
// BITS are those of the widest vectors and, if these are wider, 256.

#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <utility>
#include <vector>
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidest = 64;
#elif defined(__AVX__)
constexpr int kWidest = 32;
#else
constexpr int kWidest = 16;
#endif
constexpr int kSums = 12;    // enough to hide the latency of a multiply-add
constexpr int kDepth = 128;  // of a product: its operands fit the first level

template <typename T, int kBytes>
using Vector __attribute__((vector_size(kBytes))) = T;

// The compiler neither knows the value nor drops it.
template <typename T>
void Hide(T& value) {
  asm volatile("" : "+m"(value) : : "memory");
}

// body(0), body(1), ... with constants: what they index stays in registers.
template <typename Body, int... kIndex>
inline __attribute__((always_inline)) void Unrolled(
    std::integer_sequence<int, kIndex...>, Body body) {
  (body(std::integral_constant<int, kIndex>()), ...);
}
template <int kCount>
using Indices = std::make_integer_sequence<int, kCount>;

template <int kBytes>
void Registers(int64_t repeats) {
  Vector<float, kBytes> sums[kSums] = {}, a = {}, b = {};
  Hide(a);
  Hide(b);
  for (; repeats > 0; --repeats) {
    Unrolled(Indices<kSums>(), [&](auto j) { sums[j] = sums[j] * a + b; });
  }
  Hide(sums);
}

template <int kBytes>
constexpr int kRows = kBytes == 64 ? 14 : 6;

template <int kBytes>
void Kernel(int64_t repeats) {
  float a[kDepth][kRows<kBytes>] = {};
  Vector<float, kBytes> b[kDepth][2] = {};
  for (; repeats > 0; --repeats) {
    Hide(a);
    Hide(b);
    Vector<float, kBytes> sums[kRows<kBytes> * 2] = {};
    for (int k = 0; k < kDepth; ++k) {
      Unrolled(Indices<kRows<kBytes> * 2>(),
               [&](auto j) { sums[j] += a[k][j / 2] * b[k][j % 2]; });
    }
    Hide(sums);
  }
}

#ifdef __AVX512BF16__
void BFloat16(int64_t repeats) {
  __m512 sums[kSums] = {};
  __m512bh a = {}, b = {};
  Hide(a);
  Hide(b);
  for (; repeats > 0; --repeats) {
    Unrolled(Indices<kSums>(),
             [&](auto j) { sums[j] = _mm512_dpbf16_ps(sums[j], a, b); });
  }
  Hide(sums);
}
#endif

struct Block {
  Vector<int64_t, kWidest> vectors[8];
};

void Read(const std::vector<Block>& buffer, int64_t repeats) {
  Block sums = {};
  for (; repeats > 0; --repeats) {
    asm volatile("" : : "r"(buffer.data()) : "memory");
    for (const Block& block : buffer) {
      Unrolled(Indices<8>(),
               [&](auto j) { sums.vectors[j] |= block.vectors[j]; });
    }
  }
  Block all = sums;
  Hide(all);  // not `sums`, which would then live in memory
}

// Keeps the calling thread on one of the processors that it may use: left to
// themselves, two threads can share one for as long as all of this takes.
void StayOn(int index) {
#ifdef __linux__
  cpu_set_t allowed, one;
  sched_getaffinity(0, sizeof(allowed), &allowed);
  index %= CPU_COUNT(&allowed);
  CPU_ZERO(&one);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed) && index-- == 0) CPU_SET(cpu, &one);
  }
  sched_setaffinity(0, sizeof(one), &one);
#endif
}

// Prints the best rate of several runs, in 10^9 a second: every thread does so
// much (FLOP or bytes) in each repeat of its work.
void Print(const char* name, int threads, double amount,
           const std::function<void(int thread, int64_t repeats)>& work) {
  double best = 0;
  int64_t repeats = 1;
  for (int run = 0; run < 7;) {
    std::atomic<int> ready{0};
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i) {
      pool.emplace_back([&, i] {
        StayOn(i);
        for (++ready; ready <= threads;) std::this_thread::yield();
        work(i, repeats);
      });
    }
    while (ready < threads) std::this_thread::yield();
    const auto start = std::chrono::steady_clock::now();
    ++ready;  // go
    for (std::thread& thread : pool) thread.join();
    const std::chrono::duration<double> time =
        std::chrono::steady_clock::now() - start;
    if (time.count() < 0.03) {
      repeats *= 2;
      continue;
    }
    best = std::max(best, threads * amount * repeats / time.count() / 1e9);
    ++run;
  }
  std::printf("%s %.1f\n", name, best);
}

#if defined(__AMX_BF16__) && defined(__linux__)
// Four registers of sums, as in a product of two by two registers.
void Amx(int64_t repeats) {
  struct alignas(64) {
    uint8_t palette = 1, others[15] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  asm volatile("ldtilecfg %0" : : "m"(shapes));  // the intrinsic reads a part
  for (; repeats > 0; --repeats) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

void PrintAmx(int threads) {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return;
  Print("bf16.amx", threads, 4 * 16 * 16 * 32 * 2,
        [](int, int64_t repeats) { Amx(repeats); });
}
#else
void PrintAmx(int) {}
#endif

template <int kBytes>
void PrintArithmetic(int threads) {
  const auto print = [&](const char* name, double sums, void (*work)(int64_t)) {
    char full[32];
    std::snprintf(full, sizeof(full), "%s.%d", name, kBytes * 8);
    Print(full, threads, sums * kBytes / sizeof(float) * 2,
          [&](int, int64_t repeats) { work(repeats); });
  };
  print("fma", kSums, Registers<kBytes>);
  print("kernel", kDepth * kRows<kBytes> * 2, Kernel<kBytes>);
#ifdef __AVX512BF16__
  if (kBytes == 64) print("bf16", kSums * 2, BFloat16);
#endif
}

void PrintRead(const char* name, int threads, int64_t bytes) {
  const std::vector<std::vector<Block>> buffers(
      threads, std::vector<Block>(bytes / sizeof(Block)));
  Print(name, threads, bytes,
        [&](int thread, int64_t repeats) { Read(buffers[thread], repeats); });
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  PrintArithmetic<kWidest>(threads);
  PrintAmx(threads);
  if (kWidest > 32) PrintArithmetic<32>(threads);
  // Every thread has its own part. What is shared is divided, but remains
  // larger than the caches that are not.
  const int64_t mib = 1024 * 1024;
  PrintRead("read.first_level", threads, mib / 32);
  PrintRead("read.second_level", threads, mib);
  PrintRead("read.last_level", threads, std::max(16 * mib / threads, 4 * mib));
  PrintRead("read.memory", threads, 512 * mib / threads);
}

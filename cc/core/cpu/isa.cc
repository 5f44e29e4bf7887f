// SPDX-License-Identifier: Apache-2.0
// Finds the instruction set to use, and the size of the cache.

#include "cc/core/cpu/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tf_deform {
namespace cpu {
namespace {

#if defined(__x86_64__)
// Not every compiler knows this feature by name.
bool HasF16C() {
  unsigned int eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16",
                                  "amx"};
constexpr int kAvx512BF16 = 3, kAmx = 4;

// Returns the index in kNames of the name in the environment variable; the last
// index if there is no variable, 0 if the name is not in kNames.
int Allowed() {
  static const int allowed = [] {
    const char* name = std::getenv("TF_DEFORM_MAX_ISA");
    if (name == nullptr) return kAmx;
    int place = kAmx;
    while (place > 0 && std::strcmp(name, kNames[place]) != 0) --place;
    return place;
  }();
  return allowed;
}

bool MayUseAvx512BF16() {
#if defined(__x86_64__)
  constexpr unsigned int kFeature = 1u << 5;  // eax
  unsigned int eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 &&
         (eax & kFeature) != 0;
#else
  return false;
#endif
}

// Intel's dot products of bfloat16 take twice the time of as many vectors of
// float32. With them the operator takes 1.5 times as long as with products of
// float32, so they are used only if they are asked for by name.
bool Avx512BF16Pays() {
#if defined(__x86_64__)
  return Allowed() == kAvx512BF16 || !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

// The system saves the registers of AMX only for a process that asked for it.
bool MayUseAmx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned int kAmxBF16 = 1u << 22, kAmxTile = 1u << 24;  // edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned int eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
         (edx & kAmxBF16) != 0 && (edx & kAmxTile) != 0 && MayUseAvx512BF16() &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa Choose() {
#if defined(__x86_64__)
  if (Allowed() >= static_cast<int>(Isa::kAvx512) &&
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (Allowed() >= static_cast<int>(Isa::kAvx2) &&
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      HasF16C()) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

}  // namespace

Isa BestIsa() {
  static const Isa best = Choose();
  return best;
}

bool HasAmx() {
  static const bool has =
      BestIsa() == Isa::kAvx512 && Allowed() >= kAmx && MayUseAmx();
  return has;
}

bool HasBFloat16Products() {
  static const bool has =
      HasAmx() || (BestIsa() == Isa::kAvx512 && Allowed() >= kAvx512BF16 &&
                   MayUseAvx512BF16() && Avx512BF16Pays());
  return has;
}

const char* InstructionSet() {
  if (HasAmx()) return kNames[kAmx];
  if (HasBFloat16Products()) return kNames[kAvx512BF16];
  return kNames[static_cast<int>(BestIsa())];
}

int64_t SecondLevelCache() {
  int64_t bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  bytes = found;
#endif
  return bytes > 0 ? bytes : int64_t{1} << 20;
}

}  // namespace cpu
}  // namespace tf_deform

extern "C" __attribute__((visibility("default"))) const char*
TfDeformInstructionSet() {
  return tf_deform::cpu::InstructionSet();
}

// The instruction set in use, and the cache.
// SPDX-License-Identifier: Apache-2.0

#include "cc/core/isa.h"

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
// Not every compiler knows this one by name.
bool HasF16C() {
  unsigned int eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool AllowsAmx() {
  static const bool allows = [] {
    const char* allowed = std::getenv("TF_DEFORM_MAX_ISA");
    return allowed == nullptr || std::strcmp(allowed, "amx") == 0;
  }();
  return allows;
}

// The system saves the registers of AMX only for a process that asked for it.
bool MayUseAmx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned int kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // edx
  constexpr unsigned int kAvx512Bf16 = 1u << 5;                     // eax
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned int eax, ebx, ecx, edx, more;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 &&
         (edx & kAmxBf16) != 0 && (edx & kAmxTile) != 0 &&
         __get_cpuid_count(7, 1, &more, &ebx, &ecx, &edx) != 0 &&
         (more & kAvx512Bf16) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa Choose() {
#if defined(__x86_64__)
  const char* allowed = std::getenv("TF_DEFORM_MAX_ISA");
  const bool any = AllowsAmx() || std::strcmp(allowed, "avx512") == 0;
  if (any && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if ((any || std::strcmp(allowed, "avx2") == 0) &&
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
      BestIsa() == Isa::kAvx512 && AllowsAmx() && MayUseAmx();
  return has;
}

const char* InstructionSet() {
  if (HasAmx()) return "amx";
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
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

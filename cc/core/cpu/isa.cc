// SPDX-License-Identifier: Apache-2.0
// Finds the instruction set to use, and the size of the cache.

#include "cc/core/cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

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
constexpr unsigned int Bits(std::initializer_list<int> bits) {
  unsigned int word = 0;
  for (int bit : bits) word |= 1u << bit;
  return word;
}

// Registers that cpuid fills.
struct CpuId {
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;

  // Reads a leaf; all is 0 if the processor does not have it.
  CpuId(unsigned int leaf, unsigned int subleaf) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  }
};

bool HasAll(unsigned int word, unsigned int bits) {
  return (word & bits) == bits;
}

// Returns which registers the system saves: XCR0, or 0 without XSAVE.
unsigned int SavedRegisters() {
  if (!HasAll(CpuId(1, 0).ecx, Bits({27}))) return 0;  // OSXSAVE
  unsigned int eax, edx;
  __asm__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return eax;
}

// The compiler's __builtin_cpu_supports is not used: it reads a table that
// another linker's runtime library may leave empty, so that the library would
// run its slowest code.
bool HasAvx2() {
  return HasAll(SavedRegisters(), Bits({1, 2})) &&       // XMM, YMM
         HasAll(CpuId(1, 0).ecx, Bits({12, 28, 29})) &&  // FMA, AVX, F16C
         HasAll(CpuId(7, 0).ebx, Bits({5}));             // AVX2
}

bool HasAvx512() {
  return HasAvx2() &&
         HasAll(SavedRegisters(), Bits({5, 6, 7})) &&      // masks, ZMM
         HasAll(CpuId(7, 0).ebx, Bits({16, 17, 30, 31}));  // F, DQ, BW, VL
}

bool IsIntel() {
  const CpuId vendor(0, 0);
  return vendor.ebx == signature_INTEL_ebx &&
         vendor.ecx == signature_INTEL_ecx && vendor.edx == signature_INTEL_edx;
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
  return HasAll(CpuId(7, 1).eax, Bits({5}));
#else
  return false;
#endif
}

// Intel's dot products of bfloat16 take twice the time of as many vectors of
// float32. With them the operator takes 1.5 times as long as with products of
// float32, so they are used only if they are asked for by name.
bool Avx512BF16Pays() {
#if defined(__x86_64__)
  return Allowed() == kAvx512BF16 || !IsIntel();
#else
  return false;
#endif
}

// The system saves the registers of AMX only for a process that asked for it.
bool MayUseAmx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return HasAll(CpuId(7, 0).edx, Bits({22, 24})) &&  // AMX-BF16, AMX-TILE
         MayUseAvx512BF16() &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa Choose() {
#if defined(__x86_64__)
  if (Allowed() >= static_cast<int>(Isa::kAvx512) && HasAvx512()) {
    return Isa::kAvx512;
  }
  if (Allowed() >= static_cast<int>(Isa::kAvx2) && HasAvx2()) {
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

// The instruction set in use. SPDX-License-Identifier: Apache-2.0

#include "cc/core/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
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

Isa Choose() {
#if defined(__x86_64__)
  const char* allowed = std::getenv("TF_DEFORM_MAX_ISA");
  const bool any = allowed == nullptr || std::strcmp(allowed, "avx512") == 0;
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

const char* InstructionSet() {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
  return kNames[static_cast<int>(BestIsa())];
}

}  // namespace cpu
}  // namespace tf_deform

extern "C" __attribute__((visibility("default"))) const char*
TfDeformInstructionSet() {
  return tf_deform::cpu::InstructionSet();
}

// SPDX-License-Identifier: Apache-2.0
// The instruction set in use, and the cache.

#ifndef TF_DEFORM_CC_CORE_CPU_ISA_H_
#define TF_DEFORM_CC_CORE_CPU_ISA_H_

#include <cstdint>

namespace tf_deform {
namespace cpu {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best that the processor has, or what the environment variable
// TF_DEFORM_MAX_ISA ("amx", "avx512_bf16", "avx512", "avx2" or "baseline")
// allows; read once.
Isa BestIsa();

// Whether, besides kAvx512, products of bfloat16 are made in bfloat16: by AMX,
// or by AVX-512 BF16 on processors other than Intel's, where those are slower
// than float32's, or if TF_DEFORM_MAX_ISA is "avx512_bf16".
bool HasBFloat16Products();

// Whether they may be left to AMX.
bool HasAmx();

// "baseline", "avx2", "avx512", or "avx512_bf16" or "amx" if that is used too.
const char* InstructionSet();

// Bytes of a processor's second-level cache; 1 MiB where that is not known.
int64_t SecondLevelCache();

}  // namespace cpu
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CPU_ISA_H_

// SPDX-License-Identifier: Apache-2.0
// Finds the instruction set to use, and the size of the cache.

#ifndef TF_DEFORM_CC_CORE_CPU_ISA_H_
#define TF_DEFORM_CC_CORE_CPU_ISA_H_

#include <cstdint>

namespace tf_deform {
namespace cpu {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// Returns the best instruction set that the processor has and that the
// environment variable TF_DEFORM_MAX_ISA ("amx", "avx512_bf16", "avx512",
// "avx2" or "baseline") allows. The variable is read once.
Isa BestIsa();

// Returns whether products of bfloat16 are made in bfloat16, with kAvx512: by
// AMX, or by AVX-512 BF16. Intel's AVX-512 BF16 is slower than float32 and used
// only if TF_DEFORM_MAX_ISA is "avx512_bf16".
bool HasBFloat16Products();

// Returns whether AMX makes the products of bfloat16.
bool HasAmx();

// Returns "baseline", "avx2" or "avx512"; "avx512_bf16" or "amx" where these
// are used, too.
const char* InstructionSet();

// Returns the bytes of a processor's second-level cache; 1 MiB if not known.
int64_t SecondLevelCache();

}  // namespace cpu
}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_CPU_ISA_H_

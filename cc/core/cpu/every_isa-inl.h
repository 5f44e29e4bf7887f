// SPDX-License-Identifier: Apache-2.0
// Compiles TF_DEFORM_SOURCE once for every instruction set.
//
// An operator's cpu/*.cc defines TF_DEFORM_SOURCE as the name of its *-inl.h
// and includes this file, once. The functions there are then in the namespaces
// baseline, avx2 and avx512, and TF_DEFORM_BEST(Function) is the function for
// this processor.

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cc/core/common.h"
#include "cc/core/cpu/isa.h"
#include "cc/core/team.h"

#if defined(__x86_64__)
#ifdef __clang__
#include <immintrin.h>
#else
// GCC 12 takes the undefined operand of an unmasked intrinsic for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#define TF_DEFORM_X86 1
#endif

namespace tf_deform {
namespace cpu {
namespace {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Sets the default floating-point mode (denormals on, round to nearest) for as
// long as the object lives.
class ScopedFloatingPointMode {
 public:
#ifdef TF_DEFORM_X86
  ScopedFloatingPointMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~ScopedFloatingPointMode() { _mm_setcsr(saved_); }

 private:
  const unsigned int saved_;
#else
  ScopedFloatingPointMode() {}
#endif
};

}  // namespace
}  // namespace cpu
}  // namespace tf_deform

#define TF_DEFORM_ISA baseline
#define TF_DEFORM_VECTOR_BYTES 16
#include TF_DEFORM_SOURCE
#undef TF_DEFORM_ISA
#undef TF_DEFORM_VECTOR_BYTES

#ifdef TF_DEFORM_X86
#define TF_DEFORM_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define TF_DEFORM_PUSH_TARGET(features)                                    \
  TF_DEFORM_PRAGMA(clang attribute push(__attribute__((target(features))), \
                                        apply_to = function))
#define TF_DEFORM_POP_TARGET TF_DEFORM_PRAGMA(clang attribute pop)
#else
#define TF_DEFORM_PUSH_TARGET(features) \
  TF_DEFORM_PRAGMA(GCC push_options) TF_DEFORM_PRAGMA(GCC target(features))
#define TF_DEFORM_POP_TARGET TF_DEFORM_PRAGMA(GCC pop_options)
#endif

TF_DEFORM_PUSH_TARGET("avx2,fma,f16c")
#define TF_DEFORM_ISA avx2
#define TF_DEFORM_VECTOR_BYTES 32
#include TF_DEFORM_SOURCE
#undef TF_DEFORM_ISA
#undef TF_DEFORM_VECTOR_BYTES
TF_DEFORM_POP_TARGET

TF_DEFORM_PUSH_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define TF_DEFORM_ISA avx512
#define TF_DEFORM_VECTOR_BYTES 64
#include TF_DEFORM_SOURCE
#undef TF_DEFORM_ISA
#undef TF_DEFORM_VECTOR_BYTES
TF_DEFORM_POP_TARGET

#define TF_DEFORM_BEST(Function)                \
  (BestIsa() == Isa::kAvx512 ? avx512::Function \
   : BestIsa() == Isa::kAvx2 ? avx2::Function   \
                             : baseline::Function)
#else
#define TF_DEFORM_BEST(Function) (baseline::Function)
#endif  // TF_DEFORM_X86

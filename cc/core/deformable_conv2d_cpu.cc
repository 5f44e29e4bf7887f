// Deformable convolution on the CPU: one source for every instruction set, and
// the choice among them at run time. SPDX-License-Identifier: Apache-2.0

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cc/core/deformable_conv2d.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
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

// The default floating-point mode (denormals on, round to nearest) for as long
// as it lives.
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
#include "cc/core/deformable_conv2d_cpu-inl.h"
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
#include "cc/core/deformable_conv2d_cpu-inl.h"
#undef TF_DEFORM_ISA
#undef TF_DEFORM_VECTOR_BYTES
TF_DEFORM_POP_TARGET

TF_DEFORM_PUSH_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define TF_DEFORM_ISA avx512
#define TF_DEFORM_VECTOR_BYTES 64
#include "cc/core/deformable_conv2d_cpu-inl.h"
#undef TF_DEFORM_ISA
#undef TF_DEFORM_VECTOR_BYTES
TF_DEFORM_POP_TARGET
#endif  // TF_DEFORM_X86

namespace tf_deform {
namespace cpu {
namespace {

struct Implementation {
  const char* name;
  decltype(&baseline::WorkspaceBytes) workspace_bytes;
  decltype(&baseline::BackwardWorkspaceBytes) backward_workspace_bytes;
  decltype(&baseline::Forward) forward;
  decltype(&baseline::Backward) backward;
};

#define TF_DEFORM_IMPLEMENTATION(isa)                                        \
  Implementation {                                                           \
    #isa, &isa::WorkspaceBytes, &isa::BackwardWorkspaceBytes, &isa::Forward, \
        &isa::Backward                                                       \
  }

Implementation Choose() {
#ifdef TF_DEFORM_X86
  const char* allowed = std::getenv("TF_DEFORM_MAX_ISA");
  const bool any = allowed == nullptr || std::strcmp(allowed, "avx512") == 0;
  if (any && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return TF_DEFORM_IMPLEMENTATION(avx512);
  }
  if ((any || std::strcmp(allowed, "avx2") == 0) &&
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return TF_DEFORM_IMPLEMENTATION(avx2);
  }
#endif
  return TF_DEFORM_IMPLEMENTATION(baseline);
}

const Implementation& Chosen() {
  static const Implementation chosen = Choose();
  return chosen;
}

Status CheckCall(const DeformableConv2DParams& params, DataType type) {
  if (type < DataType::kFloat16 || type > DataType::kFloat64) {
    return InvalidArgument(
        "Expected the data type to be 0 (float16), 1 (bfloat16), 2 (float32) "
        "or 3 (float64). Received: %d",
        static_cast<int>(type));
  }
  if (params.batch < 0 || params.out_h < 0 || params.out_w < 0 ||
      params.groups < 1) {
    return InvalidArgument(
        "Expected parameters that Validate completed from known shapes. "
        "Received: unknown sizes");
  }
  return Status();
}

}  // namespace

int64_t WorkspaceBytes(const DeformableConv2DParams& params, DataType type,
                       int num_workers) {
  return Chosen().workspace_bytes(params, type, num_workers);
}

int64_t BackwardWorkspaceBytes(const DeformableConv2DParams& params,
                               DataType type,
                               const DeformableConv2DGradients& wanted,
                               int num_workers) {
  return Chosen().backward_workspace_bytes(params, type, wanted, num_workers);
}

Status Forward(const DeformableConv2DParams& params, DataType type,
               const DeformableConv2DInputs& operands, void* workspace,
               void* output, const ParallelFor& parallel_for) {
  TF_DEFORM_RETURN_IF_ERROR(CheckCall(params, type));
  Chosen().forward(params, type, operands, workspace, output, parallel_for);
  return Status();
}

Status Backward(const DeformableConv2DParams& params, DataType type,
                const DeformableConv2DInputs& operands, const void* grad_output,
                void* workspace, const DeformableConv2DGradients& gradients,
                const ParallelFor& parallel_for) {
  TF_DEFORM_RETURN_IF_ERROR(CheckCall(params, type));
  Chosen().backward(params, type, operands, grad_output, workspace, gradients,
                    parallel_for);
  return Status();
}

const char* InstructionSet() { return Chosen().name; }

}  // namespace cpu
}  // namespace tf_deform

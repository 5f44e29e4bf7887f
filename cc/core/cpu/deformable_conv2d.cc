// SPDX-License-Identifier: Apache-2.0
// Compiles deformable convolution for every instruction set of the CPU, and
// chooses among the sets at run time.

#include "cc/core/deformable_conv2d.h"

#define TF_DEFORM_SOURCE "cc/core/cpu/deformable_conv2d-inl.h"
#include "cc/core/cpu/entry_points.h"
#include "cc/core/cpu/every_isa-inl.h"

namespace tf_deform {
namespace cpu {

TF_DEFORM_CPU_ENTRY_POINTS(DeformableConv2D)

int64_t PackedBytes(const DeformableConv2DParams& params, DataType type) {
  return TF_DEFORM_BEST(PackedBytes)(params, type);
}

int64_t BackwardPackedBytes(const DeformableConv2DParams& params, DataType type,
                            const DeformableConv2DGradients& wanted) {
  return TF_DEFORM_BEST(BackwardPackedBytes)(params, type, wanted);
}

}  // namespace cpu
}  // namespace tf_deform

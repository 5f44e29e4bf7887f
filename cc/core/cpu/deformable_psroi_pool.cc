// SPDX-License-Identifier: Apache-2.0
// Compiles deformable position-sensitive ROI pooling for every instruction set
// of the CPU, and chooses among the sets at run time.

#include "cc/core/deformable_psroi_pool.h"

#define TF_DEFORM_SOURCE "cc/core/cpu/deformable_psroi_pool-inl.h"
#include "cc/core/cpu/entry_points.h"
#include "cc/core/cpu/every_isa-inl.h"

namespace tf_deform {
namespace cpu {

TF_DEFORM_CPU_ENTRY_POINTS(DeformablePSROIPool, count)

}  // namespace cpu
}  // namespace tf_deform

// SPDX-License-Identifier: Apache-2.0
// The marker inside XLA, which does not prune it.

#include "cc/tf/marker_op.h"
#include "cc/xla/glue.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace tf_deform {
namespace {

const XlaRegistrar marker(kMarker,
                          [](tensorflow::OpKernelConstruction* construction)
                              -> tensorflow::OpKernel* {
                            return new MarkerKernel(construction);
                          });

}  // namespace
}  // namespace tf_deform

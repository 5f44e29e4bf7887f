// SPDX-License-Identifier: Apache-2.0
// Runs a ParallelFor on plain threads, for callers without a thread pool.

#ifndef TF_DEFORM_CC_CORE_THREADS_H_
#define TF_DEFORM_CC_CORE_THREADS_H_

#include "cc/core/common.h"

namespace tf_deform {

// Returns a ParallelFor that starts num_threads - 1 threads for every loop and
// joins them at its end.
ParallelFor Threads(int num_threads);

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_THREADS_H_

// SPDX-License-Identifier: Apache-2.0
// Keeps the caller's threads together for several loops.

#ifndef TF_DEFORM_CC_CORE_TEAM_H_
#define TF_DEFORM_CC_CORE_TEAM_H_

#include "cc/core/common.h"

namespace tf_deform {

// Calls body(argument, parallel_for) on one of the threads of `threads`, while
// others wait for the loops of that parallel_for. A pass of an op consists of
// up to ten loops. If each began and ended on the caller's threads, each would
// wait for sleeping threads to wake, some 50 microseconds on two processors.
//
// Helpers that come late join the loop at hand, and no loop waits for a helper
// that has not begun, so threads that the caller is short of are not missed. At
// most `most` threads are kept, so that others stay free for other work: as
// many as the longest loop has tasks.
void RunTeam(const ParallelFor& threads, int64_t most,
             void (*body)(void* argument, const ParallelFor& parallel_for),
             void* argument);

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_TEAM_H_

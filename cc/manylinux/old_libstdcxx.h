// SPDX-License-Identifier: Apache-2.0
// Keeps objects of a new compiler from needing a new C++ library or C library.
// `make wheel` includes it first in every C++ file.

#ifndef TF_DEFORM_CC_MANYLINUX_OLD_LIBSTDCXX_H_
#define TF_DEFORM_CC_MANYLINUX_OLD_LIBSTDCXX_H_

#ifdef __cplusplus
#include <cstddef>  // defines the macro below

// Waits with pthread_cond_timedwait: pthread_cond_clockwait is of glibc 2.30.
#undef _GLIBCXX_USE_PTHREAD_COND_CLOCKWAIT

// GCC 12's library has a second version of this function, which old libraries
// lack. The first version does the same.
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE, "
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
#endif

#endif  // TF_DEFORM_CC_MANYLINUX_OLD_LIBSTDCXX_H_

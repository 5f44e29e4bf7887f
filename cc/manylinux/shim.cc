// SPDX-License-Identifier: Apache-2.0
// Defines, for one library alone, what old C and C++ libraries lack.

#include <new>

#define TF_DEFORM_HIDDEN __attribute__((visibility("hidden")))

namespace std {

// Headers since GCC 12 call it where an array would be too large.
TF_DEFORM_HIDDEN void __throw_bad_array_new_length() {
  throw bad_array_new_length();
}

}  // namespace std

// Since glibc 2.32 it tells that no other thread runs. It is only a hint.
TF_DEFORM_HIDDEN char __libc_single_threaded = 0;

// SPDX-License-Identifier: Apache-2.0
// Decides which copy of the library registers the ops of a process.
//
// A process may come to load the library twice, as a part of the Python package
// and as a file beside a SavedModel, and TensorFlow ends a process that
// registers an op's kernels again. So the first copy registers everything.
// Another copy of the same version registers nothing; loading a copy of another
// version is an error that names both files.

#ifndef TF_DEFORM_CC_TF_LIBRARY_H_
#define TF_DEFORM_CC_TF_LIBRARY_H_

namespace tf_deform {

// The version of the package, as in setup.py.
constexpr char kVersion[] = "0.1.0";

// Tells whether this copy is the first, which registers ops and kernels.
bool RegistersOps();

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_LIBRARY_H_

// SPDX-License-Identifier: Apache-2.0
// One library for a process: which of its copies registers the ops.
//
// A process may come to load the library twice, as a part of the Python package
// and as a file beside a SavedModel, and TensorFlow ends a process that
// registers an op's kernels again. So the first copy registers everything. A
// copy of the same version leaves it at that; loading one of another version is
// an error, which names both files.

#ifndef TF_DEFORM_CC_TF_LIBRARY_H_
#define TF_DEFORM_CC_TF_LIBRARY_H_

namespace tf_deform {

// The version of the package, as in setup.py.
constexpr char kVersion[] = "0.1.0";

// Tells whether this copy is the first, which registers ops and kernels.
bool RegistersOps();

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_LIBRARY_H_

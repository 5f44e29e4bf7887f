// SPDX-License-Identifier: Apache-2.0
// Checks regions of interest for all pooling operators.
//
// `rois` is (num_rois, 5): batch_index, x1, y1, x2, y2, in image pixels, of the
// coordinate type. A negative batch index marks a padding ROI.

#ifndef TF_DEFORM_CC_CORE_ROIS_H_
#define TF_DEFORM_CC_CORE_ROIS_H_

#include "cc/core/common.h"

namespace tf_deform {

// Checks the shape of `rois`.
Status CheckRoisShape(const Shape& rois);

// Checks the shape of displacements, (num_rois, rows, columns, channels).
// `name` is the operand's name; `rows_name` names the attribute that gives rows
// and columns.
Status CheckDisplacementShape(const Shape& shape, const char* name,
                              const char* rows_name, int64_t num_rois,
                              int64_t rows, int64_t columns);

// The smallest factor except 0 is the smallest normal number of float32.
constexpr double kLeastFactor = 0x1p-126;

// Checks a factor: it must be finite, and at least kLeastFactor or, with
// zero_allowed, 0.
Status CheckFactor(double value, bool zero_allowed, const char* name);

// Checks that batch indices are integers below `batch`; negative indices mark
// padding. `rois` holds doubles if `type` is kFloat64, else floats.
Status CheckBatchIndices(const void* rois, DataType type, int64_t num_rois,
                         int64_t batch);

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_ROIS_H_

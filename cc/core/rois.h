// SPDX-License-Identifier: Apache-2.0
// Judgements of regions of interest that pooling operators have in common.
//
// `rois` is (num_rois, 5): batch_index, x1, y1, x2, y2, in image pixels, of the
// coordinate type. A negative batch index marks a padding ROI.

#ifndef TF_DEFORM_CC_CORE_ROIS_H_
#define TF_DEFORM_CC_CORE_ROIS_H_

#include "cc/core/common.h"

namespace tf_deform {

// The shape of `rois`.
Status CheckRoisShape(const Shape& rois);

// The shape of displacements, (num_rois, rows, columns, channels); `name` is
// the operand's, and so in `rows_name`.
Status CheckDisplacementShape(const Shape& shape, const char* name,
                              const char* rows_name, int64_t num_rois,
                              int64_t rows, int64_t columns);

// The smallest factor but 0: that of float32's normal numbers.
constexpr double kLeastFactor = 0x1p-126;

// A factor: finite, and at least kLeastFactor or, with zero_allowed, 0.
Status CheckFactor(double value, bool zero_allowed, const char* name);

// The batch indices are integers below `batch`; negative ones mark padding.
// `rois` holds doubles if `type` is kFloat64, else floats.
Status CheckBatchIndices(const void* rois, DataType type, int64_t num_rois,
                         int64_t batch);

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_ROIS_H_

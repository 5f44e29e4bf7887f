// SPDX-License-Identifier: Apache-2.0
// Checks regions of interest for all pooling operators.

#include "cc/core/rois.h"

#include <cmath>

#include "cc/core/checks.h"

namespace tf_deform {
namespace {

template <typename E>
Status CheckIndices(const E* rois, int64_t num_rois, int64_t batch) {
  for (int64_t r = 0; r < num_rois; ++r) {
    const E index = rois[5 * r];
    // The comparison is written so that NaN does not pass.
    if (index < static_cast<E>(batch) && index == std::floor(index)) continue;
    return InvalidArgument(
        "Expected the batch indices in `rois` to be integers below %lld, "
        "negative for padding. Received: rois[%lld, 0]=%g",
        static_cast<LongLong>(batch), static_cast<LongLong>(r),
        static_cast<double>(index));
  }
  return Status();
}

}  // namespace

Status CheckRoisShape(const Shape& rois) {
  TF_DEFORM_RETURN_IF_ERROR(
      CheckRank(rois, 2, "rois", "num_rois, 5: batch_index, x1, y1, x2, y2"));
  return CheckDimension(rois, 1, 5, "rois", "a last dimension of",
                        "batch_index, x1, y1, x2, y2");
}

Status CheckDisplacementShape(const Shape& shape, const char* name,
                              const char* rows_name, int64_t num_rois,
                              int64_t rows, int64_t columns) {
  TF_DEFORM_RETURN_IF_ERROR(CheckDimension(
      shape, 0, num_rois, name, "a first dimension of", "the number of ROIs"));
  TF_DEFORM_RETURN_IF_ERROR(
      CheckDimension(shape, 1, rows, name, "height", rows_name));
  return CheckDimension(shape, 2, columns, name, "width", rows_name);
}

Status CheckFactor(double value, bool zero_allowed, const char* name) {
  // Refuses float32 numbers below the normal numbers, as they are 0 on some
  // threads of a program and not on others.
  if (std::isfinite(value) &&
      (value >= kLeastFactor || (zero_allowed && value == 0))) {
    return Status();
  }
  return InvalidArgument(
      "Expected `%s` to be a finite number of at least 2**-126%s. Received: %g",
      name, zero_allowed ? ", or 0" : "", value);
}

Status CheckBatchIndices(const void* rois, DataType type, int64_t num_rois,
                         int64_t batch) {
  if (type == DataType::kFloat64) {
    return CheckIndices(static_cast<const double*>(rois), num_rois, batch);
  }
  return CheckIndices(static_cast<const float*>(rois), num_rois, batch);
}

}  // namespace tf_deform

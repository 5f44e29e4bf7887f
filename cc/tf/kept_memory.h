// SPDX-License-Identifier: Apache-2.0
// Keeps memory of a TensorFlow kernel from call to call.

#ifndef TF_DEFORM_CC_TF_KEPT_MEMORY_H_
#define TF_DEFORM_CC_TF_KEPT_MEMORY_H_

#include <cstdint>
#include <mutex>
#include <utility>

#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/tensor.h"

namespace tf_deform {

// Holds memory of the latest call. The system clears the pages of fresh memory
// when they are first written, which takes as long as packing a kernel into
// them. One call at a time has the memory; a call at the same moment allocates
// its own.
class KeptMemory {
 public:
  // Gives `bytes` bytes, which the caller returns after use, or may lose.
  tensorflow::Status Take(tensorflow::OpKernelContext* context, int64_t bytes,
                          tensorflow::Tensor* memory) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      *memory = std::move(kept_);
      kept_ = tensorflow::Tensor();
    }
    if (memory->NumElements() == bytes) return tensorflow::Status();
    *memory = tensorflow::Tensor();  // frees before it allocates
    return context->allocate_temp(tensorflow::DT_INT8, {bytes}, memory);
  }

  void Return(tensorflow::Tensor memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_ = std::move(memory);
  }

 private:
  std::mutex mutex_;
  tensorflow::Tensor kept_;
};

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_KEPT_MEMORY_H_

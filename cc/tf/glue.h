// SPDX-License-Identifier: Apache-2.0
// Converts TensorFlow's shapes, threads and streams to the core's.

#ifndef TF_DEFORM_CC_TF_GLUE_H_
#define TF_DEFORM_CC_TF_GLUE_H_

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>

#include "cc/core/common.h"
#include "cc/tf/loop.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "tensorflow/core/platform/stream_executor.h"
#include "tensorflow/core/platform/tensor_float_32_utils.h"
#include "tensorflow/core/util/determinism.h"

namespace tf_deform {

// Returns a shape for the core; rank and dimensions that the graph does not
// know are unknown.
inline Shape ToShape(const tensorflow::TensorShape& shape) {
  Shape result;
  result.rank = shape.dims();
  for (int i = 0; i < std::min(result.rank, Shape::kMaxRank); ++i) {
    result.dims[i] = shape.dim_size(i);
  }
  return result;
}

inline Shape ToShape(tensorflow::shape_inference::InferenceContext* context,
                     tensorflow::shape_inference::ShapeHandle shape) {
  Shape result;
  if (!context->RankKnown(shape)) return result;
  result.rank = context->Rank(shape);
  for (int i = 0; i < std::min(result.rank, Shape::kMaxRank); ++i) {
    const auto dim = context->Dim(shape, i);
    result.dims[i] = context->ValueKnown(dim) ? context->Value(dim) : -1;
  }
  return result;
}

// The time for which the caller leaves a loop to the pool before the caller
// takes tasks itself.
constexpr std::chrono::milliseconds kPatience(20);

// Runs a loop on the pool's threads while the caller sleeps. A caller that
// works keeps the processor on which it has just woken a thread, and the system
// may leave that thread in the processor's queue until the next tick, while
// other processors are idle (virtual machines do so in a quarter of all calls).
// But the loop never depends on the pool. If the caller is a thread of the
// pool, no other thread might be free, so the caller works at once; any other
// caller takes the place of a late worker. The caller waits for tasks, not for
// workers.
inline void RunOnPool(void* context, int64_t num_tasks, ParallelFor::Task task,
                      void* argument) {
  auto* pool = static_cast<tensorflow::thread::ThreadPool*>(context);
  const auto loop =
      std::make_shared<Loop>(pool->NumThreads(), num_tasks, task, argument);
  const bool works = pool->CurrentThreadId() >= 0;
  for (int helper = works ? 1 : 0; helper < loop->num_workers(); ++helper) {
    pool->Schedule([loop] { loop->Work(); });
  }
  if (!works && loop->WaitFor(kPatience)) return;
  loop->Work();
  loop->Wait();
}

// Returns the executor that TensorFlow gives a kernel, valid while `context`
// is: as a ParallelFor the threads of CPU kernels, as a CudaStream the stream
// of GPU kernels and the program's settings for it. Kernels are templates over
// the executor: all else is the same on both devices.
template <typename Executor>
Executor GetExecutor(tensorflow::OpKernelContext* context);

template <>
inline ParallelFor GetExecutor(tensorflow::OpKernelContext* context) {
  auto* pool = context->device()->tensorflow_cpu_worker_threads()->workers;
  ParallelFor parallel_for;
  parallel_for.num_workers = std::max(1, pool->NumThreads());
  parallel_for.context = pool;
  parallel_for.run = parallel_for.num_workers > 1 ? RunOnPool : nullptr;
  return parallel_for;
}

template <>
inline CudaStream GetExecutor(tensorflow::OpKernelContext* context) {
  CudaStream stream;
  stream.stream =
      context->op_device_context()->stream()->platform_specific_handle().stream;
  stream.allow_tf32 = tensorflow::tensor_float_32_execution_enabled();
  stream.deterministic = tensorflow::OpDeterminismRequired();
  return stream;
}

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_GLUE_H_

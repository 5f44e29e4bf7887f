// SPDX-License-Identifier: Apache-2.0
// What every op's TensorFlow glue shares.

#include "cc/tf/glue.h"

#include <chrono>
#include <memory>

#include "cc/tf/loop.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/lib/core/threadpool.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/stream_executor.h"
#include "tensorflow/core/platform/tensor_float_32_utils.h"
#include "tensorflow/core/util/determinism.h"

namespace tf_deform {
namespace {

// How long the caller leaves a loop to the pool before it lends a hand.
constexpr std::chrono::milliseconds kPatience(20);

// The pool's threads do the work and the caller sleeps: a caller that works
// keeps the processor on which it has just woken a thread, and a system may
// leave that thread behind it in the queue until its next tick, while other
// processors are idle (virtual machines do so in a quarter of all calls).
// But the loop never depends on the pool: a thread of the pool itself, for
// which nobody else might be left, works at once, and any other caller takes
// the place of a worker that is late. It waits for tasks, not for workers.
void RunOnPool(void* context, int64_t num_tasks, ParallelFor::Task task,
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

}  // namespace

tensorflow::Status ToTensorFlow(const Status& status) {
  switch (status.code) {
    case Status::kOk:
      return tensorflow::Status();
    case Status::kInvalidArgument:
      return tensorflow::errors::InvalidArgument(status.message);
    case Status::kUnimplemented:
      return tensorflow::errors::Unimplemented(status.message);
    case Status::kInternal:
      break;
  }
  return tensorflow::errors::Internal(status.message);
}

Shape ToShape(const tensorflow::TensorShape& shape) {
  Shape result;
  result.rank = shape.dims();
  for (int i = 0; i < std::min(result.rank, Shape::kMaxRank); ++i) {
    result.dims[i] = shape.dim_size(i);
  }
  return result;
}

Shape ToShape(tensorflow::shape_inference::InferenceContext* context,
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

template <>
ParallelFor GetExecutor(tensorflow::OpKernelContext* context) {
  auto* pool = context->device()->tensorflow_cpu_worker_threads()->workers;
  ParallelFor parallel_for;
  parallel_for.num_workers = std::max(1, pool->NumThreads());
  parallel_for.context = pool;
  parallel_for.run = parallel_for.num_workers > 1 ? RunOnPool : nullptr;
  return parallel_for;
}

template <>
CudaStream GetExecutor(tensorflow::OpKernelContext* context) {
  CudaStream stream;
  stream.stream =
      context->op_device_context()->stream()->platform_specific_handle().stream;
  stream.allow_tf32 = tensorflow::tensor_float_32_execution_enabled();
  stream.deterministic = tensorflow::OpDeterminismRequired();
  return stream;
}

DataType ToDataType(tensorflow::DataType type) {
  switch (type) {
    case tensorflow::DT_HALF:
      return DataType::kFloat16;
    case tensorflow::DT_BFLOAT16:
      return DataType::kBFloat16;
    case tensorflow::DT_DOUBLE:
      return DataType::kFloat64;
    default:
      return DataType::kFloat32;
  }
}

tensorflow::Status AllocateWorkspace(tensorflow::OpKernelContext* context,
                                     int64_t bytes, tensorflow::Tensor* memory,
                                     void** workspace) {
  const tensorflow::Status status =
      context->allocate_temp(tensorflow::DT_INT8, {bytes}, memory);
  if (status.ok()) *workspace = memory->data();
  return status;
}

tensorflow::shape_inference::DimensionHandle OutputDim(
    tensorflow::shape_inference::InferenceContext* context, int64_t size,
    tensorflow::shape_inference::ShapeHandle operand, int axis) {
  if (size >= 0) return context->MakeDim(size);
  if (context->RankKnown(operand)) return context->Dim(operand, axis);
  return context->UnknownDim();
}

tensorflow::Status CheckWanted(const std::vector<bool>& wanted,
                               int num_outputs) {
  if (static_cast<int>(wanted.size()) == num_outputs) {
    return tensorflow::Status();
  }
  return tensorflow::errors::InvalidArgument(
      "Expected `wanted` to have an entry for each of the ", num_outputs,
      " operands. Received: ", wanted.size());
}

tensorflow::Status AllocateGradient(tensorflow::OpKernelContext* context,
                                    int output, int input, bool wanted,
                                    void** target,
                                    std::atomic<int64_t>* computed) {
  tensorflow::Tensor* gradient;
  if (!wanted) return context->allocate_output(output, {0}, &gradient);
  if (!context->output_required(output)) return tensorflow::Status();
  TF_RETURN_IF_ERROR(context->allocate_output(
      output, context->input(input).shape(), &gradient));
  if (gradient->NumElements() == 0) return tensorflow::Status();
  *target = gradient->data();
  computed->fetch_add(1, std::memory_order_relaxed);
  return tensorflow::Status();
}

}  // namespace tf_deform

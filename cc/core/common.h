// SPDX-License-Identifier: Apache-2.0
// Defines status, element types, shapes and the caller's threads for all
// operators of the core.

#ifndef TF_DEFORM_CC_CORE_COMMON_H_
#define TF_DEFORM_CC_CORE_COMMON_H_

#include <cstdint>
#include <type_traits>

// Exports a function of the core to the libraries that are linked to it.
#define TF_DEFORM_API __attribute__((visibility("default")))

namespace tf_deform {

// Tells the outcome of a call. The core never throws, prints or exits: the
// caller decides what to do about an error.
struct Status {
  // The numbers are part of the C interface.
  enum Code : int { kOk = 0, kInvalidArgument = 1, kInternal = 3 };

  Code code = kOk;
  char message[512] = "";

  bool ok() const { return code == kOk; }
};

// Returns a status of that code with a message from a printf format.
TF_DEFORM_API Status InvalidArgument(const char* format, ...)
    __attribute__((format(printf, 1, 2)));
TF_DEFORM_API Status Internal(const char* format, ...)
    __attribute__((format(printf, 1, 2)));

#define TF_DEFORM_RETURN_IF_ERROR(expression)                \
  do {                                                       \
    const ::tf_deform::Status status_of_call = (expression); \
    if (!status_of_call.ok()) return status_of_call;         \
  } while (false)

// Names the element type of inputs, kernel and output. Coordinates (offset,
// mask, rois) are kFloat64 if the element type is kFloat64, else kFloat32. The
// numbers are part of the C interface.
enum class DataType : int {
  kFloat16 = 0,
  kBFloat16 = 1,
  kFloat32 = 2,
  kFloat64 = 3
};

// Holds a tensor's shape, outermost dimension first; -1 stands for an unknown
// rank or dimension (graphs are checked before all sizes are known).
struct Shape {
  static constexpr int kMaxRank = 8;

  int rank = -1;
  int64_t dims[kMaxRank] = {};  // only the first kMaxRank dimensions are kept

  int64_t dim(int axis) const { return rank < 0 ? -1 : dims[axis]; }
};

// Prints the shape as Python prints a tuple, unknown dimensions as None.
struct ShapeText {
  TF_DEFORM_API explicit ShapeText(const Shape& shape);
  char text[160];
};

// Runs tasks on the caller's threads. `run` calls task(argument, index, worker)
// once for every index in [0, num_tasks), begins tasks in the order of their
// indices, and returns when all tasks are done. `worker` is in
// [0, num_workers); two calls that overlap in time have different workers, so a
// worker's scratch memory needs no lock.
struct ParallelFor {
  using Task = void (*)(void* argument, int64_t index, int worker);

  int num_workers = 1;
  void* context = nullptr;
  void (*run)(void* context, int64_t num_tasks, Task task,
              void* argument) = nullptr;  // null: run here, as worker 0

  // `body` is any callable with (int64_t index, int worker).
  template <typename Body>
  void operator()(int64_t num_tasks, Body&& body) const {
    if (run == nullptr || num_tasks <= 1) {
      for (int64_t index = 0; index < num_tasks; ++index) body(index, 0);
      return;
    }
    run(
        context, num_tasks,
        [](void* argument, int64_t index, int worker) {
          (*static_cast<std::remove_reference_t<Body>*>(argument))(index,
                                                                   worker);
        },
        &body);
  }
};

// Holds the caller's stream on a GPU, and the arithmetic that the caller
// allows. All pointers of a call then point to memory of the device, all work
// is queued on the stream, and no function waits for it.
struct CudaStream {
  void* stream = nullptr;      // a cudaStream_t of the current device
  bool allow_tf32 = false;     // float32 operands of products may be rounded
  bool deterministic = false;  // the same bits in every run
};

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_CORE_COMMON_H_

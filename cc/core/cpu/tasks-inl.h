// SPDX-License-Identifier: Apache-2.0
// Defines scratch, tasks and element types for the passes of every operator.
//
// The file has no include guard: see simd-inl.h.

namespace tf_deform {
namespace cpu {
namespace TF_DEFORM_ISA {

// Bytes of scratch that a worker may use, besides repacked operands and wide
// sums.
constexpr int64_t kScratchBytes = int64_t{4} << 20;

// Hands out parts of a workspace; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <typename E>
  E* Take(int64_t count) {
    E* part = base == nullptr ? nullptr : reinterpret_cast<E*>(base + used);
    used += RoundUp(count * static_cast<int64_t>(sizeof(E)), 64);
    return part;
  }
};

// Runs parallel_for with denormals on in every task: threads of a pool differ
// in their mode from the threads that call them, and results must not depend on
// the thread that ran a task.
template <typename Body>
static void RunTasks(const ParallelFor& parallel_for, int64_t num_tasks,
                     const Body& body) {
  parallel_for(num_tasks, [&body](int64_t index, int worker) {
    const ScopedFloatingPointMode mode;
    body(index, worker);
  });
}

// Calls body(parallel_for) with at most `most` of the threads as a team, whose
// loops need not wait for sleeping threads; see team.h.
template <typename Body>
static void AsTeam(const ParallelFor& threads, int64_t most, const Body& body) {
  RunTeam(
      threads, most,
      [](void* argument, const ParallelFor& parallel_for) {
        (*static_cast<const Body*>(argument))(parallel_for);
      },
      const_cast<Body*>(&body));
}

// Writes zeros.
static void Zero(const ParallelFor& parallel_for, void* to, int64_t bytes) {
  constexpr int64_t kPart = 1 << 20;
  RunTasks(parallel_for, CeilDiv(bytes, kPart), [=](int64_t part, int) {
    __builtin_memset(static_cast<char*>(to) + part * kPart, 0,
                     static_cast<size_t>(Min(kPart, bytes - part * kPart)));
  });
}

// Calls body(T()) for the C++ type of `type`.
template <typename Body>
static void WithType(DataType type, const Body& body) {
  switch (type) {
    case DataType::kFloat16:
      return body(Float16());
    case DataType::kBFloat16:
      return body(BFloat16());
    case DataType::kFloat32:
      return body(float());
    case DataType::kFloat64:
      return body(double());
  }
}

}  // namespace TF_DEFORM_ISA
}  // namespace cpu
}  // namespace tf_deform

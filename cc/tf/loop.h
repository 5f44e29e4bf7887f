// SPDX-License-Identifier: Apache-2.0
// Runs a loop over tasks on several threads of a pool.

#ifndef TF_DEFORM_CC_TF_LOOP_H_
#define TF_DEFORM_CC_TF_LOOP_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "cc/core/common.h"

namespace tf_deform {

// One loop handed out to a pool. Its workers share it. A worker may start after
// the loop is over: it finds no index left and touches nothing else.
class Loop {
 public:
  // Makes a loop for at most `max_workers` threads at once.
  Loop(int64_t max_workers, int64_t num_tasks, ParallelFor::Task task,
       void* argument)
      : num_tasks_(num_tasks),
        task_(task),
        argument_(argument),
        num_workers_(static_cast<int>(std::min(max_workers, num_tasks))) {}

  int num_workers() const { return num_workers_; }

  // Takes part as the next worker until no task is left to begin. Any number of
  // threads may call Work; if all places are taken, it returns at once.
  void Work() {
    const int worker = started_.fetch_add(1);
    if (worker >= num_workers_) return;  // others have taken every place
    for (int64_t index; (index = next_.fetch_add(1)) < num_tasks_;) {
      task_(argument_, index, worker);
      if (finished_.fetch_add(1) + 1 == num_tasks_) {
        std::lock_guard<std::mutex> lock(mutex_);
        all_finished_.notify_all();
      }
    }
  }

  // Waits for all tasks, not for workers.
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_finished_.wait(lock, [this] { return Finished(); });
  }

  // Waits for all tasks, but no longer than `time`; tells whether the loop is
  // over.
  bool WaitFor(std::chrono::microseconds time) {
    std::unique_lock<std::mutex> lock(mutex_);
    return all_finished_.wait_for(lock, time, [this] { return Finished(); });
  }

 private:
  bool Finished() const { return finished_.load() == num_tasks_; }

  const int64_t num_tasks_;
  const ParallelFor::Task task_;
  void* const argument_;
  const int num_workers_;
  std::atomic<int> started_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> finished_{0};
  std::mutex mutex_;
  std::condition_variable all_finished_;
};

}  // namespace tf_deform

#endif  // TF_DEFORM_CC_TF_LOOP_H_

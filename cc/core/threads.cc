// SPDX-License-Identifier: Apache-2.0
// Implements a ParallelFor on plain threads.

#include "cc/core/threads.h"

#include <atomic>
#include <thread>
#include <vector>

namespace tf_deform {
namespace {

void RunOnThreads(void* context, int64_t num_tasks, ParallelFor::Task task,
                  void* argument) {
  const int num_threads = static_cast<int>(reinterpret_cast<intptr_t>(context));
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t index; (index = next.fetch_add(1)) < num_tasks;) {
      task(argument, index, worker);
    }
  };
  std::vector<std::thread> threads;
  for (int worker = 1; worker < num_threads; ++worker) {
    threads.emplace_back(work, worker);
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

ParallelFor Threads(int num_threads) {
  ParallelFor parallel_for;
  if (num_threads > 1) {
    parallel_for.num_workers = num_threads;
    parallel_for.context =
        reinterpret_cast<void*>(static_cast<intptr_t>(num_threads));
    parallel_for.run = RunOnThreads;
  }
  return parallel_for;
}

}  // namespace tf_deform

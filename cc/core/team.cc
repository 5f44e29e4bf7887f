// SPDX-License-Identifier: Apache-2.0
// Implements a team as one loop on the caller's threads: task 0 runs the body,
// every other task helps until the body ends.

#include "cc/core/team.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace tf_deform {
namespace {

// Rounds of waiting before a thread offers its processor to others, and before
// it sleeps: some 10 microseconds, then some more.
constexpr int kSpins = 400;
constexpr int kYields = 40;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Team {
 public:
  // Runs a loop, as ParallelFor::run. Called by the body alone.
  static void Run(void* context, int64_t num_tasks, ParallelFor::Task task,
                  void* argument) {
    static_cast<Team*>(context)->RunLoop(num_tasks, task, argument);
  }

  // Takes part in loops, as `worker`, until the body ends.
  void Help(int worker) {
    for (int64_t seen = 0; Await(seen);) {
      // Whoever is counted as active may read the loop: RunLoop changes it only
      // while it is closed and nobody is active.
      active_.fetch_add(1);
      seen = number_.load();
      if (open_.load()) Work(worker);
      active_.fetch_sub(1);
    }
  }

  // Sends helpers home.
  void End() {
    ended_.store(true);
    Wake();
  }

 private:
  void RunLoop(int64_t num_tasks, ParallelFor::Task task, void* argument) {
    num_tasks_ = num_tasks;
    task_ = task;
    argument_ = argument;
    next_.store(0);
    open_.store(true);
    number_.fetch_add(1);
    Wake();
    Work(0);
    open_.store(false);
    for (int round = 0; active_.load() > 0; ++round) {
      if (round < kSpins) {
        Pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  void Work(int worker) {
    for (int64_t index; (index = next_.fetch_add(1)) < num_tasks_;) {
      task_(argument_, index, worker);
    }
  }

  // Waits for a loop after number `seen`; returns false if the body has ended.
  bool Await(int64_t seen) {
    const auto is_over = [&] {
      return number_.load() != seen || ended_.load();
    };
    for (int round = 0; !is_over(); ++round) {
      if (round < kSpins) {
        Pause();
      } else if (round < kSpins + kYields) {
        std::this_thread::yield();
      } else {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, is_over);
        sleepers_.fetch_sub(1);
      }
    }
    return !ended_.load();
  }

  // Wakes helpers that sleep. A helper counts itself before it looks whether
  // its wait is over, so one of the two sees the other.
  void Wake() {
    if (sleepers_.load() == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }

  // The loop at hand.
  int64_t num_tasks_ = 0;
  ParallelFor::Task task_ = nullptr;
  void* argument_ = nullptr;
  std::atomic<int64_t> next_{0};

  std::atomic<int64_t> number_{0};  // of loops that were begun
  std::atomic<bool> open_{false};
  std::atomic<bool> ended_{false};
  std::atomic<int> active_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace

void RunTeam(const ParallelFor& threads, int64_t most,
             void (*body)(void* argument, const ParallelFor& parallel_for),
             void* argument) {
  const int64_t size = std::min<int64_t>(threads.num_workers, most);
  if (threads.run == nullptr || size <= 1) {
    body(argument, threads);
    return;
  }
  Team team;
  threads(size, [&](int64_t index, int) {
    if (index > 0) return team.Help(static_cast<int>(index));
    ParallelFor parallel_for;
    parallel_for.num_workers = threads.num_workers;
    parallel_for.context = &team;
    parallel_for.run = Team::Run;
    body(argument, parallel_for);
    team.End();
  });
}

}  // namespace tf_deform

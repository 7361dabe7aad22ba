// Threads that run one function together, again and again, and wait for each other inside it.
//
// A token takes about 300 waits, so a wait spins; a team that has nothing to do goes to sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace gateskip {

class Team {
 public:
  explicit Team(int size) : size_(size) {
    for (int member = 1; member < size; ++member) threads_.emplace_back([this, member] { serve(member); });
  }

  ~Team() {
    start(nullptr);
    for (std::thread& thread : threads_) thread.join();
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Calls work(member) on every member, this thread being member 0; returns when all are done.
  void run(const std::function<void(int)>& work) {
    start(&work);
    work(0);
    wait();
  }

  // Inside `run`: goes on when all members have come here.
  void wait() {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int turns = 0; round_.load(std::memory_order_acquire) == round; ++turns)
      turns < kSpins ? pause() : std::this_thread::yield();  // a member may have lost its core
  }

 private:
  static constexpr int kSpins = 2000;  // well below 0.1 ms

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  void start(const std::function<void(int)>* work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      task_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

  void serve(int member) {
    for (unsigned seen = 0;; ++seen) {
      for (int turns = 0; task_.load(std::memory_order_acquire) == seen && turns < kSpins; ++turns) pause();
      if (task_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return task_.load(std::memory_order_relaxed) != seen; });
      }
      if (work_ == nullptr) return;
      (*work_)(member);
      wait();
    }
  }

  const int size_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<unsigned> task_{0}, round_{0};
  std::atomic<int> arrived_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace gateskip

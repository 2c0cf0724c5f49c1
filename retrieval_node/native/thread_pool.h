// A pool that runs numbered tasks; several callers may share it.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace longreach {

class ThreadPool {
 public:
  // `threads` counts the calling thread: a pool of one starts none. With `pin`, worker i stays on
  // the i-th CPU the process may use.
  ThreadPool(int threads, bool pin);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs task(0) ... task(count - 1), some of them on the calling thread, and returns when all are
  // done. The first exception thrown by a task is rethrown here.
  void run(int count, const std::function<void(int)>& task);

 private:
  struct Job;
  void work();
  static void run_some(Job& job);

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> jobs_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

// The process's pool; it starts with one thread per CPU the process may use.
std::shared_ptr<ThreadPool> shared_pool();

// Replaces the pool; calls in flight finish on the old one. Throws std::invalid_argument if
// threads < 1.
void set_threads(int threads, bool pin);

}  // namespace longreach

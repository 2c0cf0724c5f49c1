#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <string>

namespace longreach {
namespace {

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

void pin_to(std::thread& thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  // Pinning is a hint: a container may forbid it, and the work is right without it.
  pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
}

}  // namespace

struct ThreadPool::Job {
  Job(int count_, const std::function<void(int)>& task_) : count(count_), task(task_) {}
  const int count;
  const std::function<void(int)>& task;  // alive until `unfinished` is 0, then never touched
  std::atomic<int> next{0};
  std::mutex mutex;
  std::condition_variable done;
  int unfinished = count;
  std::exception_ptr error;
};

ThreadPool::ThreadPool(int threads, bool pin) {
  const std::vector<int> cpus = allowed_cpus();
  for (int i = 1; i < threads; ++i) {
    workers_.emplace_back([this] { work(); });
    if (pin) pin_to(workers_.back(), cpus[static_cast<size_t>(i) % cpus.size()]);
  }
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run_some(Job& job) {
  int finished = 0;
  std::exception_ptr error;
  for (int i = job.next++; i < job.count; i = job.next++) {
    try {
      job.task(i);
    } catch (...) {
      error = std::current_exception();
    }
    ++finished;
  }
  if (finished == 0) return;
  std::lock_guard<std::mutex> lock(job.mutex);
  if (error && !job.error) job.error = error;
  job.unfinished -= finished;
  if (job.unfinished == 0) job.done.notify_all();
}

void ThreadPool::run(int count, const std::function<void(int)>& task) {
  if (count <= 0) return;
  if (count == 1 || workers_.empty()) {
    for (int i = 0; i < count; ++i) task(i);
    return;
  }
  auto job = std::make_shared<Job>(count, task);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(job);
  }
  wake_.notify_all();
  run_some(*job);
  std::unique_lock<std::mutex> lock(job->mutex);
  job->done.wait(lock, [&] { return job->unfinished == 0; });
  if (job->error) std::rethrow_exception(job->error);
}

void ThreadPool::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    std::shared_ptr<Job> job = jobs_.front();
    if (job->next >= job->count) {  // every task is taken
      jobs_.pop_front();
      continue;
    }
    lock.unlock();
    run_some(*job);
    lock.lock();
  }
}

namespace {

struct SharedPool {
  std::mutex mutex;
  std::shared_ptr<ThreadPool> pool;
};

// Leaked on purpose: joining threads while the interpreter unloads the module can hang.
SharedPool& holder() {
  static SharedPool* shared = new SharedPool;
  return *shared;
}

}  // namespace

std::shared_ptr<ThreadPool> shared_pool() {
  SharedPool& shared = holder();
  std::lock_guard<std::mutex> lock(shared.mutex);
  if (!shared.pool)
    shared.pool = std::make_shared<ThreadPool>(static_cast<int>(allowed_cpus().size()), false);
  return shared.pool;
}

void set_threads(int threads, bool pin) {
  if (threads < 1)
    throw std::invalid_argument("threads is " + std::to_string(threads) +
                                "; it must be at least 1");
  auto fresh = std::make_shared<ThreadPool>(threads, pin);
  SharedPool& shared = holder();
  std::lock_guard<std::mutex> lock(shared.mutex);
  shared.pool.swap(fresh);
}

}  // namespace longreach

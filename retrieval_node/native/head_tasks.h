// Spreads a batch over the thread pool, one task per row of a KV head.
#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

#include "chosen.h"
#include "thread_pool.h"

namespace longreach {

template <class Body>
void for_each_head(const LayerKv& kv, const std::vector<BudgetedRows>& batch, const LogitRule& rule,
                   Body body) {
  std::vector<int64_t> starts{0};
  for (const auto& entry : batch)
    starts.push_back(starts.back() + entry.rows.rows * entry.rows.heads);
  shared_pool()->run(static_cast<int>(starts.back()), [&](int i) {
    const auto after = std::upper_bound(starts.begin(), starts.end(), static_cast<int64_t>(i));
    const size_t number = static_cast<size_t>(after - starts.begin()) - 1;
    const BudgetedRows& entry = batch[number];
    // Heads outermost: neighbouring tasks share K, V and codes.
    const int64_t within = i - starts[number];
    const HeadTask task{&kv,
                        &entry,
                        rule,
                        within % entry.rows.rows,
                        static_cast<int>(within / entry.rows.rows),
                        0,
                        entry.rows.group};
    task.figures() = {};
    body(task, number);
  });
}

// Nanoseconds since it was made or last read.
class Stopwatch {
 public:
  int64_t lap() {
    const auto now = std::chrono::steady_clock::now();
    const auto passed = std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
    last_ = now;
    return passed;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace longreach

// The bounded, sorted queue of a graph search.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace longreach {

// The best `capacity` keys seen, best first, each marked once it has been expanded.
class Beam {
 public:
  void clear(int64_t capacity) {
    if (static_cast<int64_t>(entries_.size()) < capacity) entries_.resize(capacity);
    capacity_ = capacity;
    size_ = next_ = 0;
  }

  // Scores at or below this one do not enter.
  float bar() const {
    return size_ < capacity_ ? -std::numeric_limits<float>::infinity() : entries_[size_ - 1].score;
  }

  void insert(float score, int32_t key, bool expanded) {
    if (size_ == capacity_ && !(score > entries_[size_ - 1].score)) return;
    int64_t low = 0, high = size_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (entries_[middle].score >= score)
        low = middle + 1;
      else
        high = middle;
    }
    const int64_t moved = (size_ < capacity_ ? size_ : capacity_ - 1) - low;
    if (moved > 0) std::memmove(&entries_[low + 1], &entries_[low], moved * sizeof(Entry));
    entries_[low] = {score, expanded ? ~key : key};
    if (size_ < capacity_) ++size_;
    if (low < next_) next_ = low;
  }

  // The best key not expanded yet, or -1.
  int32_t peek() {
    while (next_ < size_ && entries_[next_].key < 0) ++next_;
    return next_ < size_ ? entries_[next_].key : -1;
  }

  // peek(), marking the key expanded.
  int32_t pop() {
    const int32_t key = peek();
    if (key >= 0) entries_[next_++].key = ~key;
    return key;
  }

 private:
  struct Entry {
    float score;
    int32_t key;  // its complement once expanded
  };
  std::vector<Entry> entries_;
  int64_t capacity_ = 0;
  int64_t size_ = 0;
  int64_t next_ = 0;  // every entry before it is expanded
};

// A set of keys as bits. Clearing costs what was added, not what could have been.
class KeySet {
 public:
  void clear(int64_t keys) {
    for (const int32_t word : touched_) words_[word] = 0;
    touched_.clear();
    words_.resize(static_cast<size_t>(keys + 63) / 64, 0);
  }
  bool holds(int32_t key) const { return words_[key >> 6] >> (key & 63) & 1; }
  // True if the key was not in the set yet.
  bool add(int32_t key) {
    uint64_t& word = words_[key >> 6];
    const uint64_t bit = uint64_t{1} << (key & 63);
    if (word & bit) return false;
    if (word == 0) touched_.push_back(key >> 6);
    word |= bit;
    return true;
  }

 private:
  std::vector<uint64_t> words_;
  std::vector<int32_t> touched_;  // words that are not zero
};

}  // namespace longreach

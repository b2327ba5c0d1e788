// The plans of one device, the least recently used of which makes room for a new one. Not locked: its device is.
#pragma once

#include <cstdint>
#include <list>
#include <unordered_map>
#include <utility>

#include "plan.h"

namespace nms::lt {

class PlanCache {
 public:
  struct Counts {
    int64_t hits = 0, misses = 0, evictions = 0;
  };

  // The plan of this problem if there is one.
  Plan* find(const Problem& problem) {
    const auto found = places_.find(problem);
    if (found == places_.end()) return nullptr;
    ++counts_.hits;
    plans_.splice(plans_.begin(), plans_, found->second);
    return &found->second->plan;
  }

  // The plan of this problem, made if it is new; at most `limit` plans stay. Throws what Plan throws, and nothing has
  // changed then.
  Plan& get(const Api& api, const Opaque* handle, const Problem& problem, size_t limit) {
    if (Plan* known = find(problem)) return *known;
    ++counts_.misses;
    plans_.emplace_front(api, handle, problem);
    try {
      places_.emplace(problem, plans_.begin());
    } catch (...) {
      plans_.pop_front();
      throw;
    }
    shrink(limit);
    return plans_.front().plan;
  }

  // Destroys the least recently used plans until `limit`, at least one, are left.
  void shrink(size_t limit) {
    for (; plans_.size() > limit && plans_.size() > 1; ++counts_.evictions) {
      places_.erase(plans_.back().problem);
      plans_.pop_back();
    }
  }

  void clear() {
    places_.clear();
    plans_.clear();
  }

  size_t size() const { return plans_.size(); }
  Counts counts() const { return counts_; }

 private:
  struct Entry {
    Entry(const Api& api, const Opaque* handle, const Problem& problem)
        : problem(problem), plan(api, handle, problem) {}

    Problem problem;
    Plan plan;
  };

  std::list<Entry> plans_;  // most recently used first; a list never moves what is in it
  std::unordered_map<Problem, std::list<Entry>::iterator, ProblemHash> places_;
  Counts counts_;
};

}  // namespace nms::lt

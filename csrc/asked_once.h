// What a device says of itself, asked once: an occupancy takes the driver microseconds, and every call of a norm would ask for it.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <mutex>

namespace fastscore {

// What is asked, of which device, and up to three numbers: a kernel, a size.
using Question = std::array<int64_t, 5>;

class AskedOnce {
 public:
  template <class Ask>
  int64_t operator()(const Question& question, const Ask& ask) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = answers_.find(question);
      if (found != answers_.end()) return found->second;
    }
    const int64_t answer = ask();   // without the lock: it may ask something else
    const std::lock_guard<std::mutex> lock(mutex_);
    return answers_.emplace(question, answer).first->second;
  }
  void forget() {   // of a device that tests change
    const std::lock_guard<std::mutex> lock(mutex_);
    answers_.clear();
  }

 private:
  std::mutex mutex_;
  std::map<Question, int64_t> answers_;
};

inline AskedOnce asked_once;

}  // namespace fastscore

// How a pass over a batch is cut into tasks. No torch.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"

namespace attnpool {

constexpr double TASK_FLOPS = 1e6;  // about 10 us: less is not worth another task or thread

// Memory without initialisation, on cache lines.
class Buffer {
 public:
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(new char[bytes + 64]);
      size_ = bytes;
    }
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t size_ = 0;
};

// What a pass runs, in this order.
struct TaskPlan {
  std::vector<Task> statistics;  // of rows of large molecules, for the backward passes
  std::vector<Task> tasks;
  std::vector<SumOfParts> sums;    // of the parts that tasks leave behind
  std::vector<SumOfParts> merges;  // of the parts of a forward pass
  int64_t longest = 0;    // most query rows of a molecule
  double flops = 0;
  std::vector<Buffer> memory;  // of the sums and statistics
};

TaskPlan plan_tasks(const AttnParams& a, Pass pass, const Kernels& kernels, int64_t threads);

}  // namespace attnpool

// What the operators ask of the code compiled for one vector width. A task is a run of molecules
// and heads, or a part of one large molecule; its results do not depend on how tasks are formed,
// except where a buffer of partial sums is named.
#pragma once

#include <stddef.h>

#include "../params.h"

namespace attnpool {

constexpr int64_t MAX_WIDTH = 512;  // of heads and values

struct Task {
  int64_t molecule, molecule_end;
  int64_t head, head_end;
  // Part of the molecule: queries (statistics; forward without `partial`) or keys (the others).
  int64_t first = 0, last = INT64_MAX;
  // Buffers in the accumulation type, owned by the caller; null: none.
  void* dq_sum = nullptr;      // [heads, n_q, padded D]: dq (double backward: gq) is added here
  void* gdout_sum = nullptr;   // [heads, n_q, padded Dv]: gdout is added here
  void* statistics = nullptr;  // [heads, 4, n_q]: of the double backward; [heads, n_q]: backward
  void* partial = nullptr;     // forward, see PartialRow: what the keys first ... last - 1 give

  bool part_of_keys() const { return last != INT64_MAX; }
};

// A forward pass over some keys leaves for each head and query the sum of weights times values, in
// as many elements as it is padded to, and then, in units of log 2, what the weights are relative
// to, their sum and what rounding has taken from that.
struct PartialRow {
  enum { TOP, SUM, LOST };
  static constexpr int64_t REST = 16;  // elements for these, whole vectors
};

// out[row, head, :] = sum over parts of part[head, row, :], in the order of the parts.
struct SumOfParts {
  View to;
  const void* part;      // [parts, heads, rows, padded width]
  int64_t parts, rows, width;
  int64_t molecule, first_row;
};

struct Kernels {
  const char* name;
  bool (*runs_here)();
  // Bytes of scratch, aligned to 64, that tasks of this pass need; longest = most query rows.
  size_t (*scratch_bytes)(const AttnParams&, Pass, int64_t longest);
  int64_t (*padded)(const AttnParams&, int64_t width);
  int64_t (*key_block)(const AttnParams&);  // most keys of a block
  void (*forward)(const AttnParams&, const Task&, void* scratch);
  void (*backward)(const AttnParams&, const Task&, void* scratch);
  // Row statistics of a part of a large molecule, which its backward or double backward reads.
  void (*norms)(const AttnParams&, const Task&, void* scratch);
  void (*statistics)(const AttnParams&, const Task&, void* scratch);
  void (*double_backward)(const AttnParams&, const Task&, void* scratch);
  void (*add_parts)(const AttnParams&, const SumOfParts&, int64_t head);
  void (*merge_parts)(const AttnParams&, const SumOfParts&, int64_t head);  // of `partial`
};

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

}  // namespace attnpool

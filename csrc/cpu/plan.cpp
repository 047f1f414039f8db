// Tasks follow from the sizes of molecules. How many threads there are decides how many molecules
// share a task, which changes no result; where a sum is cut into parts, it depends on the molecule
// (d(seeds): on the number of molecules) alone.
#include "plan.h"

#include <algorithm>

namespace attnpool {
namespace {

constexpr int64_t TASKS_PER_THREAD = 16;
constexpr int64_t QUERY_PART = 512;  // queries of one forward task of a large molecule
constexpr int64_t KEY_PART = 2048;   // keys of one backward task of a large molecule
constexpr int64_t MOST_PARTS = 8;    // ... whose dq parts take memory
constexpr int64_t SEED_PARTS = 128;  // parts of d(seeds) of one batch
// A set with few queries and many keys is cut into parts of so many blocks of keys, for all heads:
// no more, so that a plain sum over them is exact enough (see LongSum).
constexpr int64_t FEW_QUERIES = 64, PART_BLOCKS = 16;

// A pass multiplies each pair so many times with rows of head_dim and of value_dim.
double flops_per_pair(const AttnParams& a, Pass pass) {
  const auto flops = [&](int head_products, int value_products) {
    return 2 * double(head_products * a.head_dim + value_products * a.value_dim) + 20;
  };
  switch (pass) {
    case Pass::forward: return flops(1, 1);
    case Pass::backward: return flops(3, 2);
    default: return flops(7, 5);
  }
}

// Work on one head of a molecule. Rows count too: an empty molecule still has outputs to fill.
double head_flops(const AttnParams& a, Pass pass, int64_t molecule) {
  const double q = double(query_span(a, molecule).size), k = double(key_span(a, molecule).size);
  return q * k * flops_per_pair(a, pass) + 8 * (q + k) * double(a.head_dim + a.value_dim);
}

// Keys of one part of a large molecule in the backward passes, 0: not split. Depends on the
// molecule only.
int64_t key_part(const AttnParams& a, int64_t molecule) {
  const Span q = query_span(a, molecule), k = key_span(a, molecule);
  if (a.shared_seeds || k.size <= KEY_PART || q.size <= FEW_QUERIES) return 0;
  const int64_t parts = std::min(MOST_PARTS, (k.size + KEY_PART - 1) / KEY_PART);
  return ((k.size + parts - 1) / parts + 3) / 4 * 4;
}

class Planner {
 public:
  Planner(const AttnParams& a, Pass pass, const Kernels& kernels, int64_t threads)
      : a_(a), pass_(pass), double_(pass == Pass::double_backward), kernels_(kernels) {
    const bool seeds = a.shared_seeds && pass != Pass::forward;
    few_part_ = PART_BLOCKS * kernels.key_block(a);
    const int64_t part = (a.molecules + SEED_PARTS - 1) / SEED_PARTS;
    plan_molecules(seeds ? std::max<int64_t>(8, part) : 1, threads);
    if (pass == Pass::forward) split_queries();
    else if (seeds) share_seeds();
    else split_keys();
  }

  TaskPlan plan;

 private:
  // Tasks of several molecules, or of some heads of one; a molecule that will be split has its own,
  // whatever the batch is. Neighbours stay together, because a head fetches the rows of the next one
  // ahead.
  void plan_molecules(int64_t together, int64_t threads) {
    for (int64_t b = 0; b < a_.molecules; ++b) {
      plan.longest = std::max(plan.longest, query_span(a_, b).size);
      plan.flops += head_flops(a_, pass_, b) * double(a_.heads);
    }
    const double target =
        std::max(TASK_FLOPS, plan.flops / (double(threads) * TASKS_PER_THREAD));
    Task open{0, 0, 0, a_.heads};
    double open_flops = 0;
    const auto close = [&](int64_t molecule) {
      open.molecule_end = molecule;
      if (open.molecule < molecule) plan.tasks.push_back(open);
      open.molecule = molecule;
      open_flops = 0;
    };
    for (int64_t b = 0; b < a_.molecules; ++b) {
      if (is_giant(b)) {
        close(b);
        for (int64_t first = 0, keys = key_span(a_, b).size; first < keys; first += few_part_)
          plan.tasks.push_back(
              {b, b + 1, 0, a_.heads, first, std::min(keys, first + few_part_)});
        giants_.push_back(b);
        open.molecule = b + 1;
        continue;
      }
      const double head = head_flops(a_, pass_, b), flops = head * double(a_.heads);
      const bool splits = pass_ != Pass::forward && key_part(a_, b) > 0;
      if ((flops < 2 * target && !splits) || together > 1) {
        open_flops += flops;
        if (together > 1 ? (b + 1) % together == 0 : open_flops >= target) close(b + 1);
        continue;
      }
      close(b);
      const int64_t step = std::max<int64_t>(1, int64_t(target / head));
      for (int64_t h = 0; h < a_.heads; h += step)
        plan.tasks.push_back({b, b + 1, h, std::min(a_.heads, h + step)});
      open.molecule = b + 1;
    }
    close(a_.molecules);
  }

  // Many keys for few queries; depends on the molecule only.
  bool is_giant(int64_t b) const {
    const int64_t queries = query_span(a_, b).size;
    return queries > 0 && queries <= FEW_QUERIES && key_span(a_, b).size >= 2 * few_part_;
  }

  // Memory for what the parts of the keys of a giant give in the forward pass.
  void keep_partial(int64_t b) {
    const Span queries = query_span(a_, b);
    const int64_t parts = parts_of(b, few_part_);
    const size_t bytes =
        size_t(a_.heads * queries.size *
               (kernels_.padded(a_, a_.value_dim) + PartialRow::REST)) *
        element();
    char* const memory = take(size_t(parts) * bytes);
    for_parts(b, [&](Task& task) {
      task.partial = memory + size_t(task.first / few_part_) * bytes;
    });
    plan.merges.push_back({a_.out, memory, parts, queries.size, a_.value_dim, b, queries.first});
  }

  void split_queries() {
    for (const int64_t b : giants_) keep_partial(b);
    split([&](int64_t b) { return query_span(a_, b).size; },
          [](int64_t, int64_t rows) { return rows >= 2 * QUERY_PART ? QUERY_PART : 0; });
  }

  // Replaces the tasks of large molecules by parts of part(molecule, rows) queries or keys.
  template <typename Rows, typename Part>
  void split(const Rows& rows_of, const Part& part_of) {
    std::vector<Task> tasks, large;
    for (const Task& task : plan.tasks) {
      const int64_t b = task.molecule;
      const bool whole = b + 1 == task.molecule_end && !task.part_of_keys();
      const int64_t rows = whole ? rows_of(b) : 0;
      const int64_t part = rows ? part_of(b, rows) : 0;
      if (part == 0 || part >= rows) {
        tasks.push_back(task);
        continue;
      }
      for (int64_t h = task.head; h < task.head_end; ++h)
        for (int64_t first = 0; first < rows; first += part)
          large.push_back({b, b + 1, h, h + 1, first, std::min(rows, first + part)});
    }
    if (large.empty()) return;
    plan.tasks = std::move(large);  // large ones first, so that none of them is started last
    plan.tasks.insert(plan.tasks.end(), tasks.begin(), tasks.end());
  }

  // One part of d(seeds) per run of molecules.
  void share_seeds() {
    const int64_t parts = int64_t(plan.tasks.size());
    char* memory = add_sum(0, {0, a_.query_rows}, parts, a_.head_dim, dq());
    for (Task& task : plan.tasks) {
      task.dq_sum = memory;
      memory += part_bytes(a_.query_rows, a_.head_dim);
    }
    for (const int64_t b : giants_) keep_rows(b, few_part_);
    if (plan.flops < 2 * TASK_FLOPS) return;
    std::vector<Task> by_head;  // the parts are few: spread their heads
    const int64_t few = std::max<int64_t>(
        1, int64_t(TASK_FLOPS * double(a_.heads) * double(parts) / plan.flops));
    for (const Task& task : plan.tasks)
      for (int64_t h = 0, step = task.part_of_keys() ? a_.heads : few; h < a_.heads; h += step) {
        by_head.push_back(task);
        by_head.back().head = h;
        by_head.back().head_end = std::min(a_.heads, h + step);
      }
    plan.tasks = std::move(by_head);
  }

  // Parts of the keys of large molecules, each with its part of dq (and gdout).
  void split_keys() {
    for (const int64_t b : giants_) {
      keep_gradient(b, few_part_);
      keep_rows(b, few_part_);
    }
    const std::vector<Task> whole = plan.tasks;
    split([&](int64_t b) { return key_span(a_, b).size; },
          [&](int64_t b, int64_t) { return key_part(a_, b); });
    if (plan.tasks.size() == whole.size()) return;
    for (const Task& task : whole) {
      const int64_t b = task.molecule, part = key_part(a_, b);
      if (part == 0 || task.head > 0) continue;
      keep_gradient(b, part);
      keep_rows(b, part);
    }
  }

  int64_t parts_of(int64_t b, int64_t part) const {
    return (key_span(a_, b).size + part - 1) / part;
  }

  template <typename F>
  void for_parts(int64_t b, const F& f) {
    for (Task& task : plan.tasks)
      if (task.molecule == b && task.molecule_end == b + 1 && task.part_of_keys()) f(task);
  }

  // Memory for the parts of dq of a molecule.
  void keep_gradient(int64_t b, int64_t part) {
    const Span queries = query_span(a_, b);
    char* const dq_sum = add_sum(b, queries, parts_of(b, part), a_.head_dim, dq());
    for_parts(b, [&](Task& task) {
      task.dq_sum = dq_sum + size_t(task.first / part) * part_bytes(queries.size, a_.head_dim);
    });
  }

  // Memory for the parts of gdout, and statistics of the rows, which all parts share.
  void keep_rows(int64_t b, int64_t part) {
    const int64_t n = query_span(a_, b).size;
    char* const gdout_sum =
        double_ ? add_sum(b, query_span(a_, b), parts_of(b, part), a_.value_dim, a_.gdout)
                : nullptr;
    char* const rows = take(size_t(a_.heads * (double_ ? 4 : 1) * n) * element());
    for_parts(b, [&](Task& task) {
      if (double_)
        task.gdout_sum = gdout_sum + size_t(task.first / part) * part_bytes(n, a_.value_dim);
      task.statistics = rows;
    });
    for (int64_t h = 0; h < a_.heads; ++h)
      for (int64_t i = 0; i < n; i += QUERY_PART)
        plan.statistics.push_back(
            {b, b + 1, h, h + 1, i, std::min(n, i + QUERY_PART), nullptr, nullptr, rows});
  }

  // Memory for the parts of rows of a result, zero.
  char* add_sum(int64_t molecule, const Span& rows, int64_t parts, int64_t width, const View& to) {
    const size_t bytes = size_t(parts) * part_bytes(rows.size, width);
    char* memory = take(bytes);
    std::fill_n(memory, bytes, 0);
    plan.sums.push_back({to, memory, parts, rows.size, width, molecule, rows.first});
    return memory;
  }

  size_t part_bytes(int64_t rows, int64_t width) const {
    return size_t(a_.heads * rows * kernels_.padded(a_, width)) * element();
  }

  char* take(size_t bytes) {
    plan.memory.emplace_back();
    return static_cast<char*>(plan.memory.back().at_least(bytes));
  }

  const View& dq() const { return double_ ? a_.gq : a_.dq; }
  size_t element() const { return a_.dtype == Dtype::float64 ? 8 : 4; }

  const AttnParams& a_;
  const Pass pass_;
  const bool double_;
  const Kernels& kernels_;
  int64_t few_part_ = 0;         // keys of a part of a giant
  std::vector<int64_t> giants_;  // molecules
};

}  // namespace

TaskPlan plan_tasks(const AttnParams& a, Pass pass, const Kernels& kernels, int64_t threads) {
  return std::move(Planner(a, pass, kernels, threads).plan);
}

}  // namespace attnpool

// torch.ops.attnpool_c on the CPU: cuts a batch into tasks, runs them on torch's threads, fills
// what no molecule covers. Which code runs (vector width) is decided once, by the machine.
//
// Results do not depend on the number of threads: a task's arithmetic is fixed by its molecule, and
// sums over tasks (seeds; parts of one large molecule) are kept apart and added in order.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>

#include "../bridge.h"
#include "kernels.h"

namespace attnpool {
namespace {

const Kernels* const BUILT[] = {
#if defined(__x86_64__)
    &avx512::kernels, &avx2::kernels,
#endif
    &baseline::kernels};

const Kernels*& chosen() {
  static const Kernels* kernels = [] {
    for (const Kernels* k : BUILT)
      if (k->runs_here()) return k;
    return &baseline::kernels;
  }();
  return kernels;
}

constexpr int64_t EVERYTHING = std::numeric_limits<int64_t>::max();
constexpr double TASK_FLOPS = 1e6;      // about 10 us: less is not worth another task or thread
constexpr int64_t TASKS_PER_THREAD = 16;
constexpr int64_t QUERY_PART = 512;     // queries of one forward task of a large molecule
constexpr int64_t KEY_PART = 2048;      // keys of one backward task of a large molecule
constexpr int64_t MOST_PARTS = 8;       // ... whose dq parts take memory
constexpr int64_t SEED_PARTS = 128;     // parts of d(seeds) of one batch

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

struct Plan {
  std::vector<Task> tasks;
  int64_t longest = 0;  // most query rows of a molecule
  double flops = 0;
};

template <typename F>
void run_parallel(int64_t count, double flops, const F& f) {
  const int64_t threads = std::min<int64_t>(
      {int64_t(torch::stable::get_num_threads()), count, int64_t(flops / TASK_FLOPS) + 1});
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  };
  if (threads <= 1) return work(0, 1);
  torch::stable::parallel_for(0, threads, 1, work);
}

using Run = void (*)(const AttnParams&, const Task&, void*);

void run_tasks(const AttnParams& a, Run run, Pass pass, const Plan& plan) {
  const size_t bytes = chosen()->scratch_bytes(a, pass, plan.longest);
  run_parallel(int64_t(plan.tasks.size()), plan.flops, [&](int64_t i) {
    static thread_local Buffer scratch;
    run(a, plan.tasks[size_t(i)], scratch.at_least(bytes));
  });
}

// Work on one head of a molecule. Rows count too: an empty molecule still has outputs to fill.
double head_flops(const AttnParams& a, double flops_per_pair, int64_t molecule) {
  const double q = double(query_span(a, molecule).size), k = double(key_span(a, molecule).size);
  return q * k * flops_per_pair + 8 * (q + k) * double(a.head_dim + a.value_dim);
}

// Keys of one part of a large molecule in the backward passes, 0: not split. Depends on the
// molecule only.
int64_t key_part(const AttnParams& a, int64_t molecule) {
  const Span q = query_span(a, molecule), k = key_span(a, molecule);
  if (a.shared_seeds || k.size <= KEY_PART || q.size < 64) return 0;
  const int64_t parts = std::min(MOST_PARTS, (k.size + KEY_PART - 1) / KEY_PART);
  return ((k.size + parts - 1) / parts + 3) / 4 * 4;
}

// Tasks of several molecules, or of some heads of one; a molecule that a backward pass cuts into parts
// has its own, whatever the batch is. Neighbours stay together, because a head fetches the rows of
// the next one ahead.
Plan plan_molecules(const AttnParams& a, double flops_per_pair, int64_t molecules_together,
                    bool backward) {
  Plan plan;
  for (int64_t b = 0; b < a.molecules; ++b) {
    plan.longest = std::max(plan.longest, query_span(a, b).size);
    plan.flops += head_flops(a, flops_per_pair, b) * double(a.heads);
  }
  const double threads = double(torch::stable::get_num_threads());
  const double target = std::max(TASK_FLOPS, plan.flops / (threads * TASKS_PER_THREAD));
  Task open{0, 0, 0, a.heads, 0, EVERYTHING, nullptr, nullptr, nullptr};
  double open_flops = 0;
  const auto close = [&](int64_t molecule) {
    open.molecule_end = molecule;
    if (open.molecule < molecule) plan.tasks.push_back(open);
    open.molecule = molecule;
    open_flops = 0;
  };
  for (int64_t b = 0; b < a.molecules; ++b) {
    const double head = head_flops(a, flops_per_pair, b), flops = head * double(a.heads);
    const bool parts = backward && key_part(a, b) > 0;
    if ((flops < 2 * target && !parts) || molecules_together > 1) {
      open_flops += flops;
      if (molecules_together > 1 ? (b + 1) % molecules_together == 0 : open_flops >= target)
        close(b + 1);
      continue;
    }
    close(b);
    const int64_t step = std::max<int64_t>(1, int64_t(target / head));
    for (int64_t h = 0; h < a.heads; h += step)
      plan.tasks.push_back({b, b + 1, h, std::min(a.heads, h + step), 0, EVERYTHING, nullptr,
                            nullptr, nullptr});
    open.molecule = b + 1;
  }
  close(a.molecules);
  return plan;
}

// Replaces the tasks of large molecules by parts of `part` queries or keys.
template <typename Size, typename Step>
void split_tasks(Plan& plan, const Size& size, const Step& step) {
  std::vector<Task> tasks, large;
  for (const Task& task : plan.tasks) {
    const int64_t rows = task.molecule + 1 == task.molecule_end ? size(task) : 0;
    const int64_t part = rows ? step(task, rows) : 0;
    if (part == 0 || part >= rows) {
      tasks.push_back(task);
      continue;
    }
    for (int64_t h = task.head; h < task.head_end; ++h)
      for (int64_t first = 0; first < rows; first += part) {
        Task piece = task;
        piece.head = h;
        piece.head_end = h + 1;
        piece.first = first;
        piece.last = std::min(rows, first + part);
        large.push_back(piece);
      }
  }
  if (large.empty()) return;
  plan.tasks = std::move(large);  // large ones first, so that none of them is started last
  plan.tasks.insert(plan.tasks.end(), tasks.begin(), tasks.end());
}

// Asks for large pages under a fresh output: for outputs of many megabytes the page faults of small
// ones cost more than the kernel (measured: up to 60 % of a forward pass).
void use_large_pages(const View& x, int64_t rows, size_t element) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.data);
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE;
  const uintptr_t last = (begin + uintptr_t(rows * x.row) * element) / PAGE * PAGE;
  if (x.data && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)x, (void)rows, (void)element;
#endif
}

size_t sums_size(const AttnParams& a) { return a.dtype == Dtype::float64 ? 8 : 4; }

size_t stored_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// The backward passes: what they sum over tasks, and how.
class Derivative {
 public:
  Derivative(const AttnParams& a, double flops_per_pair, bool double_pass)
      : a_(a), double_(double_pass), out_(double_pass ? a.gq : a.dq) {
    const int64_t together =
        a.shared_seeds ? std::max<int64_t>(8, (a.molecules + SEED_PARTS - 1) / SEED_PARTS) : 1;
    plan_ = plan_molecules(a, flops_per_pair, together, true);
    if (a.shared_seeds) share_seeds();
    else split_large();
  }

  void run() {
    const Kernels& k = *chosen();
    if (!first_.tasks.empty())
      run_tasks(a_, double_ ? k.statistics : k.norms,
                double_ ? Pass::double_backward : Pass::backward, first_);
    if (double_) run_tasks(a_, k.double_backward, Pass::double_backward, plan_);
    else run_tasks(a_, k.backward, Pass::backward, plan_);
    const int64_t heads = a_.heads;
    run_parallel(int64_t(sums_.size()) * heads, plan_.flops, [&](int64_t i) {
      k.add_parts(a_, sums_[size_t(i / heads)], i % heads);
    });
  }

 private:
  // One part of d(seeds) per run of molecules.
  void share_seeds() {
    const int64_t ld = chosen()->padded(a_, a_.head_dim);
    const size_t part = size_t(a_.heads * a_.query_rows * ld) * sums_size(a_);
    const int64_t parts = int64_t(plan_.tasks.size());
    char* memory = take(part * size_t(parts));
    std::fill(memory, memory + part * size_t(parts), 0);
    sums_.push_back({out_, memory, parts, a_.query_rows, a_.head_dim, 0, 0});
    for (Task& task : plan_.tasks) {
      task.dq_sum = memory;
      memory += part;
    }
    if (plan_.flops < 2 * TASK_FLOPS) return;
    std::vector<Task> by_head;  // the parts are few: spread their heads
    const int64_t step = std::max<int64_t>(
        1, int64_t(TASK_FLOPS * double(a_.heads) * double(parts) / plan_.flops));
    for (const Task& task : plan_.tasks)
      for (int64_t h = 0; h < a_.heads; h += step) {
        by_head.push_back(task);
        by_head.back().head = h;
        by_head.back().head_end = std::min(a_.heads, h + step);
      }
    plan_.tasks = std::move(by_head);
  }

  void split_large() {
    const auto keys = [&](const Task& task) { return key_span(a_, task.molecule).size; };
    const auto step = [&](const Task& task, int64_t) { return key_part(a_, task.molecule); };
    const Plan whole = plan_;
    split_tasks(plan_, keys, step);
    if (plan_.tasks.size() == whole.tasks.size()) return;
    const int64_t head_ld = chosen()->padded(a_, a_.head_dim);
    const int64_t value_ld = chosen()->padded(a_, a_.value_dim);
    for (const Task& first : whole.tasks) {
      const int64_t b = first.molecule, n = query_span(a_, b).size, part = key_part(a_, b);
      if (part == 0 || first.head > 0) continue;
      const int64_t parts = (key_span(a_, b).size + part - 1) / part;
      char* dq = large_sum(b, n, parts, a_.head_dim, head_ld, out_);
      char* gdout = double_ ? large_sum(b, n, parts, a_.value_dim, value_ld, a_.gdout) : nullptr;
      char* rows = take(size_t(a_.heads * (double_ ? 4 : 1) * n) * sums_size(a_));
      for (Task& task : plan_.tasks) {
        if (task.molecule != b || task.molecule_end != b + 1) continue;
        const size_t skip = size_t(task.first / part * a_.heads * n) * sums_size(a_);
        task.dq_sum = dq + skip * size_t(head_ld);
        task.statistics = rows;
        if (double_) task.gdout_sum = gdout + skip * size_t(value_ld);
      }
      for (int64_t h = 0; h < a_.heads; ++h)
        for (int64_t i = 0; i < n; i += QUERY_PART)
          first_.tasks.push_back({b, b + 1, h, h + 1, i, std::min(n, i + QUERY_PART), nullptr,
                                  nullptr, rows});
    }
    first_.flops = plan_.flops;
    first_.longest = plan_.longest;
  }

  char* large_sum(int64_t molecule, int64_t n, int64_t parts, int64_t width, int64_t ld,
                  const View& to) {
    const size_t bytes = size_t(parts * a_.heads * n * ld) * sums_size(a_);
    char* memory = take(bytes);
    std::fill(memory, memory + bytes, 0);
    sums_.push_back({to, memory, parts, n, width, molecule, query_span(a_, molecule).first});
    return memory;
  }

  char* take(size_t bytes) {
    buffers_.emplace_back();
    return static_cast<char*>(buffers_.back().at_least(bytes));
  }

  const AttnParams& a_;
  const bool double_;
  const View out_;
  Plan plan_, first_;  // first_: row statistics of large molecules
  std::vector<Sum> sums_;
  std::vector<Buffer> buffers_;
};

// Rows last ... end - 1 of a contiguous output, which no molecule covers.
void clear_tail(const View& x, int64_t covered, int64_t rows, Dtype dtype) {
  if (!x.data || covered >= rows) return;
  const size_t row = size_t(x.row) * stored_size(dtype);
  char* first = static_cast<char*>(x.data) + size_t(covered) * row;
  std::fill(first, first + size_t(rows - covered) * row, 0);
}

void clear_lse_tail(const AttnParams& a, int64_t covered) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (int64_t i = covered * a.heads; i < a.query_rows * a.heads; ++i) {
    if (a.dtype == Dtype::float64) static_cast<double*>(a.lse.data)[i] = -infinity;
    else static_cast<float*>(a.lse.data)[i] = float(-infinity);
  }
}

int64_t last_of(const AttnParams& a, const void* ptr) {
  return a.ptr_is_64 ? static_cast<const int64_t*>(ptr)[a.molecules]
                     : static_cast<const int32_t*>(ptr)[a.molecules];
}

int64_t covered_queries(const AttnParams& a) {
  return a.shared_seeds ? a.query_rows : last_of(a, a.q_ptr);
}

// 0: fine. Else 4 * index + rule: 1 the first boundary is not 0; 2 boundary `index` is above the
// next one; 3 the last boundary is above rows.
template <typename I>
int64_t broken_rule(const I* ptr, int64_t count, int64_t rows) {
  if (count == 0) return 0;
  if (ptr[0] != 0) return 1;
  for (int64_t i = 0; i + 1 < count; ++i)
    if (ptr[i] > ptr[i + 1]) return 4 * i + 2;
  return int64_t(ptr[count - 1]) > rows ? 4 * (count - 1) + 3 : 0;
}

int64_t broken_rule(const void* ptr, bool is_64, int64_t count, int64_t rows) {
  return is_64 ? broken_rule(static_cast<const int64_t*>(ptr), count, rows)
               : broken_rule(static_cast<const int32_t*>(ptr), count, rows);
}

int64_t check_ptr(const Tensor& ptr, int64_t rows) {
  const ScalarType type = ptr.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Int || type == ScalarType::Long) && ptr.dim() == 1 &&
                      ptr.is_contiguous(),
                  "ptr must be contiguous int32 or int64 of one dimension");
  return broken_rule(ptr.data_ptr(), type == ScalarType::Long, ptr.numel(), rows);
}

void check_contents(const AttnParams& a) {
  const int64_t count = a.molecules + 1;
  const bool fine = broken_rule(a.k_ptr, a.ptr_is_64, count, a.key_rows) == 0 &&
                    (a.shared_seeds || broken_rule(a.q_ptr, a.ptr_is_64, count, a.query_rows) == 0);
  STD_TORCH_CHECK(fine, "ptr must start with 0, never decrease and not pass the number of rows");
  if (!a.pair_ptr) return;
  bool pairs_fine = a.pair_ptr[0] == 0 && a.pair_ptr[a.molecules] <= a.pairs;
  for (int64_t b = 0; pairs_fine && b < a.molecules; ++b)
    pairs_fine = a.pair_ptr[b + 1] == a.pair_ptr[b] + query_span(a, b).size * key_span(a, b).size;
  STD_TORCH_CHECK(pairs_fine, "pair_ptr must hold the offsets of n_q * n_k pairs per molecule, "
                              "within the rows of bias");
}

double flops_per_pair(const AttnParams& a, int head_products, int value_products) {
  return 2 * double(head_products * a.head_dim + value_products * a.value_dim) + 20;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const OptionalTensor& bias, const OptionalTensor& q_ptr,
                                   const Tensor& k_ptr, const OptionalTensor& pair_ptr,
                                   const OptionalTensor& seed, double scale, double dropout) {
  Call call({q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout});
  AttnParams& a = call.a;
  check_contents(a);
  Tensor out = call.new_rows(q, call.out_shape, a.out);
  Tensor lse = call.new_statistics(q, a.lse);
  use_large_pages(a.out, call.out_shape[0], stored_size(a.dtype));
  Plan plan = plan_molecules(a, flops_per_pair(a, 1, 1), 1, false);
  split_tasks(
      plan, [&](const Task& task) { return query_span(a, task.molecule).size; },
      [](const Task&, int64_t rows) { return rows >= 2 * QUERY_PART ? QUERY_PART : 0; });
  run_tasks(a, chosen()->forward, Pass::forward, plan);
  if (!a.shared_seeds) {
    clear_tail(a.out, covered_queries(a), a.query_rows, a.dtype);
    clear_lse_tail(a, covered_queries(a));
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& q_ptr, const Tensor& k_ptr, const OptionalTensor& pair_ptr,
    const OptionalTensor& seed, const Tensor& out, const Tensor& lse, const Tensor& dout,
    const OptionalTensor& dlse, double scale, double dropout, bool need_dbias) {
  Call call({q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout});
  AttnParams& a = call.a;
  check_contents(a);
  a.out = call.rows(out, "out", call.out_shape);
  a.lse = call.statistics(lse, "lse");
  a.dout = call.rows(dout, "dout", call.out_shape);
  if (dlse) a.dlse = call.statistics(*dlse, "dlse");
  Tensor dq = call.new_rows(q, call.q_shape, a.dq);
  Tensor dk = call.new_rows(q, call.k_shape, a.dk);
  Tensor dv = call.new_rows(q, call.v_shape, a.dv);
  Tensor dbias = call.new_bias(q, need_dbias && bias, a.dbias);
  for (const View* x : {&a.dq, &a.dk, &a.dv})
    use_large_pages(*x, x == &a.dq ? a.query_rows : a.key_rows, stored_size(a.dtype));
  Derivative(a, flops_per_pair(a, 3, 2), false).run();
  clear_tail(a.dq, covered_queries(a), a.query_rows, a.dtype);
  clear_tail(a.dk, last_of(a, a.k_ptr), a.key_rows, a.dtype);
  clear_tail(a.dv, last_of(a, a.k_ptr), a.key_rows, a.dtype);
  if (a.pair_ptr) clear_tail(a.dbias, a.pair_ptr[a.molecules], a.pairs, a.bias_dtype);
  return {dq, dk, dv, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& q_ptr, const Tensor& k_ptr, const OptionalTensor& pair_ptr,
    const OptionalTensor& seed, const Tensor& out, const Tensor& lse, const Tensor& dout,
    const OptionalTensor& dlse, const OptionalTensor& ddq, const OptionalTensor& ddk,
    const OptionalTensor& ddv, const OptionalTensor& ddbias, double scale, double dropout) {
  Call call({q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout});
  AttnParams& a = call.a;
  check_contents(a);
  a.out = call.rows(out, "out", call.out_shape);
  a.lse = call.statistics(lse, "lse");
  a.dout = call.rows(dout, "dout", call.out_shape);
  if (dlse) a.dlse = call.statistics(*dlse, "dlse");
  a.ddq = call.optional_rows(ddq, "ddq", call.q_shape);
  a.ddk = call.optional_rows(ddk, "ddk", call.k_shape);
  a.ddv = call.optional_rows(ddv, "ddv", call.v_shape);
  STD_TORCH_CHECK(bias || !ddbias, "ddbias needs bias");
  if (ddbias)
    a.ddbias = call.reader.read(*ddbias, "ddbias", a.bias_dtype, call.bias_shape, false);
  Tensor gq = call.new_rows(q, call.q_shape, a.gq);
  Tensor gk = call.new_rows(q, call.k_shape, a.gk);
  Tensor gv = call.new_rows(q, call.v_shape, a.gv);
  Tensor gbias = call.new_bias(q, bias.has_value(), a.gbias);
  Tensor gdout = call.new_rows(q, call.out_shape, a.gdout);
  Tensor gdlse = call.new_statistics(q, a.gdlse);
  for (const View* x : {&a.gq, &a.gk, &a.gv, &a.gdout})
    use_large_pages(*x, x == &a.gk || x == &a.gv ? a.key_rows : a.query_rows,
                    stored_size(a.dtype));
  Derivative(a, flops_per_pair(a, 7, 5), true).run();
  clear_tail(a.gq, covered_queries(a), a.query_rows, a.dtype);
  clear_tail(a.gk, last_of(a, a.k_ptr), a.key_rows, a.dtype);
  clear_tail(a.gv, last_of(a, a.k_ptr), a.key_rows, a.dtype);
  if (!a.shared_seeds) {
    clear_tail(a.gdout, covered_queries(a), a.query_rows, a.dtype);
    clear_tail(a.gdlse, covered_queries(a), a.query_rows, call.sums);
  }
  if (a.pair_ptr) clear_tail(a.gbias, a.pair_ptr[a.molecules], a.pairs, a.bias_dtype);
  return {gq, gk, gv, gbias, gdout, gdlse};
}

std::string build_info() {
  std::string out = "cpu: " __VERSION__ "; built for";
  for (const Kernels* k : BUILT) out += std::string(" ") + k->name;
  return out + "; runs " + chosen()->name;
}

// For tests: runs the named code from now on ("" for the default); returns what runs.
std::string use_isa(const std::string& name) {
  for (const Kernels* k : BUILT)
    if (k->runs_here() && (name.empty() || name == k->name)) {
      chosen() = k;
      return k->name;
    }
  STD_TORCH_CHECK(false, "no code for '", name, "' here");
  return "";
}

}  // namespace
}  // namespace attnpool

STABLE_TORCH_LIBRARY_IMPL(attnpool_c, CPU, m) {
  m.impl("forward", TORCH_BOX(&attnpool::forward));
  m.impl("backward", TORCH_BOX(&attnpool::backward));
  m.impl("double_backward", TORCH_BOX(&attnpool::double_backward));
  m.impl("check_ptr", TORCH_BOX(&attnpool::check_ptr));
}

STABLE_TORCH_LIBRARY_IMPL(attnpool_c, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&attnpool::build_info));
  m.impl("_use_isa", TORCH_BOX(&attnpool::use_isa));
}

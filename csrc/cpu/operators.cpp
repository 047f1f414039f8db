// torch.ops.attnpool on the CPU: runs the tasks of a pass on torch's threads and fills what no
// molecule covers. Which code runs (vector width) is decided once, by the machine.
//
// Results do not depend on the number of threads: a task's arithmetic is fixed by its molecule, and
// sums over tasks (seeds; parts of one large molecule) are kept apart and added in order.
#include "../operators.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <limits>

#include "plan.h"

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

// A process made by fork has none of the threads that its parent has used, and GNU's OpenMP waits
// for them for ever: there the calling thread does all of the work.
std::atomic<bool> used_threads{false}, lost_threads{false};

void note_threads() {
#if defined(__linux__)
  if (!used_threads.exchange(true))
    pthread_atfork(nullptr, nullptr, [] { lost_threads = true; });
#endif
}

template <typename F>
void run_parallel(int64_t count, double flops, const F& f) {
  const int64_t threads = std::min<int64_t>(
      {int64_t(torch::stable::get_num_threads()), count, int64_t(flops / TASK_FLOPS) + 1});
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  };
  if (threads <= 1 || lost_threads) return work(0, 1);
  note_threads();
  torch::stable::parallel_for(0, threads, 1, work);
}

void run_plan(const AttnParams& a, Pass pass, const TaskPlan& plan) {
  using Run = void (*)(const AttnParams&, const Task&, void*);
  const Kernels& k = *chosen();
  const size_t bytes = k.scratch_bytes(a, pass, plan.longest);
  const auto run_tasks = [&](Run run, const std::vector<Task>& tasks) {
    run_parallel(int64_t(tasks.size()), plan.flops, [&](int64_t i) {
      static thread_local Buffer scratch;
      run(a, tasks[size_t(i)], scratch.at_least(bytes));
    });
  };
  switch (pass) {
    case Pass::forward:
      run_tasks(k.forward, plan.tasks);
      run_parallel(int64_t(plan.merges.size()) * a.heads, plan.flops, [&](int64_t i) {
        k.merge_parts(a, plan.merges[size_t(i / a.heads)], i % a.heads);
      });
      break;
    case Pass::backward:
      run_tasks(k.norms, plan.statistics);
      run_tasks(k.backward, plan.tasks);
      break;
    case Pass::double_backward:
      run_tasks(k.statistics, plan.statistics);
      run_tasks(k.double_backward, plan.tasks);
      break;
  }
  run_parallel(int64_t(plan.sums.size()) * a.heads, plan.flops, [&](int64_t i) {
    k.add_parts(a, plan.sums[size_t(i / a.heads)], i % a.heads);
  });
}

// A result: contiguous rows, of which molecules cover the first ones. The others hold `rest`.
struct Output {
  View x;
  Dtype dtype;
  int64_t covered, rows;
  double rest = 0;

  template <typename F>
  void with_rows(int64_t first, const F& f) const {
    const size_t element = dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
    char* const data = static_cast<char*>(x.data);
    if (data && first < rows)
      f(data + size_t(first * x.row) * element, data + size_t(rows * x.row) * element);
  }

  // Asks for large pages: for outputs of many megabytes the page faults of small ones cost more
  // than the kernel (measured: up to 60 % of a forward pass).
  void use_large_pages() const {
#if defined(__linux__)
    with_rows(0, [](char* begin, char* end) {
      constexpr uintptr_t PAGE = 2 << 20;
      const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + PAGE - 1) / PAGE * PAGE;
      const uintptr_t last = reinterpret_cast<uintptr_t>(end) / PAGE * PAGE;
      if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
    });
#endif
  }

  void fill_rest() const {
    with_rows(covered, [&](char* begin, char* end) {
      if (rest == 0) std::fill(begin, end, 0);
      else if (dtype == Dtype::float64)
        std::fill(reinterpret_cast<double*>(begin), reinterpret_cast<double*>(end), rest);
      else std::fill(reinterpret_cast<float*>(begin), reinterpret_cast<float*>(end), float(rest));
    });
  }
};

int64_t last_of(const AttnParams& a, const void* ptr) {
  return a.ptr_is_64 ? static_cast<const int64_t*>(ptr)[a.molecules]
                     : static_cast<const int32_t*>(ptr)[a.molecules];
}

std::vector<Output> outputs_of(const Call& call, Pass pass) {
  const AttnParams& a = call.a;
  const int64_t keys = last_of(a, a.k_ptr), pairs = a.pair_ptr ? a.pair_ptr[a.molecules] : 0;
  const int64_t queries = a.shared_seeds ? a.query_rows : last_of(a, a.q_ptr);
  const int64_t copies = a.shared_seeds ? a.molecules : 1;  // of the seeds
  const int64_t covered = copies * queries, rows = copies * a.query_rows;
  if (pass == Pass::forward)
    return {{a.out, a.dtype, covered, rows},
            {a.lse, call.sums, covered, rows, -std::numeric_limits<double>::infinity()}};
  if (pass == Pass::backward)
    return {{a.dq, a.dtype, queries, a.query_rows},
            {a.dk, a.dtype, keys, a.key_rows},
            {a.dv, a.dtype, keys, a.key_rows},
            {a.dbias, a.bias_dtype, pairs, a.pairs},
            {a.dkey_bias, a.key_bias_dtype, keys, a.key_rows}};
  return {{a.gq, a.dtype, queries, a.query_rows},
          {a.gk, a.dtype, keys, a.key_rows},
          {a.gv, a.dtype, keys, a.key_rows},
          {a.gbias, a.bias_dtype, pairs, a.pairs},
          {a.gkey_bias, a.key_bias_dtype, keys, a.key_rows},
          {a.gdout, a.dtype, covered, rows},
          {a.gdlse, call.sums, covered, rows}};
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

void run(Pass pass, const Call& call) {
  STD_TORCH_CHECK(call.a.head_dim <= MAX_WIDTH && call.a.value_dim <= MAX_WIDTH,
                  "CPU kernels: head and value widths must be at most ", MAX_WIDTH, ", got ",
                  call.a.head_dim, " and ", call.a.value_dim);
  check_contents(call.a);
  const std::vector<Output> outputs = outputs_of(call, pass);
  for (const Output& x : outputs) x.use_large_pages();
  run_plan(call.a, pass,
           plan_tasks(call.a, pass, *chosen(), int64_t(torch::stable::get_num_threads())));
  for (const Output& x : outputs) x.fill_rest();
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

STABLE_TORCH_LIBRARY_IMPL(attnpool, CPU, m) {
  attnpool::register_operators<attnpool::run>(m);
  m.impl("check_ptr", TORCH_BOX(&attnpool::check_ptr));
}

STABLE_TORCH_LIBRARY_IMPL(attnpool, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&attnpool::build_info));
  m.impl("_use_isa", TORCH_BOX(&attnpool::use_isa));
}

// The three passes of the CPU kernels without torch or Python, on inputs made of integers, so that
// every machine and compiler has the same ones. Prints every result: a line "name count", then a
// number a line. tests/tools/processors.py compares two processors with it.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/plan.h"
#include "cpu/simd.h"

using namespace attnpool;
using namespace attnpool::ATTN_ISA;

namespace {

using Bytes = std::vector<char>;

// Another number in [-1, 1) at each call: a multiple of 2^-10, exact in float16, not in bfloat16.
struct Numbers {
  uint32_t state;
  double next() {
    state = state * 1664525u + 1013904223u;
    return double(state >> 21) / 1024 - 1;
  }
};

size_t element(Dtype type) { return type == Dtype::float64 ? 8 : type == Dtype::float32 ? 4 : 2; }

void put(void* data, size_t i, Dtype type, double x) {
  switch (type) {
    case Dtype::float64: static_cast<double*>(data)[i] = x; break;
    case Dtype::float32: static_cast<float*>(data)[i] = float(x); break;
    case Dtype::float16: static_cast<Half*>(data)[i] = to_half(float(x)); break;
    case Dtype::bfloat16: static_cast<Bfloat16*>(data)[i] = to_bfloat16(float(x)); break;
  }
}

double get(const void* data, size_t i, Dtype type) {
  switch (type) {
    case Dtype::float64: return static_cast<const double*>(data)[i];
    case Dtype::float32: return double(static_cast<const float*>(data)[i]);
    case Dtype::float16: return double(to_float(static_cast<const Half*>(data)[i]));
    default: return double(to_float(static_cast<const Bfloat16*>(data)[i]));
  }
}

struct Case {
  const char* name;
  std::vector<int64_t> keys, queries;  // of each molecule; queries of none: the keys attend
  int64_t seeds, heads, width, value_width;
  bool biases;
  double dropout;
  Dtype type;
};

class Batch {
 public:
  explicit Batch(const Case& x)
      : case_(x), sums_(x.type == Dtype::float64 ? x.type : Dtype::float32) {
    const size_t molecules = x.keys.size();
    const std::vector<int64_t>& queries = x.queries.empty() ? x.keys : x.queries;
    k_ptr_ = q_ptr_ = pair_ptr_ = {0};
    for (size_t b = 0; b < molecules; ++b) {
      k_ptr_.push_back(k_ptr_.back() + x.keys[b]);
      q_ptr_.push_back(q_ptr_.back() + queries[b]);
      pair_ptr_.push_back(pair_ptr_.back() + (x.seeds ? x.seeds : queries[b]) * x.keys[b]);
    }
    a_.molecules = int64_t(molecules);
    a_.heads = x.heads;
    a_.head_dim = x.width;
    a_.value_dim = x.value_width;
    a_.shared_seeds = x.seeds > 0;
    a_.query_rows = x.seeds ? x.seeds : q_ptr_.back();
    a_.key_rows = k_ptr_.back();
    a_.ptr_is_64 = 1;
    a_.q_ptr = x.seeds ? nullptr : q_ptr_.data();
    a_.k_ptr = k_ptr_.data();
    a_.dtype = a_.bias_dtype = a_.key_bias_dtype = x.type;
    a_.scale = 1 / std::sqrt(double(x.width));
    a_.keep_scale = 1 / (1 - x.dropout);
    a_.drop_threshold = uint32_t(std::floor(x.dropout * 4294967296.0));
    if (x.dropout > 0) a_.seed = &seed_;
    rows_ = a_.shared_seeds ? a_.molecules * a_.query_rows : a_.query_rows;
    if (!x.biases) return;
    a_.pairs = pair_ptr_.back();
    a_.pair_ptr = pair_ptr_.data();
  }

  void run() {
    const int64_t d = a_.head_dim, dv = a_.value_dim;
    a_.q = rows(a_.query_rows, d);
    a_.k = rows(a_.key_rows, d);
    a_.v = rows(a_.key_rows, dv);
    if (case_.biases) {
      a_.bias = statistics(a_.pairs, a_.dtype);
      a_.key_bias = statistics(a_.key_rows, a_.dtype);
      for (int64_t i = 0; i < a_.key_rows; i += 7)
        put(a_.key_bias.data, size_t(i), a_.dtype, -INFINITY);
    }
    a_.out = of_queries(rows(rows_, dv));
    a_.lse = of_queries(statistics(rows_, sums_));
    pass(Pass::forward, {{"out", a_.out, rows_, dv, a_.dtype}, {"lse", a_.lse, rows_, 0, sums_}});

    a_.dout = of_queries(rows(rows_, dv));
    a_.dlse = of_queries(statistics(rows_, sums_));
    a_.dq = rows(a_.query_rows, d);
    a_.dk = rows(a_.key_rows, d);
    a_.dv = rows(a_.key_rows, dv);
    if (case_.biases) {
      a_.dbias = statistics(a_.pairs, a_.dtype);
      a_.dkey_bias = statistics(a_.key_rows, a_.dtype);
    }
    pass(Pass::backward, {{"dq", a_.dq, a_.query_rows, d, a_.dtype},
                          {"dk", a_.dk, a_.key_rows, d, a_.dtype},
                          {"dv", a_.dv, a_.key_rows, dv, a_.dtype},
                          {"dbias", a_.dbias, a_.pairs, 0, a_.dtype},
                          {"dkey_bias", a_.dkey_bias, a_.key_rows, 0, a_.dtype}});

    a_.ddq = rows(a_.query_rows, d);
    a_.ddk = rows(a_.key_rows, d);
    a_.ddv = rows(a_.key_rows, dv);
    a_.gq = rows(a_.query_rows, d);
    a_.gk = rows(a_.key_rows, d);
    a_.gv = rows(a_.key_rows, dv);
    a_.gdout = of_queries(rows(rows_, dv));
    a_.gdlse = of_queries(statistics(rows_, sums_));
    if (case_.biases) {
      a_.ddbias = statistics(a_.pairs, a_.dtype);
      a_.ddkey_bias = statistics(a_.key_rows, a_.dtype);
      a_.gbias = statistics(a_.pairs, a_.dtype);
      a_.gkey_bias = statistics(a_.key_rows, a_.dtype);
    }
    pass(Pass::double_backward, {{"gq", a_.gq, a_.query_rows, d, a_.dtype},
                                 {"gk", a_.gk, a_.key_rows, d, a_.dtype},
                                 {"gv", a_.gv, a_.key_rows, dv, a_.dtype},
                                 {"gdout", a_.gdout, rows_, dv, a_.dtype},
                                 {"gdlse", a_.gdlse, rows_, 0, sums_},
                                 {"gbias", a_.gbias, a_.pairs, 0, a_.dtype},
                                 {"gkey_bias", a_.gkey_bias, a_.key_rows, 0, a_.dtype}});
  }

 private:
  struct Result {
    const char* name;
    View x;
    int64_t rows, width;  // width 0: one number a head
    Dtype type;
  };

  View made(int64_t rows, int64_t width, Dtype type) {
    const size_t count = size_t(rows * a_.heads * std::max<int64_t>(width, 1));
    memory_.emplace_back(count * element(type) + 1);  // never empty: no null pointer
    for (size_t i = 0; i < count; ++i) put(memory_.back().data(), i, type, numbers_.next());
    const int64_t head = std::max<int64_t>(width, 1);
    return {memory_.back().data(), 0, a_.heads * head, head, width ? 1 : 0};
  }
  View rows(int64_t count, int64_t width) { return made(count, width, a_.dtype); }
  View statistics(int64_t count, Dtype type) { return made(count, 0, type); }
  View of_queries(View x) const {
    if (a_.shared_seeds) x.molecule = a_.query_rows * x.row;
    return x;
  }

  void pass(Pass pass, const std::vector<Result>& results) {
    const TaskPlan plan = plan_tasks(a_, pass, kernels, 2);
    Buffer scratch;
    void* const at = scratch.at_least(kernels.scratch_bytes(a_, pass, plan.longest));
    for (const Task& task : plan.statistics)
      (pass == Pass::backward ? kernels.norms : kernels.statistics)(a_, task, at);
    const auto run = pass == Pass::forward    ? kernels.forward
                     : pass == Pass::backward ? kernels.backward
                                              : kernels.double_backward;
    for (const Task& task : plan.tasks) run(a_, task, at);
    for (const SumOfParts& sum : plan.sums)
      for (int64_t h = 0; h < a_.heads; ++h) kernels.add_parts(a_, sum, h);
    for (const Result& x : results) print(x);
  }

  void print(const Result& result) const {
    if (!result.x.data) return;
    const int64_t count = result.rows * a_.heads * std::max<int64_t>(result.width, 1);
    std::printf("%s.%s %lld\n", case_.name, result.name, static_cast<long long>(count));
    for (int64_t i = 0; i < count; ++i)
      std::printf("%.17g\n", get(result.x.data, size_t(i), result.type));
  }

  const Case& case_;
  const Dtype sums_;
  AttnParams a_{};
  Numbers numbers_{1};
  std::vector<int64_t> k_ptr_, q_ptr_, pair_ptr_;
  std::vector<Bytes> memory_;
  int64_t rows_ = 0;
  const int64_t seed_ = 11;
};

}  // namespace

int main() {
  const Dtype f16 = Dtype::float16, b16 = Dtype::bfloat16;
  const Dtype f32 = Dtype::float32, f64 = Dtype::float64;
  const Case cases[] = {
      {"float32 small", {5, 3, 0, 1, 18, 33, 64}, {}, 0, 2, 32, 32, false, 0, f32},
      {"float64 small", {5, 3, 0, 1, 18, 33, 64}, {}, 0, 2, 32, 32, false, 0, f64},
      {"float16 small", {5, 3, 0, 1, 18, 33, 64}, {}, 0, 2, 32, 32, false, 0, f16},
      {"bfloat16 small", {5, 3, 0, 1, 18, 33, 64}, {}, 0, 2, 32, 32, false, 0, b16},
      {"float32 large", {129, 70, 200}, {}, 0, 2, 64, 24, false, 0, f32},
      {"float64 large", {129, 70}, {}, 0, 1, 20, 24, false, 0, f64},
      {"float32 options", {9, 70, 33}, {}, 0, 2, 20, 5, true, 0.25, f32},
      {"float64 options", {9, 70, 33}, {}, 0, 2, 20, 5, true, 0.25, f64},
      {"float16 options", {9, 70, 33}, {}, 0, 2, 20, 5, true, 0.25, f16},
      {"bfloat16 options", {9, 70, 33}, {}, 0, 2, 20, 5, true, 0.25, b16},
      {"float32 cross", {9, 0, 140}, {3, 5, 65}, 0, 2, 16, 16, true, 0, f32},
      {"float32 seeds", {9, 70, 0, 33}, {}, 4, 4, 32, 32, true, 0, f32},
      {"float64 seeds", {9, 70, 0, 33}, {}, 4, 4, 32, 32, true, 0, f64},
      {"float32 parts", {2100, 30}, {64, 30}, 0, 1, 16, 16, false, 0, f32},
  };
  for (const Case& x : cases) Batch(x).run();
}

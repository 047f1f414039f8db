// A program without Python: loads the CPU library (argv[1]), finds its operators in torch's
// dispatcher, compares attnpool::attention with torch's own softmax, and calls all three with what
// cannot be, which must throw. Prints what is wrong.
#include <ATen/ops/allclose.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sum.h>
#include <attnpool_kernels/attention.h>
#include <dlfcn.h>

#include <cmath>
#include <functional>
#include <iostream>
#include <vector>

using namespace attnpool_kernels;
using Backward = AttentionBackward;
using DoubleBackward = AttentionDoubleBackward;

// The arguments of all three passes, right ones; a test spoils one.
struct Arguments {
  Tensor q = at::randn({5, 2, 8}), k = at::randn({5, 2, 8}), v = at::randn({5, 2, 3});
  OptionalTensor bias, key_bias, q_ptr, pair_ptr, seed;
  Tensor k_ptr, out, lse, dout = at::randn({5, 2, 3});
  OptionalTensor dlse, ddq, ddk, ddv, ddbias, ddkey_bias;
  double scale = 0.5, dropout = 0;
};

Tensor integers(std::vector<int64_t> x, at::ScalarType type = at::kLong) {
  Tensor found = at::full({int64_t(x.size())}, 0, at::kLong);
  std::copy(x.begin(), x.end(), found.data_ptr<int64_t>());
  return found.to(type);
}

int refuses_what_cannot_be() {
  const auto first = find<Attention>("attnpool::attention");
  const auto second = find<Backward>("attnpool::attention_backward");
  const auto third = find<DoubleBackward>("attnpool::attention_double_backward");
  const auto run = [&](Arguments& a, int pass) {
    if (pass == 1)
      first.call(a.q, a.k, a.v, a.bias, a.key_bias, a.q_ptr, a.k_ptr, a.pair_ptr, a.seed, a.scale,
                 a.dropout);
    if (pass == 2)
      second.call(a.q, a.k, a.v, a.bias, a.key_bias, a.q_ptr, a.k_ptr, a.pair_ptr, a.seed, a.out,
                  a.lse, a.dout, a.dlse, a.scale, a.dropout, false);
    if (pass == 3)
      third.call(a.q, a.k, a.v, a.bias, a.key_bias, a.q_ptr, a.k_ptr, a.pair_ptr, a.seed, a.out,
                 a.lse, a.dout, a.dlse, a.ddq, a.ddk, a.ddv, a.ddbias, a.ddkey_bias, a.scale,
                 a.dropout);
  };
  const auto right = [&] {
    Arguments a;
    a.k_ptr = integers({0, 2, 5});
    a.q_ptr = a.k_ptr;
    std::tie(a.out, a.lse) =
        first.call(a.q, a.k, a.v, {}, {}, a.q_ptr, a.k_ptr, {}, {}, a.scale, a.dropout);
    return a;
  };
  using Spoil = std::function<void(Arguments&)>;
  const Tensor none, halves = at::full({5, 2, 8}, 1.0, at::kHalf);
  const Tensor meta = at::full({5, 2, 8}, 1.0, at::TensorOptions().device(at::kMeta));
  struct Case {
    const char* name;
    int pass;  // the first that takes the argument
    Spoil spoil;
  };
  const std::vector<Case> cases = {
      {"undefined q", 1, [&](Arguments& a) { a.q = none; }},
      {"undefined k", 1, [&](Arguments& a) { a.k = none; }},
      {"undefined v", 1, [&](Arguments& a) { a.v = none; }},
      {"undefined k_ptr", 1, [&](Arguments& a) { a.k_ptr = none; }},
      {"empty k_ptr", 1, [&](Arguments& a) { a.k_ptr = integers({}); }},
      {"half q", 1, [&](Arguments& a) { a.q = halves; }},
      {"half k", 1, [&](Arguments& a) { a.k = halves; }},
      {"integer q, k, v", 1, [&](Arguments& a) { a.q = a.k = a.v = a.q.to(at::kLong); }},
      {"complex q, k, v", 1, [&](Arguments& a) { a.q = a.k = a.v = a.q.to(at::kComplexFloat); }},
      {"q of 2 dimensions", 1, [&](Arguments& a) { a.q = a.q.flatten(1); }},
      {"q of 0 dimensions", 1, [&](Arguments& a) { a.q = a.q.sum(); }},
      {"k of other heads", 1, [&](Arguments& a) { a.k = a.k.slice(1, 0, 1); }},
      {"k of another width", 1, [&](Arguments& a) { a.k = a.k.slice(2, 0, 4); }},
      {"v of other rows", 1, [&](Arguments& a) { a.v = a.v.slice(0, 0, 4); }},
      {"no heads", 1, [&](Arguments& a) { a.q = a.k = a.v = a.q.slice(1, 0, 0); }},
      {"no width", 1, [&](Arguments& a) { a.q = a.k = a.q.slice(2, 0, 0); }},
      {"width 513", 1, [&](Arguments& a) { a.q = a.k = at::randn({5, 2, 513}); }},
      {"k on another device", 1, [&](Arguments& a) { a.k = meta; }},
      {"k_ptr on another device", 1, [&](Arguments& a) { a.k_ptr = a.k_ptr.to(at::kMeta); }},
      {"q_ptr of another length", 1, [&](Arguments& a) { a.q_ptr = integers({0, 5}); }},
      {"q_ptr of another dtype", 1, [&](Arguments& a) { a.q_ptr = integers({0, 2, 5}, at::kInt); }},
      {"k_ptr of floats", 1, [&](Arguments& a) { a.k_ptr = a.k_ptr.to(at::kFloat); }},
      {"k_ptr not contiguous", 1,
       [&](Arguments& a) { a.k_ptr = integers({0, 0, 2, 2, 5, 5}).slice(0, 0, 6, 2); }},
      {"k_ptr of 2 dimensions", 1, [&](Arguments& a) { a.k_ptr = a.k_ptr.unsqueeze(0); }},
      {"k_ptr[0] = 1", 1, [&](Arguments& a) { a.k_ptr = integers({1, 2, 5}); }},
      {"k_ptr decreases", 1, [&](Arguments& a) { a.k_ptr = integers({0, 4, 3}); }},
      {"k_ptr behind the rows", 1, [&](Arguments& a) { a.k_ptr = integers({0, 2, 6}); }},
      {"q_ptr behind the rows", 1, [&](Arguments& a) { a.q_ptr = integers({0, 2, 900}); }},
      {"negative k_ptr", 1, [&](Arguments& a) { a.k_ptr = integers({0, -2, 5}); }},
      {"bias without pair_ptr", 1, [&](Arguments& a) { a.bias = at::randn({13, 2}); }},
      {"pair_ptr without bias", 1, [&](Arguments& a) { a.pair_ptr = integers({0, 4, 13}); }},
      {"wrong pair_ptr", 1,
       [&](Arguments& a) { a.bias = at::randn({13, 2}), a.pair_ptr = integers({0, 5, 13}); }},
      {"bias of too few rows", 1,
       [&](Arguments& a) { a.bias = at::randn({12, 2}), a.pair_ptr = integers({0, 4, 13}); }},
      {"key_bias of other rows", 1, [&](Arguments& a) { a.key_bias = at::randn({4, 2}); }},
      {"key_bias of 1 dimension", 1, [&](Arguments& a) { a.key_bias = at::randn({5}); }},
      {"double key_bias", 1,
       [&](Arguments& a) { a.key_bias = at::randn({5, 2}).to(at::kDouble); }},
      {"dropout 1", 1, [&](Arguments& a) { a.dropout = 1, a.seed = integers({3}); }},
      {"dropout NaN", 1, [&](Arguments& a) { a.dropout = NAN, a.seed = integers({3}); }},
      {"dropout without seed", 1, [&](Arguments& a) { a.dropout = 0.5; }},
      {"seed without dropout", 1, [&](Arguments& a) { a.seed = integers({3}); }},
      {"two seeds", 1, [&](Arguments& a) { a.dropout = 0.5, a.seed = integers({3, 4}); }},
      {"undefined out", 2, [&](Arguments& a) { a.out = none; }},
      {"undefined lse", 2, [&](Arguments& a) { a.lse = none; }},
      {"undefined dout", 2, [&](Arguments& a) { a.dout = none; }},
      {"dout of another shape", 2, [&](Arguments& a) { a.dout = a.dout.slice(0, 0, 4); }},
      {"lse of another dtype", 2, [&](Arguments& a) { a.lse = a.lse.to(at::kDouble); }},
      {"dlse of another shape", 2, [&](Arguments& a) { a.dlse = at::randn({5, 1}); }},
      {"ddq of another shape", 3, [&](Arguments& a) { a.ddq = at::randn({5, 2, 7}); }},
      {"ddbias without bias", 3, [&](Arguments& a) { a.ddbias = at::randn({13, 2}); }},
      {"ddkey_bias without key_bias", 3,
       [&](Arguments& a) { a.ddkey_bias = at::randn({5, 2}); }},
  };
  int wrong = 0;
  for (int pass = 1; pass <= 3; ++pass) {
    Arguments a = right();
    run(a, pass);  // throws where the right ones are refused
  }
  for (const Case& x : cases)
    for (int pass = x.pass; pass <= 3; ++pass) {
      Arguments a = right();
      x.spoil(a);
      try {
        run(a, pass);
        std::cout << "pass " << pass << " takes " << x.name << "\n", ++wrong;
      } catch (const std::exception&) {
      }
    }
  return wrong;
}

// Here is no autograd for the operator: a result that lost its gradient must not come out.
int refuses_to_lose_gradients() {
  const Tensor leaf = at::randn({5, 2, 8}).requires_grad_(), q = leaf.mul(2);
  const Tensor ptr = integers({0, 2, 5});
  const auto call = [&] { attention(q, q, q, ptr, ptr); };
  {
    const at::NoGradGuard guard;
    call();
  }
  try {
    call();
  } catch (const std::exception& error) {
    return std::string(error.what()).find("derivative") == std::string::npos;
  }
  return std::cout << "a gradient was lost\n", 1;
}

int main(int, char** argv) {
  if (dlsym(RTLD_DEFAULT, "Py_Initialize")) return std::cout << "Python is here\n", 1;
  if (!dlopen(argv[1], RTLD_NOW)) return std::cout << dlerror() << "\n", 1;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const char* name : {"attnpool::attention_backward", "attnpool::attention_double_backward"})
    if (!dispatcher.findSchema({name, ""})) return std::cout << "no " << name << "\n", 1;

  const int64_t edges[] = {0, 3, 3, 20}, rows = 22;  // the last two belong to no molecule
  const double scale = 0.3;
  Tensor ptr = at::full({4}, 0, at::kLong);
  std::copy(edges, edges + 4, ptr.data_ptr<int64_t>());
  const Tensor q = at::randn({rows, 2, 8}), k = at::randn({rows, 2, 8});
  const Tensor v = at::randn({rows, 2, 5});
  const auto [out, lse] = attention(q, k, v, ptr, ptr, {.scale = scale});

  Tensor right = at::full({rows, 2, 5}, 0.0), right_lse = at::full({rows, 2}, -INFINITY);
  for (int b = 0; b < 3; ++b) {
    const auto own = [&](const Tensor& x) { return x.slice(0, edges[b], edges[b + 1]); };
    const Tensor logits = at::einsum("ihd,jhd->ihj", {own(q), own(k)}).mul(scale);
    own(right).copy_(at::einsum("ihj,jhd->ihd", {at::softmax(logits, 2), own(v)}));
    if (edges[b] < edges[b + 1]) own(right_lse).copy_(at::logsumexp(logits, {2}));
  }
  if (!at::allclose(out, right, 1e-5, 1e-6)) return std::cout << "wrong out\n", 1;
  if (!at::allclose(lse, right_lse, 1e-5, 1e-6)) return std::cout << "wrong lse\n", 1;
  return refuses_what_cannot_be() + refuses_to_lose_gradients();
}

// A program without Python: loads the CPU library (argv[1]), finds its operators in torch's
// dispatcher and compares attnpool::attention with torch's own softmax. Prints what is wrong.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>
#include <dlfcn.h>

#include <iostream>

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Attention = std::tuple<Tensor, Tensor>(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& key_bias, const OptionalTensor& q_ptr, const Tensor& k_ptr,
    const OptionalTensor& pair_ptr, const OptionalTensor& seed, double scale, double dropout);

int main(int, char** argv) {
  if (dlsym(RTLD_DEFAULT, "Py_Initialize")) return std::cout << "Python is here\n", 1;
  if (!dlopen(argv[1], RTLD_NOW)) return std::cout << dlerror() << "\n", 1;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const char* name : {"attnpool::attention_backward", "attnpool::attention_double_backward"})
    if (!dispatcher.findSchema({name, ""})) return std::cout << "no " << name << "\n", 1;
  const auto attention =
      dispatcher.findSchemaOrThrow("attnpool::attention", "").typed<Attention>();

  const int64_t edges[] = {0, 3, 3, 20}, rows = 22;  // the last two belong to no molecule
  const double scale = 0.3;
  Tensor ptr = at::full({4}, 0, at::kLong);
  std::copy(edges, edges + 4, ptr.data_ptr<int64_t>());
  const Tensor q = at::randn({rows, 2, 8}), k = at::randn({rows, 2, 8});
  const Tensor v = at::randn({rows, 2, 5});
  const auto [out, lse] = attention.call(q, k, v, {}, {}, ptr, ptr, {}, {}, scale, 0.0);

  Tensor right = at::full({rows, 2, 5}, 0.0), right_lse = at::full({rows, 2}, -INFINITY);
  for (int b = 0; b < 3; ++b) {
    const auto own = [&](const Tensor& x) { return x.slice(0, edges[b], edges[b + 1]); };
    const Tensor logits = at::einsum("ihd,jhd->ihj", {own(q), own(k)}).mul(scale);
    own(right).copy_(at::einsum("ihj,jhd->ihd", {at::softmax(logits, 2), own(v)}));
    if (edges[b] < edges[b + 1]) own(right_lse).copy_(at::logsumexp(logits, {2}));
  }
  if (!at::allclose(out, right, 1e-5, 1e-6)) return std::cout << "wrong out\n", 1;
  if (!at::allclose(lse, right_lse, 1e-5, 1e-6)) return std::cout << "wrong lse\n", 1;
}

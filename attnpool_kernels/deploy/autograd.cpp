// attnpool_autograd::attention: the operator of library.cpp with its derivatives to second order, in
// C++, for programs in which Python does not register them (TorchScript models in LAMMPS and other
// engines). The equations are those of attnpool_kernels/autograd.py.
//
// torch's stable ABI offers no autograd, so this one file is built against the torch that loads it:
// by CMake (attnpool_kernels-config.cmake) or by attnpool_kernels.deploy.build_autograd.
// Load it before or after the libraries of the kernels.
#include <attnpool_kernels/attention.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using attnpool_kernels::Attention;
using attnpool_kernels::AttentionBackward;
using attnpool_kernels::AttentionDoubleBackward;
using attnpool_kernels::OptionalTensor;

template <typename Signature, typename... Arguments>
auto call(const char* name, Arguments&&... arguments) {
  // Not a static of the function: kernels may be loaded after this library.
  const auto operation = attnpool_kernels::find<Signature>(name);
  at::AutoDispatchBelowAutograd guard;
  return operation.call(std::forward<Arguments>(arguments)...);
}

OptionalTensor optional(const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }
Tensor or_undefined(const OptionalTensor& x) { return x.value_or(Tensor()); }

// Places in what is saved, and in the gradients of the arguments, which are in that order.
enum : size_t { Q, K, V, BIAS, KEY_BIAS, Q_PTR, K_PTR, PAIR_PTR, SEED, OPERANDS };
enum : size_t { OUT = OPERANDS, LSE, DOUT, DLSE };

struct Third : Function<Third> {
  static variable_list forward(
      AutogradContext*, const Tensor& q, const Tensor& k, const Tensor& v,
      const OptionalTensor& bias, const OptionalTensor& key_bias, const OptionalTensor& q_ptr,
      const Tensor& k_ptr, const OptionalTensor& pair_ptr, const OptionalTensor& seed,
      const Tensor& out, const Tensor& lse, const Tensor& dout, const OptionalTensor& dlse,
      const OptionalTensor& ddq, const OptionalTensor& ddk, const OptionalTensor& ddv,
      const OptionalTensor& ddbias, const OptionalTensor& ddkey_bias, double scale,
      double dropout) {
    const auto [gq, gk, gv, gbias, gkey_bias, gdout, gdlse] = call<AttentionDoubleBackward>(
        "attnpool::attention_double_backward", q, k, v, bias, key_bias, q_ptr, k_ptr, pair_ptr,
        seed, out, lse, dout, dlse, ddq, ddk, ddv, ddbias, ddkey_bias, scale, dropout);
    return {gq, gk, gv, gbias, gkey_bias, gdout, gdlse};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "attnpool_autograd::attention has no third derivative");
  }
};

struct Second : Function<Second> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
      const OptionalTensor& bias, const OptionalTensor& key_bias, const OptionalTensor& q_ptr,
      const Tensor& k_ptr, const OptionalTensor& pair_ptr, const OptionalTensor& seed,
      const Tensor& out, const Tensor& lse, const Tensor& dout, const OptionalTensor& dlse,
      double scale, double dropout, bool need_dbias) {
    const auto [dq, dk, dv, dbias, dkey_bias] = call<AttentionBackward>(
        "attnpool::attention_backward", q, k, v, bias, key_bias, q_ptr, k_ptr, pair_ptr, seed, out,
        lse, dout, dlse, scale, dropout, need_dbias);
    ctx->save_for_backward({q, k, v, or_undefined(bias), or_undefined(key_bias),
                            or_undefined(q_ptr), k_ptr, or_undefined(pair_ptr), or_undefined(seed),
                            out, lse, dout, or_undefined(dlse)});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout"] = dropout;
    ctx->set_materialize_grads(false);
    variable_list constants;
    if (!need_dbias) constants.push_back(dbias);
    if (!key_bias) constants.push_back(dkey_bias);
    ctx->mark_non_differentiable(constants);
    return {dq, dk, dv, dbias, dkey_bias};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dd) {
    const variable_list x = ctx->get_saved_variables();
    const variable_list g = Third::apply(
        x[Q], x[K], x[V], optional(x[BIAS]), optional(x[KEY_BIAS]), optional(x[Q_PTR]), x[K_PTR],
        optional(x[PAIR_PTR]), optional(x[SEED]), x[OUT], x[LSE], x[DOUT], optional(x[DLSE]),
        optional(dd[0]), optional(dd[1]), optional(dd[2]), optional(dd[3]), optional(dd[4]),
        ctx->saved_data["scale"].toDouble(), ctx->saved_data["dropout"].toDouble());
    variable_list found(DLSE + 1 + 3);  // and of scale, dropout, need_dbias
    // out and lse are functions of the operands, whose gradients have theirs.
    for (size_t i : {Q, K, V}) found[i] = g[i];
    if (x[BIAS].defined()) found[BIAS] = g[3];
    if (x[KEY_BIAS].defined()) found[KEY_BIAS] = g[4];
    found[DOUT] = g[5];
    if (x[DLSE].defined()) found[DLSE] = g[6];
    return found;
  }
};

struct First : Function<First> {
  static variable_list forward(
      AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& v,
      const OptionalTensor& bias, const OptionalTensor& key_bias, const OptionalTensor& q_ptr,
      const Tensor& k_ptr, const OptionalTensor& pair_ptr, const OptionalTensor& seed,
      double scale, double dropout) {
    const auto [out, lse] = call<Attention>("attnpool::attention", q, k, v, bias, key_bias, q_ptr,
                                          k_ptr, pair_ptr, seed, scale, dropout);
    ctx->save_for_backward({q, k, v, or_undefined(bias), or_undefined(key_bias),
                            or_undefined(q_ptr), k_ptr, or_undefined(pair_ptr), or_undefined(seed),
                            out, lse});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout"] = dropout;
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const variable_list x = ctx->get_saved_variables();
    // Variables are counted without absent ones: a bias that is there is the fourth.
    const bool need_dbias = x[BIAS].defined() && ctx->needs_input_grad(BIAS);
    const Tensor dout =
        dy[0].defined() ? dy[0] : x[OUT].new_zeros({1}).expand_as(x[OUT]);
    const variable_list d = Second::apply(
        x[Q], x[K], x[V], optional(x[BIAS]), optional(x[KEY_BIAS]), optional(x[Q_PTR]), x[K_PTR],
        optional(x[PAIR_PTR]), optional(x[SEED]), x[OUT], x[LSE], dout, optional(dy[1]),
        ctx->saved_data["scale"].toDouble(), ctx->saved_data["dropout"].toDouble(), need_dbias);
    variable_list found(OPERANDS + 2);  // and of scale and dropout
    for (size_t i : {Q, K, V}) found[i] = d[i];
    if (need_dbias) found[BIAS] = d[3];
    if (x[KEY_BIAS].defined()) found[KEY_BIAS] = d[4];
    return found;
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const OptionalTensor& bias, const OptionalTensor& key_bias,
                                     const OptionalTensor& q_ptr, const Tensor& k_ptr,
                                     const OptionalTensor& pair_ptr, const OptionalTensor& seed,
                                     double scale, double dropout) {
  const Tensor* const required[] = {&q, &k, &v, &k_ptr};
  for (const Tensor* x : required)
    TORCH_CHECK(x->defined(), "attnpool_autograd::attention: q, k, v, k_ptr must be defined");
  const variable_list y =
      First::apply(q, k, v, bias, key_bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout);
  return {y[0], y[1]};
}

}  // namespace

// Python registers the same operator with its own derivatives where the package is imported; who
// comes first stays.
TORCH_LIBRARY_FRAGMENT(attnpool_autograd, m) {
  if (c10::Dispatcher::singleton().findSchema({"attnpool_autograd::attention", ""})) return;
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, Tensor? q_ptr, "
      "Tensor k_ptr, Tensor? pair_ptr, Tensor? seed, float scale, float dropout) "
      "-> (Tensor, Tensor)",
      &attention);
}

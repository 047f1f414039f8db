// Set attention and seed pooling for C++ programs: the operators of torch's dispatcher by name. Load
// the libraries that `python -m attnpool_kernels.deploy libraries` lists, and for derivatives the
// one that `... autograd FILE.so` builds; with CMake, attnpool_kernels::kernels or ::autograd.
//
// A wrong argument is a c10::Error that names it. Schemas: tests/deploy/test_schemas.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <optional>
#include <tuple>

namespace attnpool_kernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// attnpool::attention and attnpool_autograd::attention
using Attention = std::tuple<Tensor, Tensor>(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& key_bias, const OptionalTensor& q_ptr, const Tensor& k_ptr,
    const OptionalTensor& pair_ptr, const OptionalTensor& seed, double scale, double dropout);
// attnpool::attention_backward
using AttentionBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& key_bias, const OptionalTensor& q_ptr, const Tensor& k_ptr,
    const OptionalTensor& pair_ptr, const OptionalTensor& seed, const Tensor& out,
    const Tensor& lse, const Tensor& dout, const OptionalTensor& dlse, double scale,
    double dropout, bool need_dbias);
// attnpool::attention_double_backward
using AttentionDoubleBackward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& key_bias, const OptionalTensor& q_ptr, const Tensor& k_ptr,
    const OptionalTensor& pair_ptr, const OptionalTensor& seed, const Tensor& out,
    const Tensor& lse, const Tensor& dout, const OptionalTensor& dlse, const OptionalTensor& ddq,
    const OptionalTensor& ddk, const OptionalTensor& ddv, const OptionalTensor& ddbias,
    const OptionalTensor& ddkey_bias, double scale, double dropout);

// The operator of that name; throws where its library is not loaded.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct Options {
  OptionalTensor bias, pair_ptr;  // [P, H], and int64 [B + 1]: where each molecule's pairs begin
  OptionalTensor key_bias;        // [N_k, H]
  std::optional<double> scale;    // default D^-0.5
};

// (out [N_q, H, D_v], lse [N_q, H]) of packed rows q [N_q, H, D], k [N_k, H, D], v [N_k, H, D_v];
// q_ptr, k_ptr [B + 1]: boundaries of the molecules, contiguous, int32 or int64. Without q_ptr the
// rows of q are seeds that all molecules share: out [B, S, H, D_v]. Differentiable to second order
// where attnpool_autograd is loaded; else it throws on an inner node of a graph.
inline std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const OptionalTensor& q_ptr, const Tensor& k_ptr,
                                            const Options& options = {}) {
  const bool differentiable =
      c10::Dispatcher::singleton().findSchema({"attnpool_autograd::attention", ""}).has_value();
  const auto operation =
      find<Attention>(differentiable ? "attnpool_autograd::attention" : "attnpool::attention");
  TORCH_CHECK(q.defined() && q.dim() == 3, "q must have 3 dimensions [rows, heads, width]");
  const double scale = options.scale ? *options.scale : 1 / std::sqrt(double(q.size(2)));
  return operation.call(q, k, v, options.bias, options.key_bias, q_ptr, k_ptr, options.pair_ptr,
                        {}, scale, 0.0);
}

}  // namespace attnpool_kernels

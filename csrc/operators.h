// The three operators, once for all devices: arguments to AttnParams, results allocated, and RUN,
// a function (Pass, const Call&), which fills them.
#pragma once

#include "bridge.h"

namespace attnpool {

template <auto RUN>
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const OptionalTensor& bias, const OptionalTensor& key_bias,
                                     const OptionalTensor& q_ptr, const Tensor& k_ptr,
                                     const OptionalTensor& pair_ptr, const OptionalTensor& seed,
                                     double scale, double dropout) {
  refuse_to_lose_gradients({q, k, v, bias, key_bias});
  Call call({q, k, v, bias, key_bias, q_ptr, k_ptr, pair_ptr, seed}, {scale, dropout});
  Tensor out = call.new_rows(call.out_shape, call.a.out);
  Tensor lse = call.new_statistics(call.a.lse);
  RUN(Pass::forward, call);
  return {out, lse};
}

template <auto RUN>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& key_bias, const OptionalTensor& q_ptr, const Tensor& k_ptr,
    const OptionalTensor& pair_ptr, const OptionalTensor& seed, const Tensor& out,
    const Tensor& lse, const Tensor& dout, const OptionalTensor& dlse, double scale,
    double dropout, bool need_dbias) {
  refuse_to_lose_gradients({q, k, v, bias, key_bias, dout, dlse});
  Call call({q, k, v, bias, key_bias, q_ptr, k_ptr, pair_ptr, seed}, {scale, dropout});
  AttnParams& a = call.a;
  call.read_result(out, lse, dout, dlse);
  Tensor dq = call.new_rows(call.q_shape, a.dq);
  Tensor dk = call.new_rows(call.k_shape, a.dk);
  Tensor dv = call.new_rows(call.v_shape, a.dv);
  Tensor dbias = call.new_bias(need_dbias, a.dbias);
  Tensor dkey_bias = call.new_key_bias(a.dkey_bias);
  RUN(Pass::backward, call);
  return {dq, dk, dv, dbias, dkey_bias};
}

template <auto RUN>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_double_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& key_bias, const OptionalTensor& q_ptr, const Tensor& k_ptr,
    const OptionalTensor& pair_ptr, const OptionalTensor& seed, const Tensor& out,
    const Tensor& lse, const Tensor& dout, const OptionalTensor& dlse, const OptionalTensor& ddq,
    const OptionalTensor& ddk, const OptionalTensor& ddv, const OptionalTensor& ddbias,
    const OptionalTensor& ddkey_bias, double scale, double dropout) {
  Call call({q, k, v, bias, key_bias, q_ptr, k_ptr, pair_ptr, seed}, {scale, dropout});
  AttnParams& a = call.a;
  call.read_result(out, lse, dout, dlse);
  a.ddq = call.optional_rows(ddq, "ddq", call.q_shape);
  a.ddk = call.optional_rows(ddk, "ddk", call.k_shape);
  a.ddv = call.optional_rows(ddv, "ddv", call.v_shape);
  a.ddbias = call.optional_bias(ddbias, "ddbias");
  a.ddkey_bias = call.optional_key_bias(ddkey_bias, "ddkey_bias");
  Tensor gq = call.new_rows(call.q_shape, a.gq);
  Tensor gk = call.new_rows(call.k_shape, a.gk);
  Tensor gv = call.new_rows(call.v_shape, a.gv);
  Tensor gbias = call.new_bias(true, a.gbias);
  Tensor gkey_bias = call.new_key_bias(a.gkey_bias);
  Tensor gdout = call.new_rows(call.out_shape, a.gdout);
  Tensor gdlse = call.new_statistics(a.gdlse);
  RUN(Pass::double_backward, call);
  return {gq, gk, gv, gbias, gkey_bias, gdout, gdlse};
}

template <auto RUN, typename Library>
void register_operators(Library& m) {
  m.impl("attention", TORCH_BOX(&attention<RUN>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<RUN>));
  m.impl("attention_double_backward", TORCH_BOX(&attention_double_backward<RUN>));
}

}  // namespace attnpool

// torch.ops.attnpool_c on CUDA: bridge, launch on torch's current stream, check. A library of its
// own, because a torch without CUDA cannot load it; the schemas come from library.cpp. Nothing here
// waits for the device.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "bridge.h"
#include "cuda/launch.h"

namespace attnpool {
namespace {

// Runs a pass on the device of q.
void run(const char* name, Pass pass, const Call& call, const Tensor& q) {
  const AttnParams& a = call.a;
  STD_TORCH_CHECK(a.head_dim <= MAX_DIM && a.value_dim <= MAX_DIM,
                  "CUDA kernels: head and value widths must be 1 to ", MAX_DIM, ", got ",
                  a.head_dim, " and ", a.value_dim);
  STD_TORCH_CHECK(
      a.query_rows <= MAX_ROWS && a.key_rows <= MAX_ROWS && a.molecules <= MAX_ROWS,
      "CUDA kernels: at most ", MAX_ROWS, " rows and molecules");
  KernelParams p{};
  static_cast<AttnParams&>(p) = a;
  const Scratch need = prepare(p, pass);
  std::vector<Tensor> scratch;
  const auto take = [&](int64_t elements) -> void* {
    if (elements == 0) return nullptr;
    scratch.push_back(empty(q, {elements}, call.sums));
    return scratch.back().data_ptr();
  };
  p.statistics = take(need.statistics);
  p.partial = take(need.partial);
  p.partial_sums = take(need.partial_sums);
  p.parts = take(need.parts);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  const int status = run_pass(pass, p, stream);
  STD_TORCH_CHECK(status == 0, "attnpool ", name, " could not be launched: ",
                  cudaGetErrorString(static_cast<cudaError_t>(status)));
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const OptionalTensor& bias, const OptionalTensor& q_ptr,
                                   const Tensor& k_ptr, const OptionalTensor& pair_ptr,
                                   const OptionalTensor& seed, double scale, double dropout) {
  Call call({q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout});
  Tensor out = call.new_rows(q, call.out_shape, call.a.out);
  Tensor lse = call.new_statistics(q, call.a.lse);
  run("forward", Pass::forward, call, q);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& bias,
    const OptionalTensor& q_ptr, const Tensor& k_ptr, const OptionalTensor& pair_ptr,
    const OptionalTensor& seed, const Tensor& out, const Tensor& lse, const Tensor& dout,
    const OptionalTensor& dlse, double scale, double dropout, bool need_dbias) {
  Call call({q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout});
  AttnParams& a = call.a;
  a.out = call.rows(out, "out", call.out_shape);
  a.lse = call.statistics(lse, "lse");
  a.dout = call.rows(dout, "dout", call.out_shape);
  if (dlse) a.dlse = call.statistics(*dlse, "dlse");
  Tensor dq = call.new_rows(q, call.q_shape, a.dq);
  Tensor dk = call.new_rows(q, call.k_shape, a.dk);
  Tensor dv = call.new_rows(q, call.v_shape, a.dv);
  Tensor dbias = call.new_bias(q, need_dbias && bias, a.dbias);
  run("backward", Pass::backward, call, q);
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
  run("double_backward", Pass::double_backward, call, q);
  return {gq, gk, gv, gbias, gdout, gdlse};
}

}  // namespace
}  // namespace attnpool

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, 0, nullptr,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

STABLE_TORCH_LIBRARY_IMPL(attnpool_c, CUDA, m) {
  m.impl("forward", TORCH_BOX(&attnpool::forward));
  m.impl("backward", TORCH_BOX(&attnpool::backward));
  m.impl("double_backward", TORCH_BOX(&attnpool::double_backward));
}

// Schemas of torch.ops.attnpool. The kernels register themselves: cpu/operators.cpp here,
// library_cuda.cpp in a library of its own.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(attnpool, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, Tensor? q_ptr, "
      "Tensor k_ptr, Tensor? pair_ptr, Tensor? seed, float scale, float dropout) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, "
      "Tensor? q_ptr, Tensor k_ptr, Tensor? pair_ptr, Tensor? seed, Tensor out, Tensor lse, "
      "Tensor dout, Tensor? dlse, float scale, float dropout, bool need_dbias) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_double_backward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, "
      "Tensor? q_ptr, Tensor k_ptr, Tensor? pair_ptr, Tensor? seed, Tensor out, Tensor lse, "
      "Tensor dout, Tensor? dlse, Tensor? ddq, Tensor? ddk, Tensor? ddv, Tensor? ddbias, "
      "Tensor? ddkey_bias, float scale, float dropout) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("check_ptr(Tensor ptr, int rows) -> int");
  m.def("build_info() -> str");
  m.def("_use_isa(str name) -> str");
}

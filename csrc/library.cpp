// Schemas of torch.ops.attnpool_c, and the module that lets Python import this library by name.
// The kernels register themselves: cpu/operators.cpp here, cuda/ in a library of its own.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(attnpool_c, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? q_ptr, Tensor k_ptr, "
      "Tensor? pair_ptr, Tensor? seed, float scale, float dropout) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? q_ptr, Tensor k_ptr, "
      "Tensor? pair_ptr, Tensor? seed, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
      "float scale, float dropout, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "double_backward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? q_ptr, Tensor k_ptr, "
      "Tensor? pair_ptr, Tensor? seed, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
      "Tensor? ddq, Tensor? ddk, Tensor? ddv, Tensor? ddbias, float scale, float dropout) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("check_ptr(Tensor ptr, int rows) -> int");
  m.def("build_info() -> str");
  m.def("_use_isa(str name) -> str");
}

PyMODINIT_FUNC PyInit__C_cpu() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cpu", nullptr, 0, nullptr,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

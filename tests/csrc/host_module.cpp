// Python's access to the CUDA kernels compiled for the CPU (tests/backends/cuda_host.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/cuda/launch.h"

namespace py = pybind11;
using namespace attnpool;

namespace {

// (address, stride of molecules, rows, heads, units), counted in elements
View view(const py::object& x) {
  if (x.is_none()) return {nullptr, 0, 0, 0, 0};
  const auto [data, molecule, row, head, unit] =
      x.cast<std::tuple<uint64_t, int64_t, int64_t, int64_t, int64_t>>();
  return {reinterpret_cast<void*>(data), molecule, row, head, unit};
}

template <typename T>
T* pointer(const py::dict& call, const char* name) {
  return reinterpret_cast<T*>(call[name].cast<uint64_t>());
}

int run(const std::string& pass, const py::dict& call, uint32_t schedule) {
  KernelParams p{};
  const std::pair<const char*, View*> views[] = {
      {"q", &p.q}, {"k", &p.k}, {"v", &p.v}, {"bias", &p.bias}, {"out", &p.out}, {"lse", &p.lse},
      {"dout", &p.dout}, {"dlse", &p.dlse}, {"dq", &p.dq}, {"dk", &p.dk}, {"dv", &p.dv},
      {"dbias", &p.dbias}, {"ddq", &p.ddq}, {"ddk", &p.ddk}, {"ddv", &p.ddv},
      {"ddbias", &p.ddbias}, {"gq", &p.gq}, {"gk", &p.gk}, {"gv", &p.gv}, {"gbias", &p.gbias},
      {"gdout", &p.gdout}, {"gdlse", &p.gdlse}};
  for (const auto& [name, target] : views)
    if (call.contains(name)) *target = view(call[name]);
  p.q_ptr = pointer<void>(call, "q_ptr");
  p.k_ptr = pointer<void>(call, "k_ptr");
  p.pair_ptr = pointer<int64_t>(call, "pair_ptr");
  p.seed = pointer<int64_t>(call, "seed");
  p.statistics = pointer<void>(call, "statistics");
  p.partial = pointer<void>(call, "partial");
  p.partial_sums = pointer<void>(call, "partial_sums");
  const std::pair<const char*, int64_t*> sizes[] = {
      {"molecules", &p.molecules}, {"heads", &p.heads}, {"head_dim", &p.head_dim},
      {"value_dim", &p.value_dim}, {"query_rows", &p.query_rows}, {"key_rows", &p.key_rows},
      {"pairs", &p.pairs}};
  for (const auto& [name, target] : sizes) *target = call[name].cast<int64_t>();
  p.scale = call["scale"].cast<double>();
  p.keep_scale = call["keep_scale"].cast<double>();
  p.drop_threshold = call["drop_threshold"].cast<uint32_t>();
  p.dtype = static_cast<Dtype>(call["dtype"].cast<int32_t>());
  p.bias_dtype = static_cast<Dtype>(call["bias_dtype"].cast<int32_t>());
  p.ptr_is_64 = call["ptr_is_64"].cast<int32_t>();
  p.shared_seeds = call["shared_seeds"].cast<int32_t>();
  const int64_t element = p.dtype == Dtype::float64 ? 8 : p.dtype == Dtype::float32 ? 4 : 2;
  p.vector_loads = call["vector"].cast<bool>() ? vector_loads(p, element) : 0;

  fibers::schedule = schedule;
  if (pass == "forward") return launch_forward(p, nullptr);
  if (pass == "backward") return launch_backward(p, nullptr);
  return launch_double_backward(p, nullptr);
}

}  // namespace

// What a pass would launch: (kernel's name, blocks, threads, shared bytes, parameter bytes).
py::list plan(const std::string& pass, const py::dict& call) {
  only_note = true;
  launches.clear();
  run(pass, call, 0);
  only_note = false;
  py::list found;
  for (const Launch& x : launches)
    found.append(py::make_tuple(x.kernel, x.blocks, x.threads, x.bytes,
                                py::bytes(reinterpret_cast<const char*>(&x.params),
                                          sizeof x.params)));
  return found;
}

PYBIND11_MODULE(MODULE_NAME, m) {
  m.def("run", &run);
  m.def("plan", &plan);
  m.def("sites", [] { return fibers::sites; });
  m.def("skip", [](const std::string& kind, int line) { fibers::skipped = {kind, line}; });
}

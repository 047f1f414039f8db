// Python's access to the CUDA kernels compiled for the CPU (tests/tools/cuda_host.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/once_per_device.h"

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
  return call.contains(name) ? reinterpret_cast<T*>(call[name].cast<uint64_t>()) : nullptr;
}

Pass pass_of(const std::string& name) {
  return name == "forward" ? Pass::forward
                           : name == "backward" ? Pass::backward : Pass::double_backward;
}

KernelParams params(const py::dict& call) {
  KernelParams p{};
  const std::pair<const char*, View*> views[] = {
      {"q", &p.q}, {"k", &p.k}, {"v", &p.v}, {"bias", &p.bias}, {"key_bias", &p.key_bias},
      {"out", &p.out}, {"lse", &p.lse}, {"dout", &p.dout}, {"dlse", &p.dlse}, {"dq", &p.dq},
      {"dk", &p.dk}, {"dv", &p.dv}, {"dbias", &p.dbias}, {"dkey_bias", &p.dkey_bias},
      {"ddq", &p.ddq}, {"ddk", &p.ddk}, {"ddv", &p.ddv}, {"ddbias", &p.ddbias},
      {"ddkey_bias", &p.ddkey_bias}, {"gq", &p.gq}, {"gk", &p.gk}, {"gv", &p.gv},
      {"gbias", &p.gbias}, {"gkey_bias", &p.gkey_bias}, {"gdout", &p.gdout}, {"gdlse", &p.gdlse}};
  for (const auto& [name, target] : views)
    if (call.contains(name)) *target = view(call[name]);
  p.q_ptr = pointer<void>(call, "q_ptr");
  p.k_ptr = pointer<void>(call, "k_ptr");
  p.pair_ptr = pointer<int64_t>(call, "pair_ptr");
  p.seed = pointer<int64_t>(call, "seed");
  p.statistics = pointer<void>(call, "statistics");
  p.partial = pointer<void>(call, "partial");
  p.partial_sums = pointer<void>(call, "partial_sums");
  p.parts = pointer<void>(call, "parts");
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
  p.key_bias_dtype = static_cast<Dtype>(call["key_bias_dtype"].cast<int32_t>());
  p.ptr_is_64 = call["ptr_is_64"].cast<int32_t>();
  p.shared_seeds = call["shared_seeds"].cast<int32_t>();
  p.longest = call["longest"].cast<int32_t>();
  return p;
}

int run(const std::string& name, const py::dict& call, uint32_t schedule) {
  KernelParams p = params(call);
  prepare(p, pass_of(name), call["split"].cast<int32_t>());
  if (!call["vector"].cast<bool>()) p.vector_loads = 0;
  fibers::schedule = schedule;
  return run_pass(pass_of(name), p, nullptr);
}

// What is to be allocated: name -> elements.
std::map<std::string, int64_t> scratch(const std::string& name, const py::dict& call) {
  KernelParams p = params(call);
  const ScratchSizes need = prepare(p, pass_of(name), call["split"].cast<int32_t>());
  return {{"statistics", need.statistics}, {"partial", need.partial},
          {"partial_sums", need.partial_sums}, {"parts", need.parts}};
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

// once_per_device for calls on these devices, where ask() answers in turn: (what the calls
// returned, how often it asked, how often it cleared an error).
std::tuple<std::vector<int>, int, int> ask_devices(const std::vector<int>& devices,
                                                   const std::vector<int>& answers) {
  std::atomic<uint64_t> done{0};
  std::vector<int> returned;
  int asked = 0, cleared = 0;
  for (const int device : devices)
    returned.push_back(once_per_device(
        done, device, [&] { return answers.at(asked++); }, [&] { ++cleared; }));
  return {returned, asked, cleared};
}

PYBIND11_MODULE(MODULE_NAME, m) {
  m.def("ask_devices", &ask_devices);
  m.def("run", &run);
  m.def("scratch", &scratch);
  m.def("plan", &plan);
  m.def(
      "sites",  // where threads have waited so far
      [](bool few_seeds) {
        std::set<fibers::Site> found;
        for (const fibers::Site& x : fibers::sites)
          if ((x.first.find("few_seeds") != std::string::npos) == few_seeds) found.insert(x);
        return found;
      },
      py::arg("few_seeds") = false);
  m.def("skip", [](const std::string& kind, int line) { fibers::skipped = {kind, line}; });
}

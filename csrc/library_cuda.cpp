// torch.ops.attnpool on CUDA: launches on torch's current stream. A library of its own, because a
// torch without CUDA cannot load it; the schemas come from library.cpp. Nothing here waits for the
// device.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <utility>

#include "cuda/launch.h"
#include "operators.h"

namespace attnpool {
namespace {

// What ``expect`` said last on this thread, 0 once a pass has used it.
thread_local int64_t expected_rows = 0;

// The next pass on this thread has no molecule of more queries or keys; 0: unknown. Saves it the
// kernels for larger ones. A molecule that is larger all the same stops the device (see
// small_sets.cuh).
int64_t expect(int64_t rows) {
  STD_TORCH_CHECK(rows >= 0, "rows must not be negative, got ", rows);
  return std::exchange(expected_rows, rows);
}

constexpr const char* NAMES[] = {"forward", "backward", "double_backward"};

// Runs a pass on the device of q.
void run(Pass pass, const Call& call) {
  const AttnParams& a = call.a;
  const int64_t longest = std::exchange(expected_rows, 0);
  STD_TORCH_CHECK(a.head_dim <= MAX_DIM && a.value_dim <= MAX_DIM,
                  "CUDA kernels: head and value widths must be 1 to ", MAX_DIM, ", got ",
                  a.head_dim, " and ", a.value_dim);
  STD_TORCH_CHECK(
      a.query_rows <= MAX_ROWS && a.key_rows <= MAX_ROWS && a.molecules <= MAX_ROWS,
      "CUDA kernels: at most ", MAX_ROWS, " rows and molecules");
  KernelParams p{};
  static_cast<AttnParams&>(p) = a;
  p.longest = static_cast<int32_t>(std::min(longest, MAX_ROWS));
  const ScratchSizes need = prepare(p, pass);
  std::vector<Tensor> scratch;
  const auto take = [&](int64_t elements) -> void* {
    if (elements == 0) return nullptr;
    scratch.push_back(empty(call.q, {elements}, call.sums));
    return scratch.back().data_ptr();
  };
  p.statistics = take(need.statistics);
  p.partial = take(need.partial);
  p.partial_sums = take(need.partial_sums);
  p.parts = take(need.parts);
  const auto device = call.q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int status = run_pass(pass, p, stream);
  STD_TORCH_CHECK(status == 0, "attnpool ", NAMES[int(pass)], " could not be launched: ",
                  cudaGetErrorString(static_cast<cudaError_t>(status)));
}

}  // namespace
}  // namespace attnpool

STABLE_TORCH_LIBRARY_FRAGMENT(attnpool, m) { m.def("_expect(int rows) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(attnpool, CompositeExplicitAutograd, m) {
  m.impl("_expect", TORCH_BOX(&attnpool::expect));
}

STABLE_TORCH_LIBRARY_IMPL(attnpool, CUDA, m) { attnpool::register_operators<attnpool::run>(m); }

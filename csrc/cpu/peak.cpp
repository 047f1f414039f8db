// torch.ops.attnpool_c._multiply_adds and _read: what this machine can do at best on torch's
// threads. benchmarks/rates.py calls them by the clock; nothing else does.
#include "peak.h"

#include <algorithm>
#include <atomic>

#include "../bridge.h"
#include "kernels.h"

namespace attnpool {
namespace {

struct Width {
  const Kernels* kernels;
  const Loops* loops;
};

const Width WIDTHS[] = {
#if defined(__x86_64__)
    {&avx512::kernels, &avx512::loops}, {&avx2::kernels, &avx2::loops},
#endif
    {&baseline::kernels, &baseline::loops}};

const Loops& named(const std::string& isa) {
  for (const Width& width : WIDTHS)
    if (isa == width.kernels->name && width.kernels->runs_here()) return *width.loops;
  STD_TORCH_CHECK(false, "no code for '", isa, "' here");
  return *WIDTHS[0].loops;
}

constexpr int64_t STEPS = 1 << 13;  // of one chunk: 10 to 50 us

// Whoever is free takes the next chunk, so that a thread that starts late holds nobody up.
double multiply_adds(const std::string& isa, bool wide, int64_t chunks, double factor,
                     double summand) {
  const Loops& loops = named(isa);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    while (next.fetch_add(1, std::memory_order_relaxed) < chunks)
      loops.multiply_adds(wide, STEPS, factor, summand);
  };
  const int64_t threads = torch::stable::get_num_threads();
  if (threads <= 1) work(0, 1);
  else torch::stable::parallel_for(0, threads, 1, work);
  return double(chunks) * loops.flops(wide, STEPS);
}

// Every thread reads its own part of x `times` times: it may stay in the cache of its core.
double read(const Tensor& x, const std::string& isa, int64_t times) {
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  const Loops& loops = named(isa);
  const char* data = static_cast<const char*>(x.data_ptr());
  const int64_t bytes = x.numel() * x.element_size();
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t part = (bytes / threads + 63) / 64 * 64;
  std::atomic<uint64_t> found{0};
  const auto work = [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      const int64_t begin = std::min(bytes, thread * part);
      const int64_t end = thread + 1 == threads ? bytes : std::min(bytes, begin + part);
      for (int64_t i = 0; i < times; ++i)
        found.fetch_or(loops.read(data + begin, end - begin), std::memory_order_relaxed);
    }
  };
  if (threads <= 1) work(0, 1);
  else torch::stable::parallel_for(0, threads, 1, work);
  return double(times) * double(bytes) + (found.load() == 0 ? 0.5 : 0.0);
}

}  // namespace
}  // namespace attnpool

STABLE_TORCH_LIBRARY_FRAGMENT(attnpool_c, m) {
  m.def("_multiply_adds(str isa, bool wide, int chunks, float factor, float summand) -> float");
  m.def("_read(Tensor x, str isa, int times) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(attnpool_c, CPU, m) { m.impl("_read", TORCH_BOX(&attnpool::read)); }

STABLE_TORCH_LIBRARY_IMPL(attnpool_c, CompositeExplicitAutograd, m) {
  m.impl("_multiply_adds", TORCH_BOX(&attnpool::multiply_adds));
}

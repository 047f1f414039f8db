// torch.ops.attnpool_c._multiply_adds and _read: what this machine can do at best on torch's
// threads. benchmarks/measuring/rates.py calls them by the clock; nothing else does.
#include "peak.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <vector>

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

// A thread times pieces of some 20 us, each by itself: on a busy machine few of them are interrupted,
// and no thread waits for another. Of its pieces the fast tenth counts.
constexpr int64_t STEPS = 1 << 13;
constexpr int64_t PIECE = 1 << 18;  // bytes
constexpr size_t FAST_PART = 10;

template <typename F>
double seconds_of(const F& f) {
  const auto begin = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double fast_one(std::vector<double>& seconds) {
  if (seconds.empty()) return std::numeric_limits<double>::infinity();
  const auto place = seconds.begin() + int64_t(seconds.size() / FAST_PART);
  std::nth_element(seconds.begin(), place, seconds.end());
  return *place;
}

// The sum of f(thread) over torch's threads.
template <typename F>
double on_each_thread(const F& f) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  std::vector<double> rates(size_t(threads), 0.0);
  const auto work = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) rates[size_t(i)] = f(i, threads);
  };
  if (threads == 1) work(0, 1);
  else torch::stable::parallel_for(0, threads, 1, work);
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

// Flops per second of all threads together; every thread computes `pieces`.
double multiply_adds(const std::string& isa, bool wide, int64_t pieces, double factor,
                     double summand) {
  const Loops& loops = named(isa);
  return on_each_thread([&](int64_t, int64_t) {
    std::vector<double> seconds;
    for (int64_t i = 0; i < pieces; ++i)
      seconds.push_back(seconds_of([&] { loops.multiply_adds(wide, STEPS, factor, summand); }));
    return loops.flops(wide, STEPS) / fast_one(seconds);
  });
}

// Bytes per second of all threads together. Each reads its own part of x `times` times, which stays
// in the cache of its core where it fits.
double read(const Tensor& x, const std::string& isa, int64_t times) {
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  const Loops& loops = named(isa);
  const char* data = static_cast<const char*>(x.data_ptr());
  const int64_t bytes = x.numel() * x.element_size();
  return on_each_thread([&](int64_t thread, int64_t threads) {
    const int64_t part = bytes / threads / 64 * 64;
    const char* own = data + thread * part;
    const int64_t step = std::min(part, PIECE), again = step ? std::max<int64_t>(1, PIECE / step) : 0;
    std::vector<double> seconds;
    for (int64_t i = 0; i < times; ++i)
      for (int64_t at = 0; step && at + step <= part; at += step)
        seconds.push_back(seconds_of([&] {
          for (int64_t j = 0; j < again; ++j) loops.read(own + at, step);
        }));
    return double(step * again) / fast_one(seconds);
  });
}

}  // namespace
}  // namespace attnpool

STABLE_TORCH_LIBRARY_FRAGMENT(attnpool_c, m) {
  m.def("_multiply_adds(str isa, bool wide, int pieces, float factor, float summand) -> float");
  m.def("_read(Tensor x, str isa, int times) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(attnpool_c, CPU, m) { m.impl("_read", TORCH_BOX(&attnpool::read)); }

STABLE_TORCH_LIBRARY_IMPL(attnpool_c, CompositeExplicitAutograd, m) {
  m.impl("_multiply_adds", TORCH_BOX(&attnpool::multiply_adds));
}

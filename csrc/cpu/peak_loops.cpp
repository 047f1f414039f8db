// What one thread can do at best with vectors of one width: multiply-adds whose numbers never leave
// registers, and reading. Both are limits that times are compared with, so neither may be slower
// than the machine, and the compiler must be able to drop neither: the numbers come from the
// caller, which is compiled apart, and all of them flow into the result.
#include "peak.h"

#include "simd.h"

namespace attnpool {
namespace ATTN_ISA {
namespace {

// Chains that do not wait for each other. Two multiply-adds a cycle of 4 or 5 cycles each need 10;
// four a cycle (64-bit Arm) need 16. Two more registers hold the factor and the summand.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int CHAINS = 24;
#else
constexpr int CHAINS = 12;
#endif
constexpr int UNROLLED = 8;

template <typename T>
double chains(int64_t steps, double factor, double summand) {
  Vector<T> x[CHAINS];
  const Vector<T> f = splat(T(factor)), s = splat(T(summand));
#pragma GCC unroll 32
  for (int i = 0; i < CHAINS; ++i) x[i] = splat(T(i));
  for (int64_t step = 0; step < steps; step += UNROLLED) {
#pragma GCC unroll 8
    for (int again = 0; again < UNROLLED; ++again) {
#pragma GCC unroll 32
      for (int i = 0; i < CHAINS; ++i) x[i] = x[i] * f + s;
    }
  }
  double sum = 0;
#pragma GCC unroll 32
  for (int i = 0; i < CHAINS; ++i)
    for (int lane = 0; lane < WIDTH<T>; ++lane) sum += double(x[i][lane]);
  return sum;
}

double multiply_adds(bool wide, int64_t steps, double factor, double summand) {
  return wide ? chains<double>(steps, factor, summand) : chains<float>(steps, factor, summand);
}

double flops(bool wide, int64_t steps) {
  const int64_t whole = (steps + UNROLLED - 1) / UNROLLED * UNROLLED;
  return 2.0 * double(whole) * CHAINS * (wide ? WIDTH<double> : WIDTH<float>);
}

uint64_t read(const char* from, int64_t bytes) {
  using Bits = Lanes<double>::Bits;
  constexpr int AT_ONCE = 8;
  Bits found[AT_ONCE] = {};
  int64_t place = 0;
  for (; place + AT_ONCE * VECTOR_BYTES <= bytes; place += AT_ONCE * VECTOR_BYTES) {
#pragma GCC unroll 8
    for (int i = 0; i < AT_ONCE; ++i) {
      Bits x;
      memcpy(&x, from + place + i * VECTOR_BYTES, sizeof(x));
      found[i] |= x;
    }
  }
  uint64_t all = 0;
  for (; place < bytes; ++place) all |= uint64_t(uint8_t(from[place]));
  for (int i = 0; i < AT_ONCE; ++i)
    for (int lane = 0; lane < WIDTH<double>; ++lane) all |= found[i][lane];
  return all;
}

}  // namespace

extern const Loops loops = {multiply_adds, flops, read};

}  // namespace ATTN_ISA
}  // namespace attnpool

// The table of one vector width, and the sums over parts that tasks leave behind.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "block.h"
#include "passes.h"

namespace attnpool {
namespace ATTN_ISA {
namespace {

#define ATTN_STRING(x) #x
#define ATTN_NAME(x) ATTN_STRING(x)

bool runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  unsigned a, b, c = 0, d;  // clang 16 knows no name for F16C
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
#else
  return true;
#endif
}

size_t scratch_bytes(const AttnParams& a, Pass pass, int64_t longest) {
  switch (pass) {
    case Pass::forward: return forward_scratch(a);
    case Pass::backward: return backward_scratch(a, longest);
    default: return double_backward_scratch(a, longest);
  }
}

int64_t padded(const AttnParams& a, int64_t width) {
  return a.dtype == Dtype::float64 ? whole_vectors<double>(width) : whole_vectors<float>(width);
}

int64_t block_of_keys(const AttnParams& a) {
  const int64_t widest = larger(padded(a, a.head_dim), padded(a, a.value_dim));
  return a.dtype == Dtype::float64 ? key_block<double>(widest) : key_block<float>(widest);
}

template <typename T>
void add(const AttnParams& a, const SumOfParts& sum, int64_t head) {
  const int64_t ld = whole_vectors<T>(sum.width);
  const int64_t next = a.heads * sum.rows * ld;
  alignas(64) T total[MAX_WIDTH], lost[MAX_WIDTH];
  for (int64_t i = 0; i < sum.rows; ++i) {
    const T* part = static_cast<const T*>(sum.part) + (head * sum.rows + i) * ld;
    zero(total, ld);
    zero(lost, ld);
    for (int64_t x = 0; x < sum.parts; ++x, part += next)
      for (int64_t d = 0; d < ld; d += WIDTH<T>) {
        Vector<T> all = load(total + d), rest = load(lost + d);
        add_exactly<T>(all, rest, load(part + d));
        store(total + d, all);
        store(lost + d, rest);
      }
    for (int64_t d = 0; d < ld; d += WIDTH<T>)
      store(total + d, whole_sum<T>(load(total + d), load(lost + d)));
    store_rows<T>(total, ld, nullptr, sum.to, a.dtype, sum.molecule, sum.first_row + i, head, 1,
                  sum.width);
  }
}

void add_parts(const AttnParams& a, const SumOfParts& sum, int64_t head) {
  if (a.dtype == Dtype::float64) return add<double>(a, sum, head);
  add<float>(a, sum, head);
}

}  // namespace

extern const Kernels kernels = {ATTN_NAME(ATTN_ISA), runs_here,  scratch_bytes,   padded,
                                block_of_keys,       forward,    backward,        norms,
                                statistics,          double_backward, add_parts,  merge_parts};

}  // namespace ATTN_ISA
}  // namespace attnpool

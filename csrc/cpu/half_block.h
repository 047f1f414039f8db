// Blocks in bfloat16 on processors that multiply pairs of them (AVX512-BF16): rows are multiplied
// as they lie, without a copy in float; weights and their gradients are rounded to bfloat16 for
// their products with rows, as tensor cores have it too. Sums are kept in float.
#pragma once

#include "block.h"

#if defined(__AVX512F__)
namespace attnpool {
namespace ATTN_ISA {

// Whether the rows of a head can be read as whole vectors of pairs.
inline bool are_pairs(const View& x, int64_t width) {
  return width % 32 == 0 && x.unit == 1 && x.row % 2 == 0 && x.head % 2 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 4 == 0;
}
inline bool multiplies_pairs(const AttnParams& a) {
  return a.dtype == Dtype::bfloat16 && have_pairs() && are_pairs(a.q, a.head_dim) &&
         are_pairs(a.k, a.head_dim) && a.value_dim % 16 == 0 && a.v.unit == 1;
}

// Rows of one head as elements that are pairs of neighbours in a row.
inline Place<float> pairs_of(const View& x, int64_t molecule, int64_t first, int64_t head) {
  return {reinterpret_cast<float*>(address<Bfloat16>(x, molecule, first, head)), x.row / 2, true};
}

// low and high to pairs, rounded to nearest even.
ATTN_INLINE Vector<float> pair_up(Vector<float> low, Vector<float> high) {
  __m256i first, second;
  asm("vcvtneps2bf16 %1, %0" : "=v"(first) : "v"(low));
  asm("vcvtneps2bf16 %1, %0" : "=v"(second) : "v"(high));
  const __m512i wide = _mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(0xffff, second), 16);
  return (Vector<float>)_mm512_or_si512(_mm512_maskz_cvtepu16_epi32(0xffff, first), wide);
}

// Pairs (query, key) x [key][QUERIES] to those of neighbouring keys, to[key / 2][QUERIES], which
// may be x.
inline void pair_up_keys(const Block& at, const float* s, float* to) {
  const int64_t lanes = whole_vectors<float>(at.ni);
  for (int64_t j = 0; j < at.nj; j += 2)
    for (int64_t x = 0; x < lanes; x += WIDTH<float>) {
      const float* const from = s + j * QUERIES + x;
      const Vector<float> high = j + 1 < at.nj ? load(from + QUERIES) : Vector<float>{};
      store(to + j / 2 * QUERIES + x, pair_up(load(from), high));
    }
}

// The same to those of neighbouring queries, in its place: x[key][QUERIES], of which half are used.
inline void pair_up_queries(const Block& at, float* s) {
  constexpr int W = WIDTH<float>;
  for (float* row = s; row < s + at.nj * QUERIES; row += QUERIES)
    for (int64_t x = 0; x < at.ni; x += 2 * W) {
      __m256i first, second;
      asm("vcvtneps2bf16 %1, %0" : "=v"(first) : "v"(load(row + x)));
      asm("vcvtneps2bf16 %1, %0" : "=v"(second) : "v"(load(row + x + W)));
      const __m512i both = _mm512_castsi256_si512(first);
      store(row + x / 2, (Vector<float>)_mm512_inserti64x4(both, second, 1));
    }
}

// Rows of one head to pairs of neighbouring rows, to[count / 2][width].
inline void pair_up_rows(const View& x, int64_t molecule, int64_t first, int64_t head,
                         int64_t count, int64_t width, float* to) {
  const Bfloat16* from = address<Bfloat16>(x, molecule, first, head);
  const auto wide = [](const Bfloat16* row) {
    return _mm512_maskz_cvtepu16_epi32(
        0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  };
  for (int64_t j = 0; j < count; j += 2, from += 2 * x.row, to += width)
    for (int64_t d = 0; d < width; d += WIDTH<float>) {
      __m512i both = wide(from + d);
      if (j + 1 < count)
        both = _mm512_or_si512(both, _mm512_slli_epi32(wide(from + x.row + d), 16));
      store(to + d, (Vector<float>)both);
    }
}

}  // namespace ATTN_ISA
}  // namespace attnpool
#endif

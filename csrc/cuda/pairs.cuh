// The terms of one pair: biases, dropout, and where they lie in memory.
#pragma once

#include "../philox.h"
#include "place.cuh"

namespace attnpool {

// The pairs of one molecule in one head; i and j count its queries and keys, which fit 32 bits
// (MAX_ROWS).
template <typename T>
struct Pairs {
  const KernelParams& p;
  int molecule, head, keys, first_key;  // first_key: row of the molecule's first one
  Span rows;  // of bias
  PhiloxKey key;
  Acc<T> scale, keep_scale;

  ATTN_DEVICE Pairs(const KernelParams& params, int molecule_, int head_, int keys_,
                    int first_key_)
      : p(params), molecule(molecule_), head(head_), keys(keys_), first_key(first_key_),
        rows{0, 0}, key{0, 0}, scale(static_cast<Acc<T>>(params.scale)),
        keep_scale(static_cast<Acc<T>>(params.keep_scale)) {
    const bool real = molecule >= 0 && molecule < p.molecules;
    if (p.pair_ptr && real) rows = pair_span(p, molecule);
    if (p.seed) key = philox_key(*p.seed);
  }

  // Element (i, j) of bias or a tensor like it; 0 where there is none.
  ATTN_DEVICE Acc<T> pair_value(const View& x, int i, int j) const {
    const int64_t row = int64_t(i) * keys + j;
    return x.data && row < rows.size ? element(x, p.bias_dtype, rows.first + row) : 0;
  }

  // Element j of key_bias or a tensor like it; 0 where there is none.
  ATTN_DEVICE Acc<T> key_value(const View& x, int j) const {
    return x.data && j < keys ? element(x, p.key_bias_dtype, first_key + j) : 0;
  }

  ATTN_DEVICE void store_pair(const View& x, int i, int j, Acc<T> value) const {
    const int64_t row = int64_t(i) * keys + j;
    if (x.data && row < rows.size) store_element(x, p.bias_dtype, rows.first + row, value);
  }

  ATTN_DEVICE void store_key(const View& x, int j, Acc<T> value) const {
    if (x.data && j < keys) store_element(x, p.key_bias_dtype, first_key + j, value);
  }

  // (F1) from the product q . k and the key's element of key_bias
  ATTN_DEVICE Acc<T> logit(Acc<T> product, int i, int j, Acc<T> of_key) const {
    return product * scale + pair_value(p.bias, i, j) + of_key;
  }
  ATTN_DEVICE Acc<T> logit(Acc<T> product, int i, int j) const {
    return logit(product, i, j, key_value(p.key_bias, j));
  }

  // (D1) from the product ddq . k + q . ddk, in the same way
  ATTN_DEVICE Acc<T> tangent(Acc<T> product, int i, int j, Acc<T> of_key) const {
    return product * scale + pair_value(p.ddbias, i, j) + of_key;
  }
  ATTN_DEVICE Acc<T> tangent(Acc<T> product, int i, int j) const {
    return tangent(product, i, j, key_value(p.ddkey_bias, j));
  }

  // Which pairs of a 16 x 8 N accumulator are kept, one bit an element (bit 4 n + e). i and j: the
  // query and the key of its first element; SWAPPED: its rows are keys, else queries.
  template <int N, bool SWAPPED>
  ATTN_DEVICE uint32_t keep_bits(int i, int j) const {
    if (!p.seed) return ~0u;
    const int g = lane_index() / 4, t = lane_index() % 4;
    uint32_t bits = 0;
    ATTN_ROLLED
    for (int n = 0; n < 2 * N; ++n) {  // columns 8 (n / 2) + 2 t and + 1 of row g + 8 (n % 2)
      const int row = g + n % 2 * 8, column = n / 2 * 8 + 2 * t;
      uint32_t kept = 0;
      if (SWAPPED) {
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e)
          kept |= (keep_two(i + column + e, j + row) >> ((j + row) & 1) & 1) << e;
      } else {
        kept = keep_two(i + row, j + column);
      }
      bits |= kept << 2 * n;
    }
    return bits;
  }

  // (B1) R for a bit of keep_bits
  ATTN_DEVICE Acc<T> keep(uint32_t bits, int n, int e) const {
    return bits >> (4 * n + e) & 1 ? keep_scale : 0;
  }

  // Two bits, for the even and the odd one of key j and its neighbour, which share their words.
  ATTN_DEVICE uint32_t keep_two(int i, int j) const {
    const PhiloxWords words = keep_words(key, molecule, head, i, j);
    const uint32_t even = j & 2 ? words.word[2] : words.word[0];
    const uint32_t odd = j & 2 ? words.word[3] : words.word[1];
    return static_cast<uint32_t>(even >= p.drop_threshold) |
           static_cast<uint32_t>(odd >= p.drop_threshold) << 1;
  }

 private:
  // What is added to the logits is stored in T, or in float.
  ATTN_DEVICE Acc<T> element(const View& x, Dtype stored, int64_t row) const {
    if (stored == p.dtype) return to_acc(*address<const T>(x, 0, row, head));
    return *address<const float>(x, 0, row, head);
  }
  ATTN_DEVICE void store_element(const View& x, Dtype stored, int64_t row, Acc<T> value) const {
    if (stored == p.dtype) from_acc(value, *address<T>(x, 0, row, head));
    else *address<float>(x, 0, row, head) = static_cast<float>(value);
  }
};

ATTN_DEVICE void clear_element(const View& x, Dtype stored, int64_t row, int head) {
  if (stored == Dtype::float64) *address<double>(x, 0, row, head) = 0;
  else if (stored == Dtype::float32) *address<float>(x, 0, row, head) = 0;
  else *address<uint16_t>(x, 0, row, head) = 0;
}

// Zeros for the rows of dbias behind the last molecule's, by the first tile of the virtual molecule
// behind the last one.
ATTN_DEVICE void clear_pairs_of_nobody(const KernelParams& p, const View& dbias, const Rows& tile,
                                       int head, int thread, int threads) {
  if (!dbias.data || tile.molecule != p.molecules || tile.first != 0) return;
  const int64_t first = span_between(p.pair_ptr[p.molecules], p.pairs, p.pairs).first;
  for (int64_t row = first + thread; row < p.pairs; row += threads)
    clear_element(dbias, p.bias_dtype, row, head);
}

}  // namespace attnpool

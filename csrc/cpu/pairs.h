// Matrices of the pairs of a block, and how they lie. Usually [key][QUERIES]: the lanes of a vector
// are queries, and statistics of rows are plain vector operations. Few queries would leave most
// lanes empty; then [query][KEYS], and lanes are keys.
#pragma once

#include "../philox.h"
#include "kernels.h"
#include "rows.h"
#include "simd.h"

namespace attnpool {
namespace ATTN_ISA {

enum class LanesAre { queries, keys };

constexpr int KEYS = 128;  // of a block, at most

// One (molecule, head) and the block of pairs at hand.
struct Block {
  int64_t molecule, head;
  Span queries, keys;       // of the molecule
  int64_t i0, j0, ni, nj;   // block, in rows of the molecule
};

// A molecule and head of which nothing is at hand yet.
inline Block whole_head(const AttnParams& a, int64_t molecule, int64_t head) {
  return {molecule, head, query_span(a, molecule), key_span(a, molecule), 0, 0, 0, 0};
}

// Whether lanes had better be keys: where that makes so few vectors that it pays for transposed
// keys. Depends on the molecule only.
template <typename T>
ATTN_INLINE bool few_queries(const Span& queries, const Span& keys) {
  const int64_t vectors = queries.size * blocks_of(keys.size, WIDTH<T>);
  return 2 * queries.size <= WIDTH<T> && vectors * (keys.size > KEYS ? 2 : 3) <= keys.size;
}

// What a vector is: ROWS queries, or one; vectors_of() of them have all keys of a row.
template <typename T, LanesAre L>
constexpr int ROWS = L == LanesAre::queries ? WIDTH<T> : 1;
template <typename T, LanesAre L>
ATTN_INLINE int64_t rows_of_block(const Block& at) {
  return L == LanesAre::queries ? whole_vectors<T>(at.ni) : at.ni;
}
template <typename T, LanesAre L>
ATTN_INLINE int64_t vectors_of(const Block& at) {
  return L == LanesAre::queries ? at.nj : blocks_of(at.nj, WIDTH<T>);
}
// The place of vector n of row r, and of the pair (i, j).
template <typename T, LanesAre L>
ATTN_INLINE int64_t vector_at(int64_t r, int64_t n) {
  return L == LanesAre::queries ? n * QUERIES + r : r * KEYS + n * WIDTH<T>;
}
template <LanesAre L>
ATTN_INLINE int64_t pair_at(int64_t i, int64_t j) {
  return L == LanesAre::queries ? j * QUERIES + i : i * KEYS + j;
}
// Elements between the first of a matrix and one past its last.
template <LanesAre L>
ATTN_INLINE int64_t area(const Block& at) {
  return L == LanesAre::queries ? at.nj * QUERIES : at.ni * KEYS;
}

// A statistic of the rows of a vector.
template <LanesAre L, typename T>
ATTN_INLINE Vector<T> of_rows(const T* x) {
  if constexpr (L == LanesAre::queries) return load(x);
  else return splat(*x);
}
template <LanesAre L, typename T>
ATTN_INLINE void to_rows(T* x, Vector<T> of) {
  if constexpr (L == LanesAre::queries) store(x, of);
  else *x = of[0];
}
// Sums and maxima over keys, of the vectors of a row to those of the row.
template <typename T, LanesAre L>
ATTN_INLINE Vector<T> sum_of_row(Vector<T> x) {
  if constexpr (L == LanesAre::queries) return x;
  else return splat<T>(sum_of_lanes<T>(x));
}
template <typename T, LanesAre L>
ATTN_INLINE Vector<T> largest_of_row(Vector<T> x) {
  if constexpr (L == LanesAre::queries) return x;
  else return splat<T>(largest_lane<T>(x));
}

// x where vector n of a row holds keys, `other` in its lanes past the last one.
template <typename T, LanesAre L>
ATTN_INLINE Vector<T> of_keys(const Block& at, int64_t n, Vector<T> x, Vector<T> other) {
  if constexpr (L == LanesAre::queries) return x;
  else {
    const int64_t left = at.nj - n * WIDTH<T>;
    if (left >= WIDTH<T>) return x;
    Vector<T> lane;
    for (int i = 0; i < WIDTH<T>; ++i) lane[i] = T(i);
    return lane < splat(T(left)) ? x : other;
  }
}

// f(place of each vector of the block)
template <typename T, LanesAre L, typename F>
ATTN_INLINE void for_vectors(const Block& at, F f) {
  const int64_t rows = rows_of_block<T, L>(at), vectors = vectors_of<T, L>(at);
  for (int64_t r = 0; r < rows; r += ROWS<T, L>)
    for (int64_t n = 0; n < vectors; ++n) f(vector_at<T, L>(r, n));
}

// to = x of the pairs, 0 in lanes without one. Pairs that bias lacks read as 0.
template <typename T, LanesAre L>
void pack_pairs(const AttnParams& a, const View& x, const Block& at, T* to) {
  constexpr int W = WIDTH<T>;
  const Span pairs = pair_span(a, at.molecule);
  const int64_t lanes = whole_vectors<T>(at.ni), columns = whole_vectors<T>(at.nj);
  if (L == LanesAre::keys) {
    for (int64_t i = 0; columns != at.nj && i < at.ni; ++i)
      store(to + i * KEYS + columns - W, Vector<T>{});
  } else if (lanes != at.ni) {
    for (int64_t j = 0; j < at.nj; ++j) store(to + j * QUERIES + lanes - W, Vector<T>{});
  }
  with_stored(a.bias_dtype, [&](auto kind) {
    using S = decltype(kind);
    for (int64_t i = 0; i < at.ni; ++i) {
      const int64_t pair = (at.i0 + i) * at.keys.size + at.j0;
      const int64_t there = smaller(at.nj, pairs.size - pair);
      const S* from = address<S>(x, 0, pairs.first + pair, at.head);
      for (int64_t j = 0; j < there; ++j) to[pair_at<L>(i, j)] = T(widened(from[j * x.row]));
      for (int64_t j = larger(there, 0); j < at.nj; ++j) to[pair_at<L>(i, j)] = 0;
    }
  });
}

template <typename T, LanesAre L>
void store_pairs(const AttnParams& a, const T* from, const Block& at, const View& x) {
  const Span pairs = pair_span(a, at.molecule);
  with_stored(a.bias_dtype, [&](auto kind) {
    using S = decltype(kind);
    for (int64_t i = 0; i < at.ni; ++i) {
      const int64_t pair = (at.i0 + i) * at.keys.size + at.j0;
      const int64_t there = smaller(at.nj, pairs.size - pair);
      S* to = address<S>(x, 0, pairs.first + pair, at.head);
      for (int64_t j = 0; j < there; ++j) narrow(from[pair_at<L>(i, j)], to + j * x.row);
    }
  });
}

// f(element) for each key of a block of x [rows, heads], in the type that it is stored in.
template <typename F>
ATTN_INLINE void for_keys(const AttnParams& a, const View& x, const Block& at, F f) {
  with_stored(a.key_bias_dtype, [&](auto kind) {
    using S = decltype(kind);
    S* element = address<S>(x, 0, at.keys.first + at.j0, at.head);
    for (int64_t j = 0; j < at.nj; ++j, element += x.row) f(j, element);
  });
}

// to += x of the key, or = x where nothing is there yet, of every pair.
template <typename T, LanesAre L, typename F>
ATTN_INLINE void spread_keys(const AttnParams& a, const View& x, const Block& at, T* to, bool add,
                             F value) {
  for_keys(a, x, at, [&](int64_t j, auto* key) {
    const T more = value(T(widened(*key)));
    if constexpr (L == LanesAre::queries) {
      for (int64_t p = j * QUERIES; p < j * QUERIES + whole_vectors<T>(at.ni); p += WIDTH<T>)
        store(to + p, add ? load(to + p) + splat(more) : splat(more));
    } else {
      for (int64_t i = 0; i < at.ni; ++i)
        to[i * KEYS + j] = add ? to[i * KEYS + j] + more : more;
    }
  });
  if constexpr (L == LanesAre::keys)
    for (int64_t i = 0; !add && i < at.ni; ++i)
      for (int64_t j = at.nj; j < whole_vectors<T>(at.nj); ++j) to[i * KEYS + j] = 0;
}

// What is added to the logits of a block.
enum class Added { nothing, keys, pairs };

// A finite bias stays finite in units of log 2: masks are often made of the least finite number.
template <typename V, typename T>
ATTN_INLINE V bounded(V x, T) {
  const T infinity = T(__builtin_inf());
  const T most = (sizeof(T) == 8 ? T(__DBL_MAX__) : T(__FLT_MAX__)) / T(2 * LOG2_E);
  if constexpr (sizeof(V) == sizeof(T)) {
    const T high = x > most && x != infinity ? most : x;
    return high < -most && high != -infinity ? -most : high;
  } else {
    const V high = ((x > splat(most)) & (x != splat(infinity))) ? splat(most) : x;
    return ((high < splat(-most)) & (high != splat(-infinity))) ? splat(-most) : high;
  }
}

// to: [nj] of the key bias; or as pack_pairs, together with it, where there is a bias of pairs.
template <typename T, LanesAre L>
Added pack_bias(const AttnParams& a, const Block& at, T* to) {
  if (!a.bias.data && !a.key_bias.data) return Added::nothing;
  const auto limited = [](T x) { return bounded(x, T()); };
  if (!a.bias.data) {
    for_keys(a, a.key_bias, at, [&](int64_t j, auto* x) { to[j] = limited(T(widened(*x))); });
    return Added::keys;
  }
  pack_pairs<T, L>(a, a.bias, at, to);
  for_vectors<T, L>(at, [&](int64_t p) { store(to + p, bounded(load(to + p), T())); });
  if (a.key_bias.data) spread_keys<T, L>(a, a.key_bias, at, to, true, limited);
  return Added::pairs;
}

// The logits of vector n of row r with the biases that pack_bias left.
template <typename T, LanesAre L, Added ADDED>
ATTN_INLINE Vector<T> with_bias(Vector<T> logit, const T* bias, int64_t r, int64_t n) {
  if (ADDED == Added::nothing) return logit;
  const Vector<T> more = ADDED == Added::pairs        ? load(bias + vector_at<T, L>(r, n))
                         : L == LanesAre::queries ? splat(bias[n])
                                                  : load(bias + n * WIDTH<T>);
  return logit + more * T(LOG2_E);
}

// to = keep factor R of the pairs: 0 or 1 / (1 - dropout).
template <typename T, LanesAre L>
void keep_pairs(const AttnParams& a, const Block& at, T* to) {
  const PhiloxKey key = philox_key(*a.seed);
  const T kept = T(a.keep_scale);
  const int64_t rows = L == LanesAre::queries ? whole_vectors<T>(at.ni) : at.ni;
  const int64_t columns = L == LanesAre::queries ? at.nj : whole_vectors<T>(at.nj);
  uint32_t word[4][QUERIES];
  for (int64_t group = at.j0 / 4; group * 4 < at.j0 + columns; ++group) {
    for (int64_t i = 0; i < rows; ++i) {
      const PhiloxWords words = keep_words(key, at.molecule, at.head, at.i0 + i, group * 4);
      for (int w = 0; w < 4; ++w) word[w][i] = words.word[w];
    }
    for (int w = 0; w < 4; ++w) {
      const int64_t j = group * 4 + w - at.j0;
      if (j < 0 || j >= columns) continue;
      for (int64_t i = 0; i < rows; ++i)
        to[pair_at<L>(i, j)] = word[w][i] >= a.drop_threshold ? kept : T(0);
    }
  }
}

// Rows of one block without a finite logit: P is 0 there, and nothing else of them, not even a NaN,
// may reach a sum.
struct DeadRows {
  bool any;
  bool lane[QUERIES];

  template <typename T>
  void clear_rows(T* rows, int64_t ld, int64_t count) const {
    if (!any) return;
    for (int64_t i = 0; i < count; ++i)
      if (lane[i]) zero(rows + i * ld, ld);
  }
  // f(first, count) for each run of living rows.
  template <typename F>
  void living(int64_t count, F f) const {
    if (!any) return f(int64_t(0), count);
    for (int64_t i = 0, from; i < count; ++i) {
      if (lane[i]) continue;
      for (from = i; i < count && !lane[i];) ++i;
      f(from, i - from);
    }
  }
  template <LanesAre L, typename T>
  void clear_pairs(T* pairs, const Block& at, T value = 0) const {
    if (!any) return;
    const int64_t columns = L == LanesAre::queries ? at.nj : whole_vectors<T>(at.nj);
    for (int64_t i = 0; i < at.ni; ++i)
      if (lane[i])
        for (int64_t j = 0; j < columns; ++j) pairs[pair_at<L>(i, j)] = value;
  }
};

}  // namespace ATTN_ISA
}  // namespace attnpool

// Register-blocked products: a tile of R rows x C vectors of C stays in registers for the whole
// depth. Tile heights are balanced (18 rows are 6 + 6 + 6, not 8 + 8 + 2).
#include "product.h"

namespace attnpool {
namespace ATTN_ISA {
namespace {

// Rows of a tile by its vectors: as many as registers hold beside a row of b and one element of a,
// 32 registers with AVX-512 and 16 otherwise (also what 64-bit Arm can spare).
#if defined(__AVX512F__) || defined(ATTN_VECTOR_BYTES)
constexpr int MAX_VECTORS = 4, MAX_ROWS[] = {16, 12, 8, 6};
#else
constexpr int MAX_VECTORS = 3, MAX_ROWS[] = {12, 6, 4};
#endif

// What becomes of the sums of a tile: they are stored, or stored past the caches, or stored while
// the largest of each column is kept, or added to what is there.
enum class Fate { stored, streamed, topped, added };

// PAIRS: elements of a and b are two of bfloat16, whose two products are added.
template <bool PAIRS, typename V>
ATTN_INLINE void add_product(V& sum, const V& left, const V& right) {
#if defined(__AVX512F__)
  if constexpr (PAIRS) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
    return;
  }
#endif
  sum += left * right;
}

// rows: factors of the rows, or null; but the maxima of the columns where those are kept. last:
// place of the last vector in a row. more_a, more_b: the second product, or null.
template <typename T, bool BY_ROWS, Fate FATE, bool PAIRS, int C, int R>
void tile(const T* a, int64_t a_stride, const T* b, int64_t b_stride, T* c, int64_t c_stride,
          int depth, int64_t last, T factor, T* rows, const T* more_a, const T* more_b) {
  const auto place = [last](int j) { return j == C - 1 ? last : int64_t(j) * WIDTH<T>; };
  Vector<T> sum[R][C] = {};
  for (;;) {
#pragma GCC unroll 2
    for (int k = 0; k < depth; ++k) {
      Vector<T> right[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) right[j] = load(b + place(j));
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Vector<T> left = splat(a[BY_ROWS ? i * a_stride : i]);
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) add_product<PAIRS>(sum[i][j], left, right[j]);
      }
      b += b_stride;
      a += BY_ROWS ? 1 : a_stride;
    }
    if (!more_a) break;
    a = more_a, b = more_b;
    more_a = nullptr;
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i, c += c_stride) {
    constexpr bool ADDED = FATE == Fate::added;
    const T own = FATE != Fate::topped && rows ? rows[i] : T(1);
    const T all = ADDED ? factor : own * factor;
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      sum[i][j] *= all;
      if (ADDED) sum[i][j] += load(c + place(j)) * own;
    }
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      if (FATE == Fate::streamed) stream(c + place(j), sum[i][j]);
      else store(c + place(j), sum[i][j]);
    }
  }
  if (FATE != Fate::topped) return;
#pragma GCC unroll 4
  for (int j = 0; j < C; ++j) {
    Vector<T> top = load(rows + place(j));
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) top = larger_lanes(sum[i][j], top);
    store(rows + place(j), top);
  }
}

template <typename T>
using Tile = void (*)(const T*, int64_t, const T*, int64_t, T*, int64_t, int, int64_t, T, T*,
                      const T*, const T*);

// Tiles by rows - 1; those beyond what is ever called stand in for each other.
template <typename T, bool BY_ROWS, Fate FATE, bool PAIRS, int C, int... R>
struct Heights {
  static constexpr int MOST = MAX_ROWS[C - 1];
  static constexpr Tile<T> tiles[] = {
      tile<T, BY_ROWS, FATE, PAIRS, C, (R < MOST ? R + 1 : MOST)>...};
};
template <typename T, bool BY_ROWS, Fate FATE, bool PAIRS, int C>
constexpr const Tile<T>* HEIGHTS = Heights<T, BY_ROWS, FATE, PAIRS, C, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,
                                           10, 11, 12, 13, 14, 15>::tiles;

template <typename T, bool BY_ROWS, Fate FATE, bool PAIRS, int C>
void all_rows(const Product<T>& x, int64_t column) {
  const unsigned rows = unsigned(x.rows), tiles = (rows + MAX_ROWS[C - 1] - 1) / MAX_ROWS[C - 1];
  if (tiles == 0) return;
  const unsigned least = tiles == 1 ? rows : rows / tiles, higher = rows - tiles * least;
  const int64_t last = smaller((C - 1) * WIDTH<T>, x.columns - WIDTH<T> - column);
  const T *a = x.a, *b = x.b + column, *more_a = x.more_a;
  const T* const more_b = more_a ? x.more_b + column : nullptr;
  T *c = x.c + column, *extra = FATE == Fate::topped ? x.maxima + column : x.rows_scale;
  for (unsigned i = 0; i < tiles; ++i) {
    if (x.ahead) x.ahead->some();
    const int height = int(least + (i < higher));
    const Tile<T> tile_of_height = HEIGHTS<T, BY_ROWS, FATE, PAIRS, C>[height - 1];
    tile_of_height(a, x.a_stride, b, x.b_stride, c, x.c_stride, x.depth, last, x.factor, extra,
                   more_a, more_b);
    if (more_a) more_a += BY_ROWS ? height * x.a_stride : height;
    a += BY_ROWS ? height * x.a_stride : height;
    c += height * x.c_stride;
    if (FATE != Fate::topped && extra) extra += height;
  }
}

template <typename T, bool BY_ROWS, Fate FATE, bool PAIRS = false>
void product(const Product<T>& x) {
  int left = int(blocks_of(x.columns, WIDTH<T>)), blocks = int(blocks_of(left, MAX_VECTORS));
  for (int64_t column = 0; blocks > 0; --blocks) {
    const int vectors = int(unsigned(left) / unsigned(blocks));
    switch (vectors) {
      case 1: all_rows<T, BY_ROWS, FATE, PAIRS, 1>(x, column); break;
      case 2: all_rows<T, BY_ROWS, FATE, PAIRS, 2>(x, column); break;
      case 3: all_rows<T, BY_ROWS, FATE, PAIRS, 3>(x, column); break;
      default: all_rows<T, BY_ROWS, FATE, PAIRS, MAX_VECTORS>(x, column);
    }
    column += int64_t(vectors) * WIDTH<T>;
    left -= vectors;
  }
}

// Whether c takes whole, aligned vectors only.
template <typename T>
bool aligned(const Product<T>& x) {
  const uint64_t bytes = reinterpret_cast<uint64_t>(x.c) | uint64_t(x.c_stride) * sizeof(T);
  return bytes % VECTOR_BYTES == 0 && x.columns % WIDTH<T> == 0;
}

}  // namespace

template <typename T>
void product_rows(const Product<T>& x) {
  if (x.accumulate) return product<T, true, Fate::added>(x);
  if (x.maxima) return product<T, true, Fate::topped>(x);
  if (x.stream && aligned(x)) return product<T, true, Fate::streamed>(x);
  product<T, true, Fate::stored>(x);
}
template <typename T>
void product_columns(const Product<T>& x) {
  if (x.accumulate) return product<T, false, Fate::added>(x);
  if (x.stream && aligned(x)) return product<T, false, Fate::streamed>(x);
  product<T, false, Fate::stored>(x);
}

#if defined(__AVX512F__)
void pair_product_rows(const Product<float>& x) {
  if (x.maxima) return product<float, true, Fate::topped, true>(x);
  product<float, true, Fate::stored, true>(x);
}
void pair_product_columns(const Product<float>& x) {
  product<float, false, Fate::stored, true>(x);
}
#endif

template void product_rows(const Product<float>&);
template void product_rows(const Product<double>&);
template void product_columns(const Product<float>&);
template void product_columns(const Product<double>&);

}  // namespace ATTN_ISA
}  // namespace attnpool

// Register-blocked products: a tile of R rows x C vectors of C stays in registers for the whole
// depth. Tile heights are balanced (18 rows are 6 + 6 + 6, not 8 + 8 + 2).
#include "product.h"

namespace attnpool {
namespace ATTN_ISA {
namespace {

// 32 registers with AVX-512, 16 otherwise (also what 64-bit Arm can spare).
#if defined(__AVX512F__)
constexpr int MAX_VECTORS = 4;
constexpr int max_rows(int vectors) { return vectors == 4 ? 6 : 8; }
#else
constexpr int MAX_VECTORS = 2;
constexpr int max_rows(int vectors) { return vectors == 2 ? 6 : 8; }
#endif

template <typename T, bool BY_ROWS, int C, int R>
void tile(const Product<T>& x, int row, int64_t column) {
  constexpr int W = WIDTH<T>;
  Vector<T> sum[R][C] = {};
  const T* b = x.b + column;
  const int64_t b_stride = x.b_stride, a_stride = x.a_stride;
  const int depth = x.depth;
  const T* a = BY_ROWS ? x.a + row * a_stride : x.a + row;
  for (int k = 0; k < depth; ++k) {
    Vector<T> right[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; ++j) right[j] = load(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vector<T> left = splat(BY_ROWS ? a[i * a_stride + k] : a[i]);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) sum[i][j] += left * right[j];
    }
    b += b_stride;
    if (!BY_ROWS) a += a_stride;
  }
  const int64_t c_stride = x.c_stride;  // copies: stores to c might change x for all one knows
  T* c = x.c + row * c_stride + column;
  const T factor = x.factor;
  const T* const scale = x.rows_scale ? x.rows_scale + row : nullptr;
  if (x.accumulate) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i, c += c_stride) {
      const T keep = scale ? scale[i] : T(1);
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) store(c + j * W, load(c + j * W) * keep + sum[i][j] * factor);
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i, c += c_stride) {
      const T all = scale ? scale[i] * factor : factor;
#pragma GCC unroll 8
      for (int j = 0; j < C; ++j) store(c + j * W, sum[i][j] * all);
    }
  }
}

template <typename T>
using Tile = void (*)(const Product<T>&, int, int64_t);

// Tiles by vectors - 1 and rows - 1; those beyond what is ever called stand in for each other.
template <typename T, bool BY_ROWS, int C, int... R>
struct Heights {
  static constexpr Tile<T> tiles[] = {
      tile<T, BY_ROWS, C, (R < max_rows(C) ? R + 1 : max_rows(C))>...};
};
template <typename T, bool BY_ROWS, int C>
using AllHeights = Heights<T, BY_ROWS, C, 0, 1, 2, 3, 4, 5, 6, 7>;

template <typename T, bool BY_ROWS>
constexpr const Tile<T>* TILES[] = {
    AllHeights<T, BY_ROWS, 1>::tiles, AllHeights<T, BY_ROWS, 2>::tiles,
    AllHeights<T, BY_ROWS, (MAX_VECTORS < 3 ? 2 : 3)>::tiles,
    AllHeights<T, BY_ROWS, MAX_VECTORS>::tiles};

constexpr int tiles_of(int rows, int vectors) {
  return max_rows(vectors) == 8 ? (rows + 7) / 8 : (rows + 5) / 6;
}

template <typename T, bool BY_ROWS>
void product(const Product<T>& x) {
  int done = 0;
  for (int left = int(blocks_of(x.vectors, MAX_VECTORS)); left > 0; --left) {
    const int vectors = int(unsigned(x.vectors - done) / unsigned(left));
    const int64_t column = int64_t(done) * WIDTH<T>;
    int row = 0;
    for (int tiles = tiles_of(x.rows, vectors); tiles > 0; --tiles) {
      const int rows = int(unsigned(x.rows - row) / unsigned(tiles));
      TILES<T, BY_ROWS>[vectors - 1][rows - 1](x, row, column);
      row += rows;
    }
    done += vectors;
  }
}

}  // namespace

template <typename T>
void product_rows(const Product<T>& x) {
  product<T, true>(x);
}
template <typename T>
void product_columns(const Product<T>& x) {
  product<T, false>(x);
}

template void product_rows(const Product<float>&);
template void product_rows(const Product<double>&);
template void product_columns(const Product<float>&);
template void product_columns(const Product<double>&);

}  // namespace ATTN_ISA
}  // namespace attnpool

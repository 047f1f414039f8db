// Products of one warp over the rows of a small set: operands from global memory straight into
// registers, results from registers to global memory. No tile in shared memory, nothing to wait for.
//
// The order of a product's inner index is free as long as both operands use the same one, and so is
// the numbering of a result's units. Both are chosen so that a lane (4 g + t) reads and writes 16
// bytes at a time, and nothing has to be transposed; tiles are 8 rows:
//   by row     row g of every tile, bytes 16 t ... of each 64: its words 2 s and 2 s + 1 are the
//              lane's elements of step s of a product over the units
//   by column  rows 2 t and 2 t + 1 of every tile, bytes 16 g ... of each 128: the left operand of a
//              product over the rows, after PRMT for the half types and as it is for float. The
//              result is transposed, so a lane gets 16 neighbouring bytes of its rows 2 t, 2 t + 1.
// Accumulators of a product over units are right operands of a product over rows, as they stand.
#pragma once

#include "place.cuh"

namespace attnpool {

template <typename T, int D>
struct ByRow {
  static constexpr int BYTES = smaller(16, D * int(sizeof(T)) / 4), WORDS = BYTES / 4;
  static constexpr int UNITS = BYTES / int(sizeof(T)), CHUNK = 4 * UNITS, CHUNKS = D / CHUNK;
  static constexpr int TOGETHER = CHUNKS <= 2 ? CHUNKS : 1;  // copies of the code of a chunk
};
template <typename T, int D>
struct ByColumn {
  static constexpr int BYTES = smaller(16, D * int(sizeof(T)) / 8), WORDS = BYTES / 4;
  static constexpr int UNITS = BYTES / int(sizeof(T)), CHUNK = 8 * UNITS, CHUNKS = D / CHUNK;
  static constexpr int TILES = UNITS / 2;  // of 16 units, in a chunk
};

// ---- operands ----------------------------------------------------------------------------------

// float32 has three products of TF32: a number is its upper 11 bits, rounded, and a rest. Tensor
// cores truncate sums, so the small products have a sum of their own. The rest of an infinity is
// NaN, and so is that of a NaN, which can have the upper part 0: Sums tells the two apart.
ATTN_DEVICE void split(uint32_t x, uint32_t& high, uint32_t& low) {
  high = (x + 0x1000u) & 0xffffe000u;
  low = float_bits(bits_float(x) - bits_float(high));
}

// Four words of a left operand, as mma_16 and mma_tf32 take them.
template <typename T>
struct Left {
  uint32_t x[4];
  ATTN_DEVICE Left(uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) : x{x0, x1, x2, x3} {}
};
template <>
struct Left<float> {
  uint32_t high[4], low[4];
  ATTN_DEVICE Left(uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
    const uint32_t x[4] = {x0, x1, x2, x3};
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) split(x[i], high[i], low[i]);
  }
};

// 16 x 8 sums.
template <typename T>
struct Sums {
  float large[4] = {0, 0, 0, 0};
  ATTN_DEVICE float operator[](int e) const { return large[e]; }
  ATTN_DEVICE void add(const Left<T>& a, uint32_t b0, uint32_t b1) {
    mma_16(large, a.x, b0, b1, T{});
  }
};
template <>
struct Sums<float> {
  float large[4] = {0, 0, 0, 0}, small[4] = {0, 0, 0, 0};
  ATTN_DEVICE float operator[](int e) const {
    const bool infinite = fabsf(large[e]) == INFINITY;  // then it says all, and small is NaN
    return infinite ? large[e] : large[e] + small[e];
  }
  ATTN_DEVICE void add(const Left<float>& a, uint32_t b0, uint32_t b1) {
    uint32_t high[2], low[2];
    split(b0, high[0], low[0]);
    split(b1, high[1], low[1]);
    mma_tf32(small, a.low, high[0], high[1]);
    mma_tf32(small, a.high, low[0], low[1]);
    mma_tf32(large, a.high, high[0], high[1]);
  }
};

// Weights of one lane in an 8 x 8 tile: row g, columns 2 t and 2 t + 1, as a right operand.
template <typename T>
struct Weights {
  uint32_t word;
  ATTN_DEVICE Weights() {}
  ATTN_DEVICE Weights(float first, float second) : word(pack(first, second, T{})) {}
};
template <>
struct Weights<float> {
  uint32_t word[2];
  ATTN_DEVICE Weights() {}
  ATTN_DEVICE Weights(float first, float second) : word{float_bits(first), float_bits(second)} {}
};

// ---- rows --------------------------------------------------------------------------------------

// The rows of a set in one tensor and head, as one lane sees them. Tiles are counted from row
// `row_from` when they are read by row, and from row `column_from` by column. EXACT: as wide as the
// kernel; else units from `width` on are zero, which are all of an absent tensor. Rows from `size`
// on are zero, so nothing of another set's is ever read.
template <typename T, int D, bool EXACT>
struct SetRows {
  using Row = ByRow<T, D>;
  using Column = ByColumn<T, D>;
  char *by_row, *by_column;  // where this lane begins
  int stride, head_stride;   // bytes
  int rows_left, columns_left, width;
  int g, t;

  ATTN_DEVICE SetRows(const View& x, int molecule, Range rows, int row_from, int column_from,
                      int head, int64_t units)
      : stride(int(x.row) * int(sizeof(T))), head_stride(int(x.head) * int(sizeof(T))),
        rows_left(rows.size - row_from), columns_left(rows.size - column_from),
        width(x.data ? int(units) : 0), g(lane_index() / 4), t(lane_index() % 4) {
    char* first = static_cast<char*>(x.data) + int64_t(head) * head_stride;
    if (!EXACT) first += molecule * x.molecule * int64_t(sizeof(T));
    by_row = first + (int64_t(rows.first + row_from + g) * stride + t * Row::BYTES);
    by_column =
        first + (int64_t(rows.first + column_from + 2 * t) * stride + g * Column::BYTES);
  }

  ATTN_DEVICE void next_head(int step) {
    by_row += int64_t(step) * head_stride;
    by_column += int64_t(step) * head_stride;
  }

  // Row g of a tile, or row 2 t + e; whole: the tile is known to be.
  ATTN_DEVICE void load(uint32_t (&x)[Row::WORDS], int tile, int chunk, bool whole) const {
    const bool wanted = (whole || 8 * tile + g < rows_left) &&
                        (EXACT || chunk * Row::CHUNK + t * Row::UNITS < width);
    read<Row::BYTES>(x, by_row + int64_t(8 * tile) * stride + chunk * 4 * Row::BYTES, wanted);
  }
  ATTN_DEVICE void load(uint32_t (&x)[Column::WORDS], int tile, int e, int chunk,
                        bool whole) const {
    read<Column::BYTES>(x, by_column + int64_t(8 * tile + e) * stride + chunk * 8 * Column::BYTES,
                        has(tile, e, chunk, whole));
  }
  ATTN_DEVICE void store(const uint32_t (&x)[Column::WORDS], int tile, int e, int chunk,
                         bool whole) const {
    if (has(tile, e, chunk, whole))
      store_words<Column::BYTES>(
          by_column + int64_t(8 * tile + e) * stride + chunk * 8 * Column::BYTES, x);
  }

 private:
  ATTN_DEVICE bool has(int tile, int e, int chunk, bool whole) const {
    return (whole || 8 * tile + 2 * t + e < columns_left) &&
           (EXACT || chunk * Column::CHUNK + g * Column::UNITS < width);
  }
  template <int BYTES>
  static ATTN_DEVICE void read(uint32_t* x, const char* from, bool wanted) {
    if (wanted) {
      load_words<BYTES>(x, from);
    } else {
      ATTN_UNROLL
      for (int w = 0; w < BYTES / 4; ++w) x[w] = 0;
    }
  }
};

// A value of its own for the compiler, which else makes left operands of 16-byte loads by moving
// their words, again for each product. zero is 0, which only the host knows.
template <typename T>
ATTN_DEVICE uint32_t own(uint32_t x, uint32_t zero) {
  return IS_HALF<T> ? x ^ zero : x;
}

// Words of N tiles of a chunk by row, of which the first B tiles are known to be whole.
template <int B, typename T, int D, int N, bool EXACT>
ATTN_DEVICE void load_tiles(uint32_t (&x)[N][ByRow<T, D>::WORDS], const SetRows<T, D, EXACT>& rows,
                            int chunk) {
  ATTN_UNROLL
  for (int n = 0; n < N; ++n) rows.load(x[n], n, chunk, n < B);
}

// sums (pairs of QT tiles of x by NT tiles of y) += x yᵀ over the units of these words.
template <typename T, int QT, int NT, int WORDS>
ATTN_DEVICE void multiply_tiles(Sums<T> (&sums)[(QT + 1) / 2][NT], const uint32_t (&x)[QT][WORDS],
                                const uint32_t (&y)[NT][WORDS], uint32_t zero) {
  ATTN_UNROLL
  for (int s = 0; s < WORDS; s += 2)
    ATTN_UNROLL
    for (int m = 0; m < QT; m += 2) {
      const bool both = m + 1 < QT;
      const int o = both ? m + 1 : m;
      const Left<T> left(own<T>(x[m][s], zero), both ? own<T>(x[o][s], zero) : 0u,
                         own<T>(x[m][s + 1], zero), both ? own<T>(x[o][s + 1], zero) : 0u);
      ATTN_UNROLL
      for (int n = 0; n < NT; ++n) sums[m / 2][n].add(left, y[n][s], y[n][s + 1]);
    }
}

// sums += a bᵀ over all units. The first A and B tiles are known to be whole.
template <typename T, int D, int A, int B, int QT, int NT, bool EXACT>
ATTN_DEVICE void multiply_rows(Sums<T> (&sums)[(QT + 1) / 2][NT], const SetRows<T, D, EXACT>& a,
                               const SetRows<T, D, EXACT>& b, uint32_t zero) {
  using Form = ByRow<T, D>;
  ATTN_UNROLL_BY(Form::TOGETHER)
  for (int chunk = 0; chunk < Form::CHUNKS; ++chunk) {
    uint32_t x[QT][Form::WORDS], y[NT][Form::WORDS];
    load_tiles<A>(x, a, chunk);
    load_tiles<B>(y, b, chunk);
    multiply_tiles<T>(sums, x, y, zero);
  }
}

// Weights of R tiles of results by N tiles of rows, and these rows.
template <typename T, int D, int R, int N, bool EXACT>
struct Term {
  const Weights<T> (&weights)[R][N];
  const SetRows<T, D, EXACT>& rows;
};

// sums (R tiles x the units of one chunk, transposed) += the sum over the terms of weights x rows, of
// which the first B tiles are known to be whole. One list of tiles serves all terms, so half types,
// which take two at a time, have at most one left.
template <int B, typename T, int D, int R, int N, bool EXACT, int TERMS>
ATTN_DEVICE void multiply_columns(Sums<T> (&sums)[R][ByColumn<T, D>::TILES],
                                  const Term<T, D, R, N, EXACT> (&terms)[TERMS], int chunk) {
  using Form = ByColumn<T, D>;
  uint32_t y[TERMS * N][2][Form::WORDS];
  ATTN_UNROLL
  for (int n = 0; n < TERMS * N; ++n)
    ATTN_UNROLL
    for (int e = 0; e < 2; ++e) terms[n / N].rows.load(y[n][e], n % N, e, chunk, n % N < B);
  ATTN_UNROLL
  for (int n = 0; n < TERMS * N; n += IS_HALF<T> ? 2 : 1)
    ATTN_UNROLL
    for (int w = 0; w < Form::TILES; ++w) {
      const Weights<T>(&first)[R][N] = terms[n / N].weights;
      if constexpr (IS_HALF<T>) {
        const uint32_t low = lower_halves(y[n][0][w], y[n][1][w]);
        const uint32_t high = upper_halves(y[n][0][w], y[n][1][w]);
        const int o = n + 1 < TERMS * N ? n + 1 : n;
        const Weights<T>(&second)[R][N] = terms[o / N].weights;
        const Left<T> left(low, high, lower_halves(y[o][0][w], y[o][1][w]),
                           upper_halves(y[o][0][w], y[o][1][w]));
        ATTN_UNROLL
        for (int r = 0; r < R; ++r) {
          if (o > n) sums[r][w].add(left, first[r][n % N].word, second[r][o % N].word);
          else mma_8(sums[r][w].large, low, high, first[r][n % N].word, T{});
        }
      } else {
        const Left<T> left(y[n][0][2 * w], y[n][0][2 * w + 1], y[n][1][2 * w],
                           y[n][1][2 * w + 1]);
        ATTN_UNROLL
        for (int r = 0; r < R; ++r)
          sums[r][w].add(left, first[r][n % N].word[0], first[r][n % N].word[1]);
      }
    }
}

// Rows that have no finite logit, of R tiles; their results are 0 even where a sum is not finite.
template <int R>
struct DeadRows {
  uint32_t lanes[R];  // bit 4 g + t: row g of the tile
  ATTN_DEVICE bool has(int tile, int row) const { return lanes[tile] >> (4 * row) & 1; }
};

// Rows of R tiles times a factor: the sums of one chunk. The first B tiles are known to be whole.
// dead: null where no row is.
template <typename T, int D, int B, int R, bool EXACT>
ATTN_DEVICE void store_columns(const SetRows<T, D, EXACT>& x, int chunk, float factor,
                               const Sums<T> (&sums)[R][ByColumn<T, D>::TILES],
                               const DeadRows<R>* dead = nullptr) {
  using Form = ByColumn<T, D>;
  ATTN_UNROLL
  for (int r = 0; r < R; ++r)
    ATTN_UNROLL
    for (int e = 0; e < 2; ++e) {
      uint32_t words[Form::WORDS];
      ATTN_UNROLL
      for (int w = 0; w < Form::TILES; ++w) {
        float even = sums[r][w][e] * factor, odd = sums[r][w][e + 2] * factor;
        if (dead && dead->has(r, 2 * x.t + e)) even = odd = 0;
        const Weights<T> both(even, odd);
        if constexpr (IS_HALF<T>) words[w] = both.word;
        else words[2 * w] = both.word[0], words[2 * w + 1] = both.word[1];
      }
      x.store(words, r, e, chunk, r < B);
    }
}

}  // namespace attnpool

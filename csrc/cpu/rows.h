// Rows of one head of a tensor: read or written where they lie, or packed into a buffer of the
// accumulation type, dense and padded with zeros, whatever the tensor holds.
#pragma once

#include "ahead.h"
#include "kernels.h"
#include "simd.h"

namespace attnpool {
namespace ATTN_ISA {

constexpr int QUERIES = 64;  // of a block, see block.h

// Calls f with a value of the type that dtype names.
template <typename F>
ATTN_INLINE void with_stored(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float16: return f(Half());
    case Dtype::bfloat16: return f(Bfloat16());
    case Dtype::float32: return f(float());
    default: return f(double());
  }
}

ATTN_INLINE float widened(float x) { return x; }
ATTN_INLINE double widened(double x) { return x; }
ATTN_INLINE float widened(Half x) { return to_float(x); }
ATTN_INLINE float widened(Bfloat16 x) { return to_float(x); }
template <typename T>
ATTN_INLINE void narrow(T x, double* to) { *to = x; }
template <typename T>
ATTN_INLINE void narrow(T x, float* to) { *to = float(x); }
template <typename T>
ATTN_INLINE void narrow(T x, Half* to) { *to = to_half(float(x)); }
template <typename T>
ATTN_INLINE void narrow(T x, Bfloat16* to) { *to = to_bfloat16(float(x)); }

template <typename T, typename S>
constexpr bool STORES = sizeof(T) == 8 ? sizeof(S) == 8 : sizeof(S) <= 4;

// Where the rows of one head are read, or the rows of a result are summed: in the tensor itself if
// its layout allows, else in a buffer.
template <typename T>
struct Place {
  T* data;
  int64_t ld;
  bool direct;

  ATTN_INLINE T* row(int64_t i) const { return data + i * ld; }
};

// Columns of a product with rows of `width` elements, see product.h.
template <typename T>
constexpr int64_t columns_of(int64_t width) {
  return larger(width, WIDTH<T>);
}

// The place of rows of `width` elements. TAILS: those of the last vector may overlap the one before
// (see product.h), so that any width from a vector on lies well; else only whole vectors do.
template <typename T, bool TAILS = false>
Place<T> place_of(const View& x, Dtype dtype, int64_t molecule, int64_t first, int64_t head,
                  int64_t width, T* buffer) {
  const bool same = dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
  if (same && x.unit == 1 && (width % WIDTH<T> == 0 || (TAILS && width > WIDTH<T>)))
    return {address<T>(x, molecule, first, head), x.row, true};
  return {buffer, whole_vectors<T>(width), false};
}

// Copies rows and asks for the cache lines `ahead` elements further on, which are needed next; 0:
// for none. VECTORS: the width in vectors where it is known.
template <typename T, int VECTORS, typename S>
ATTN_INLINE void copy_rows(const S* from, int64_t row, int64_t count, int64_t width, T* to,
                           int64_t ld, int64_t ahead) {
  constexpr int W = WIDTH<T>, LINE = 64 / sizeof(S) > W ? 64 / sizeof(S) : W;
  const int64_t whole = VECTORS ? VECTORS * W : width / W * W;
  for (int64_t i = 0; i < count; ++i, from += row, to += ld) {
#pragma GCC unroll 4
    for (int64_t d = 0; d < whole; d += W) {
      store(to + d, load_as(from + d));
      if (ahead && d % LINE == 0) __builtin_prefetch(from + d + ahead, 0, 2);
    }
    if (VECTORS) continue;
    for (int64_t d = whole; d < width; ++d) to[d] = widened(from[d]);
    for (int64_t d = width; d < ld; ++d) to[d] = 0;
  }
}

// Rows first ... first + count - 1 of one head to to[count][ld], zero from width to ld.
template <typename T>
void pack_rows(const View& x, Dtype dtype, int64_t molecule, int64_t first, int64_t head,
               int64_t count, int64_t width, T* to, int64_t ld, int64_t ahead = 0) {
  with_stored(dtype, [&](auto kind) {
    using S = decltype(kind);
    if constexpr (STORES<T, S>) {
      const S* from = address<S>(x, molecule, first, head);
      if (x.unit != 1) {
        for (int64_t i = 0; i < count; ++i, from += x.row, to += ld) {
          for (int64_t d = 0; d < width; ++d) to[d] = widened(from[d * x.unit]);
          for (int64_t d = width; d < ld; ++d) to[d] = 0;
        }
        return;
      }
      switch (width % WIDTH<T> ? 0 : width / WIDTH<T>) {
        case 1: return copy_rows<T, 1>(from, x.row, count, width, to, ld, ahead);
        case 2: return copy_rows<T, 2>(from, x.row, count, width, to, ld, ahead);
        case 4: return copy_rows<T, 4>(from, x.row, count, width, to, ld, ahead);
        default: return copy_rows<T, 0>(from, x.row, count, width, to, ld, ahead);
      }
    }
  });
}

// Whether a result is so large that it had better not pass through the caches: nothing that was
// written is there any more when it is read.
inline bool is_large(const View& x, int64_t rows) {
  constexpr int64_t LARGE = 1 << 20;  // elements
  return x.row * rows > LARGE;
}

// Whether rows so far apart stay in the L1 cache together: those whose distance has many factors of
// two meet in few of its sets. With AVX-512 a product reads them too seldom for that to count.
template <typename T>
ATTN_INLINE bool stay_together(int64_t count, int64_t row) {
  constexpr int64_t SETS = 4096, ROWS_IN_A_SET = 4;  // bytes of all sets; rows that leave room
  const int64_t bytes = row * int64_t(sizeof(T));
  return VECTOR_BYTES == 64 || count * smaller(bytes & -bytes, SETS) <= ROWS_IN_A_SET * SETS;
}

// Rows to be read: where they lie if they are wanted there and their layout allows, else packed.
template <typename T>
Place<T> rows_of(const View& x, Dtype dtype, int64_t molecule, int64_t first, int64_t head,
                   int64_t count, int64_t width, T* buffer, bool in_place, int64_t ahead) {
  Place<T> rows{buffer, whole_vectors<T>(width), false};
  if (in_place && stay_together<T>(count, x.row))
    rows = place_of<T, true>(x, dtype, molecule, first, head, width, buffer);
  if (!rows.direct)
    pack_rows(x, dtype, molecule, first, head, count, width, buffer, rows.ld, ahead);
  return rows;
}

// from[count][ld] (times rows_scale[i]) to rows first ... of one head; the opposite of pack_rows.
template <typename T>
void store_rows(const T* from, int64_t ld, const T* rows_scale, const View& x, Dtype dtype,
                int64_t molecule, int64_t first, int64_t head, int64_t count, int64_t width) {
  with_stored(dtype, [&](auto kind) {
    using S = decltype(kind);
    if constexpr (STORES<T, S>) {
      constexpr int W = WIDTH<T>;
      S* to = address<S>(x, molecule, first, head);
      const int64_t whole = x.unit == 1 ? width / W * W : 0;
      for (int64_t i = 0; i < count; ++i, from += ld, to += x.row) {
        const T scale = rows_scale ? rows_scale[i] : T(1);
        for (int64_t d = 0; d < whole; d += W) store_as(to + d, load(from + d) * scale);
        for (int64_t d = whole; d < width; ++d) narrow(from[d] * scale, to + d * x.unit);
      }
    }
  });
}

template <typename T>
void fill_rows(T value, const View& x, Dtype dtype, int64_t molecule, int64_t first, int64_t head,
               int64_t count, int64_t width) {
  with_stored(dtype, [&](auto kind) {
    using S = decltype(kind);
    if constexpr (STORES<T, S>)
      for (int64_t i = 0; i < count; ++i) {
        S* to = address<S>(x, molecule, first + i, head);
        for (int64_t d = 0; d < width; ++d) narrow(value, to + d * x.unit);
      }
  });
}

template <typename T>
ATTN_INLINE void zero(T* to, int64_t count) {
  memset(static_cast<void*>(to), 0, size_t(count) * sizeof(T));
}

// to[d][i] = row i of `from`, element d, for d < width; `to` has rows of LD. The lanes of the last
// vector from `count` on repeat the last row. width >= WIDTH<T>: where it is no multiple, some
// columns are written twice.
template <typename T, int LD>
void transpose_rows(const T* from, int64_t ld, int64_t count, int64_t width, T* to,
                    Ahead* ahead = nullptr) {
  constexpr int W = WIDTH<T>;
  const T* rows[W];
  for (int64_t i = 0; i < count; i += W) {
    const T* row = from + i * ld;
    const T* const last = from + (count - 1) * ld;
    for (int r = 0; r < W; ++r, row += ld) rows[r] = row < last ? row : last;
    for (int64_t d = 0; d < width; d += W) {
      if (ahead) ahead->some();
      const int64_t column = smaller(d, width - W);
      transpose<T>([&](int r) { return rows[r] + column; }, to + column * LD + i, LD);
    }
  }
}

// Squares of WIDTH x WIDTH that are transposed, each of which asks ahead.
template <typename T>
ATTN_INLINE int64_t squares_of(int64_t rows, int64_t columns) {
  return blocks_of(rows, WIDTH<T>) * blocks_of(columns, WIDTH<T>);
}

// What lies ahead of a block of `count` rows of `rows`: the next block, else the next head, else
// the next molecule.
ATTN_INLINE int64_t ahead_of(const View& x, const Span& rows, int64_t count, int64_t head,
                             int64_t heads) {
  if (count < rows.size) return count * x.row;
  return head + 1 < heads ? x.head : rows.size * x.row - head * x.head;
}

}  // namespace ATTN_ISA
}  // namespace attnpool

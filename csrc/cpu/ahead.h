// What will be needed next, asked for bit by bit, so that it comes while products are computed.
#pragma once

#include "../params.h"
#include "kernels.h"
#include "simd.h"

namespace attnpool {
namespace ATTN_ISA {

class Ahead {
 public:
  void clear() { used_ = at_ = lines_ = 0; }

  // So many rows of so many bytes, `row` bytes apart.
  void add(const char* from, int64_t bytes, int64_t row, int64_t rows) {
    if (rows <= 0 || used_ == MOST) return;
    pieces_[used_++] = {from, from, from + bytes, row, rows};
    lines_ += rows * blocks_of(bytes, LINE);
  }

  // Spreads what was added over so many calls of some().
  void spread(int64_t calls) { share_ = lines_ / larger(calls, 1) + 1; }

  ATTN_INLINE void some() {
    if (at_ < used_) fetch(share_);
  }

 private:
  static constexpr int64_t LINE = 64, MOST = 8;
  struct Piece {
    const char *line, *from, *end;
    int64_t row, rows;
  };

  void fetch(int64_t lines) {
    Piece piece = pieces_[at_];
    while (lines > 0) {
      for (; lines > 0 && piece.line < piece.end; --lines, piece.line += LINE)
        __builtin_prefetch(piece.line, 0, 2);
      if (piece.line < piece.end) break;
      piece.line = piece.from += piece.row;
      piece.end += piece.row;
      if (--piece.rows > 0) continue;
      if (++at_ == used_) return;
      piece = pieces_[at_];
    }
    pieces_[at_] = piece;
  }

  Piece pieces_[MOST];
  int64_t used_ = 0, at_ = 0, lines_ = 0, share_ = 0;
};

// Tiles of a product, about, each of which calls some().
template <typename T>
ATTN_INLINE int64_t tiles_of(int64_t rows, int64_t columns) {
  constexpr int64_t VECTORS = VECTOR_BYTES == 64 ? 24 : 12;
  return blocks_of(rows * blocks_of(columns, WIDTH<T>), VECTORS);
}

struct Tensor {
  const View& x;
  int64_t width;
};

// To be called before each head with the tensors that it reads, of queries and of keys, and the
// tiles that it computes. Small molecules are asked for as a whole: rows come much faster than the
// pieces that belong to one head. Of large ones only the next head fits into the cache.
template <int Q, int K>
void ask_ahead(Ahead& ahead, const AttnParams& a, const Task& task, int64_t molecule, int64_t head,
               int64_t tiles, const Tensor (&queries)[Q], const Tensor (&keys)[K]) {
  constexpr int64_t SMALL = VECTOR_BYTES == 64 ? 1 << 18 : 1 << 17;  // bytes of a molecule
  constexpr int64_t MOST_ROWS = 128;  // more are left to whoever packs them
  const int64_t element = a.dtype == Dtype::float64 ? 8 : a.dtype == Dtype::float32 ? 4 : 2;
  const bool all_heads = task.head_end - task.head == a.heads;
  const bool more = molecule + 1 < task.molecule_end;
  const Span next_queries = more ? query_span(a, molecule + 1) : Span{};
  const Span next_keys = more ? key_span(a, molecule + 1) : Span{};
  int64_t bytes = 0;
  for (const Tensor& t : queries) bytes += t.x.data ? next_queries.size * t.width : 0;
  for (const Tensor& t : keys) bytes += t.x.data ? next_keys.size * t.width : 0;
  if (all_heads && bytes * element * a.heads <= SMALL) {
    if (head > task.head) return;
    ahead.clear();
    const auto add = [&](const Tensor& t, const Span& rows) {
      const int64_t row = a.heads * t.width;
      if (!t.x.data || t.x.unit != 1 || t.x.head != t.width || t.x.row != row) return;
      const char* const data = static_cast<const char*>(t.x.data);
      ahead.add(data + rows.first * row * element, rows.size * row * element, 0, 1);
    };
    if (!a.shared_seeds)
      for (const Tensor& t : queries) add(t, next_queries);
    for (const Tensor& t : keys) add(t, next_keys);
    return ahead.spread(tiles * a.heads);
  }
  ahead.clear();
  const bool same = head + 1 < task.head_end;
  if (!same && !more) return;
  const int64_t next = same ? head + 1 : task.head;
  const auto add = [&](const Tensor& t, const Span& rows) {
    if (!t.x.data || t.x.unit != 1 || rows.size > MOST_ROWS) return;
    const char* const data = static_cast<const char*>(t.x.data);
    ahead.add(data + (rows.first * t.x.row + next * t.x.head) * element, t.width * element,
              t.x.row * element, rows.size);
  };
  if (!a.shared_seeds)
    for (const Tensor& t : queries) add(t, same ? query_span(a, molecule) : next_queries);
  for (const Tensor& t : keys) add(t, same ? key_span(a, molecule) : next_keys);
  ahead.spread(tiles);
}

// The rows of a molecule after the `count` ones from `first` on, as many at most.
ATTN_INLINE Span after(const Span& rows, int64_t first, int64_t count) {
  const int64_t next = first + count;
  return {rows.first + next, larger(0, smaller(count, rows.size - next))};
}

// To be called before each head where all heads of some rows come before the next rows: asks for a
// share of those.
template <int N>
void ask_for_share(Ahead& ahead, const AttnParams& a, int64_t head, const Span& next,
                   int64_t calls, const View (&tensors)[N]) {
  const int64_t element = a.dtype == Dtype::float64 ? 8 : a.dtype == Dtype::float32 ? 4 : 2;
  const int64_t rows = blocks_of(next.size, a.heads), first = smaller(head * rows, next.size);
  const int64_t count = smaller(rows, next.size - first);
  ahead.clear();
  for (const View& x : tensors) {
    if (!x.data || x.unit != 1 || x.row != a.heads * x.head) continue;
    const char* const data = static_cast<const char*>(x.data);
    ahead.add(data + (next.first + first) * x.row * element, count * x.row * element, 0, count > 0);
  }
  ahead.spread(calls);
}

}  // namespace ATTN_ISA
}  // namespace attnpool

// Long sums: how their error stays that of a short one. Few keys are summed
// by themselves first, then the block, then up to TOGETHER blocks; those sums are added without
// loss. What a molecule's sums look like depends on its own size only.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "simd.h"

namespace attnpool {
namespace ATTN_ISA {

// Row sums of a block over its keys. Each FEW of them are summed by themselves first, as 128 equal
// terms one after the other are 20 roundings off. term(j, sums) adds those of key j.
constexpr int64_t FEW = 16;

template <typename T, int N, typename F>
ATTN_INLINE void sum_keys(int64_t nj, Vector<T> (&sums)[N], F term) {
  for (int64_t first = 0; first < nj; first += FEW) {
    Vector<T> few[N] = {};
    const int64_t last = smaller(nj, first + FEW);
    for (int64_t j = first; j < last; ++j) term(j, few);
#pragma GCC unroll 5
    for (int i = 0; i < N; ++i) sums[i] += few[i];
  }
}

// A sum over any number of blocks. The first TOGETHER are added up in the target, one rounding a
// block; then, and whenever the target holds so many again, it is taken over into a sum that loses
// nothing. So the error does not grow with the number of blocks, and short sums cost nothing.
constexpr int64_t TOGETHER = 16;

template <typename T>
struct LongSum {
  T *sum, *lost;         // [rows][width]; used from the block after TOGETHER on
  int64_t blocks = 0;    // in the target
  bool started = false;  // whether there is anything in sum

  // To be called before every block: whether it is added to the target, else it replaces it.
  bool next(const Place<T>& to, int64_t rows, int64_t width) {
    if (blocks == TOGETHER) take_over(to, rows, width, nullptr);
    return blocks++ > 0;
  }

  // decay[i] is what the older sums of row i must be multiplied by first.
  void take_over(const Place<T>& to, int64_t rows, int64_t width, const T* decay) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t x = 0; x < width; x += WIDTH<T>) {
        Vector<T> s = load(to.row(i) + x), l{};
        if (started) {
          s = load(sum + i * width + x), l = load(lost + i * width + x);
          if (decay) s *= decay[i], l *= decay[i];
          add_exactly<T>(s, l, load(to.row(i) + x));
        }
        store(sum + i * width + x, s);
        store(lost + i * width + x, l);
      }
    blocks = 0;
    started = true;
  }

  // Everything to the target.
  void finish(const Place<T>& to, int64_t rows, int64_t width, const T* decay = nullptr) {
    if (!started) return;
    take_over(to, rows, width, decay);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t x = 0; x < width; x += WIDTH<T>)
        store(to.row(i) + x,
              whole_sum<T>(load(sum + i * width + x), load(lost + i * width + x)));
  }
};

// Most query rows of a molecule of a task.
inline int64_t longest_of(const AttnParams& a, const Task& task) {
  int64_t longest = 0;
  for (int64_t molecule = task.molecule; molecule < task.molecule_end; ++molecule)
    longest = larger(longest, query_span(a, molecule).size);
  return longest;
}

// Rows that a sum over the keys of a molecule, or over molecules, may need in a LongSum.
template <typename T>
int64_t long_rows(const AttnParams& a, int64_t longest, int64_t keys) {
  if (a.shared_seeds) return a.heads * a.query_rows;
  return a.key_rows > TOGETHER * keys ? longest : 0;
}

// Keys of a part of a giant (see plan.cpp) that all heads go through before the next ones, so that
// rows are read about in the order in which they lie.
constexpr int64_t PIECE_BLOCKS = 2;

// f(piece, head, sum over keys) for the pieces and heads of a task that is a part of one molecule.
template <typename T, typename F>
void for_each_piece(const Task& task, int64_t keys, T* const (&buffers)[2], F f) {
  for (int64_t first = task.first; first < task.last; first += PIECE_BLOCKS * keys) {
    Task piece = task;
    piece.first = first;
    piece.last = smaller(task.last, first + PIECE_BLOCKS * keys);
    for (int64_t head = task.head; head < task.head_end; ++head) {
      LongSum<T> sum{buffers[0], buffers[1], first > task.first ? 1 : 0};
      f(piece, head, sum);
    }
  }
}

// f(molecule, head, sum over keys) for the molecules and heads of a task. With shared seeds that
// sum goes on from molecule to molecule, in dq_sum. buffers: long_rows x ld each.
template <typename T, typename F>
void for_each_head(const AttnParams& a, const Task& task, T* const (&buffers)[2], int64_t ld, F f) {
  const auto sum_of = [&](int64_t head, const LongSum<T>& like) {
    const int64_t skip = a.shared_seeds ? head * a.query_rows * ld : 0;
    return LongSum<T>{buffers[0] + skip, buffers[1] + skip, like.blocks, like.started};
  };
  LongSum<T> before{nullptr, nullptr};  // what all heads have in common
  for (int64_t molecule = task.molecule; molecule < task.molecule_end; ++molecule) {
    LongSum<T> sum{nullptr, nullptr};
    for (int64_t head = task.head; head < task.head_end; ++head) {
      sum = sum_of(head, before);
      f(molecule, head, sum);
    }
    if (a.shared_seeds) before = sum;
  }
  for (int64_t head = task.head; before.started && head < task.head_end; ++head)
    sum_of(head, before)
        .finish({static_cast<T*>(task.dq_sum) + head * a.query_rows * ld, ld, true}, a.query_rows,
                ld);
}

}  // namespace ATTN_ISA
}  // namespace attnpool

// Forward pass of a task: (F1) to (F3), softmax kept online over blocks of keys.
//
// Source of the algorithm: Dao et al., FlashAttention (NeurIPS 2022); blocks as in block.h.
#include "block.h"
#include "passes.h"

namespace attnpool {
namespace ATTN_ISA {
namespace {

constexpr int64_t KEPT_BYTES = 1 << 20;  // packed keys and values that stay in the L2 cache

template <typename T>
struct ForwardScratch {
  T *q, *q_t, *k, *v, *s, *pairs, *o, *o_sum, *o_lost, *maximum, *taken, *sum, *lost, *row;
  int64_t keys, kept, head_ld, value_ld;

  ForwardScratch(const AttnParams& a, Arena& arena) {
    head_ld = whole_vectors<T>(a.head_dim);
    value_ld = whole_vectors<T>(a.value_dim);
    keys = key_block<T>(larger(head_ld, value_ld));
    q = arena.take<T>(QUERIES * head_ld);
    q_t = arena.take<T>(QUERIES * head_ld);
    kept = larger(keys, KEPT_BYTES / (int64_t(sizeof(T)) * (head_ld + value_ld)));
    k = arena.take<T>(kept * head_ld);
    v = arena.take<T>(kept * value_ld);
    s = arena.take<T>(keys * QUERIES);
    pairs = arena.take<T>(a.bias.data || a.key_bias.data || a.seed ? keys * QUERIES : 0);
    arena.each(QUERIES * value_ld, o, o_sum, o_lost);
    arena.each(QUERIES, maximum, taken, sum, lost, row);
  }
};

// 2^(old - now): what sums relative to an old maximum must be multiplied by.
template <typename T>
ATTN_INLINE Vector<T> fading(Vector<T> old, Vector<T> now) {
  const Vector<T> infinity = splat(T(__builtin_inf()));
  return exp2<T>(old - (now == -infinity ? Vector<T>{} : now));
}

// Turns logits s (and biases) into weights exp(s - max) and moves the running maximum and sum of each
// row on; decay[i] is what the sums of earlier blocks must be multiplied by. Over several blocks
// the maximum is rounded to a whole number: then decay is a power of 2, which rounds nothing away,
// however often the maximum rises.
template <typename T, Added ADDED>
void soften(T* s, const T* bias, int64_t nj, int64_t lanes, bool one_block, T* maximum, T* sum,
            T* lost, T* decay) {
  const Vector<T> infinity = splat(T(__builtin_inf()));
  for (int64_t x = 0; x < lanes; x += WIDTH<T>) {
    const Vector<T> old = load(maximum + x);
    Vector<T> top = old;
    for (int64_t j = 0; j < nj; ++j) {
      const Vector<T> logit = with_bias<T, ADDED>(load(s + j * QUERIES + x), bias, j, x);
      if (ADDED != Added::nothing) store(s + j * QUERIES + x, logit);
      top = larger_lanes(logit, top);
    }
    if (!one_block) top = nearest_whole<T>(top);
    store(maximum + x, top);
    const Vector<T> finite = top == -infinity ? Vector<T>{} : top;
    Vector<T> sums[1] = {};
    sum_keys<T>(nj, sums, [&](int64_t j, Vector<T>(&sum)[1]) {
      const Vector<T> weight = exp2<T>(load(s + j * QUERIES + x) - finite);
      sum[0] += weight;
      store(s + j * QUERIES + x, weight);
    });
    Vector<T> total = sums[0];
    if (!one_block) {
      const Vector<T> fade = fading<T>(old, top);
      Vector<T> before = load(sum + x) * fade, rest = load(lost + x) * fade;
      add_exactly<T>(before, rest, total);
      total = before;
      store(lost + x, rest);
      store(decay + x, fade);
    }
    store(sum + x, total);
  }
}

template <typename T>
void multiply_pairs(T* s, const T* by, int64_t nj, int64_t lanes) {
  for (int64_t j = 0; j < nj; ++j)
    for (int64_t x = 0; x < lanes; x += WIDTH<T>)
      store(s + j * QUERIES + x, load(s + j * QUERIES + x) * load(by + j * QUERIES + x));
}

// maximum becomes lse = max + log sum; row = 1 / sum, 0 in rows without a finite logit. Returns
// whether there are such rows.
template <typename T>
bool finish_rows(int64_t ni, T* maximum, const T* sum, const T* lost, T* row) {
  for (int64_t x = 0; x < ni; x += WIDTH<T>) {
    const Vector<T> total = whole_sum<T>(load(sum + x), load(lost + x));
    store(maximum + x, load(maximum + x) * T(LN_2) + log<T>(total));
    store(row + x, total == Vector<T>{} ? Vector<T>{} : T(1) / total);
  }
  bool dead = false;
  for (int64_t i = 0; i < ni; ++i) dead |= sum[i] == 0;
  return dead;
}

template <typename T>
void run_head(const AttnParams& a, const Task& task, int64_t molecule, int64_t head,
              const ForwardScratch<T>& w) {
  Block at{molecule, head, query_span(a, molecule), key_span(a, molecule), 0, 0, 0, 0};
  const int64_t first = smaller(task.first, at.queries.size);
  const int64_t last = smaller(task.last, at.queries.size);
  const T infinity = T(__builtin_inf());
  if (at.keys.size == 0) {
    const int64_t row = at.queries.first + first;
    fill_rows(T(0), a.out, a.dtype, molecule, row, head, last - first, a.value_dim);
    for (int64_t i = 0; i < last - first; ++i)
      *address<T>(a.lse, molecule, row + i, head) = -infinity;
    return;
  }
  const int64_t key_step = step_of(at.keys.size, w.keys, 4);
  const int64_t query_step = step_of(at.queries.size, QUERIES, WIDTH<T>);
  const bool one_block = key_step >= at.keys.size, keep = at.keys.size <= w.kept;
  for (at.i0 = first; at.i0 < last; at.i0 += query_step) {
    at.ni = smaller(query_step, last - at.i0);
    const int64_t row = at.queries.first + at.i0, lanes = whole_vectors<T>(at.ni);
    pack_rows(a.q, a.dtype, molecule, row, head, at.ni, a.head_dim, w.q, w.head_ld,
              ahead_of(a.q, at.queries, at.ni, head, a.heads));
    transpose_rows(w.q, w.head_ld, at.ni, w.q_t);
    for (int64_t i = 0; i < lanes; ++i) w.maximum[i] = w.taken[i] = -infinity, w.sum[i] = w.lost[i] = 0;
    const Target<T> out = one_block ? target_of(a.out, a.dtype, molecule, row, head, a.value_dim,
                                                w.o, w.value_ld)
                                    : Target<T>{w.o, w.value_ld, false};
    LongSum<T> sums{w.o_sum, w.o_lost};
    const auto decay_of_taken = [&] {
      for (int64_t x = 0; x < lanes; x += WIDTH<T>) {
        store(w.row + x, fading<T>(load(w.taken + x), load(w.maximum + x)));
        store(w.taken + x, load(w.maximum + x));
      }
      return w.row;
    };
    bool dead = false;
    for (at.j0 = 0; at.j0 < at.keys.size; at.j0 += key_step) {
      if (sums.blocks == TOGETHER) sums.take_over(out, at.ni, w.value_ld, decay_of_taken());
      at.nj = smaller(key_step, at.keys.size - at.j0);
      const int64_t key = at.keys.first + at.j0;
      T* const k = w.k + (keep ? at.j0 * w.head_ld : 0);
      T* const v = w.v + (keep ? at.j0 * w.value_ld : 0);
      if (!keep || at.i0 == first) {
        pack_rows(a.k, a.dtype, molecule, key, head, at.nj, a.head_dim, k, w.head_ld,
                  ahead_of(a.k, at.keys, at.nj, head, a.heads));
        pack_rows(a.v, a.dtype, molecule, key, head, at.nj, a.value_dim, v, w.value_ld,
                  ahead_of(a.v, at.keys, at.nj, head, a.heads));
      }
      pair_products(at, k, w.head_ld, w.q_t, a.head_dim, w.s, T(a.scale * LOG2_E), false);
      const Added added = pack_bias(a, at, w.pairs);  // (F1), (F2)
      const auto soften_block = added == Added::nothing ? soften<T, Added::nothing>
                                : added == Added::keys  ? soften<T, Added::keys>
                                                        : soften<T, Added::pairs>;
      soften_block(w.s, w.pairs, at.nj, lanes, one_block, w.maximum, w.sum, w.lost, w.row);
      if (a.seed) {
        keep_pairs(a, at, w.pairs);
        multiply_pairs(w.s, w.pairs, at.nj, lanes);
      }
      if (one_block) dead = finish_rows(at.ni, w.maximum, w.sum, w.lost, w.row);
      const bool add = sums.blocks++ > 0;
      product_columns<T>({w.s, QUERIES, v, w.value_ld, out.data, out.ld, int(at.ni),  // (F3)
                          int(w.value_ld / WIDTH<T>), int(at.nj), T(1),
                          one_block || add ? w.row : nullptr, add});
    }
    if (sums.started) sums.finish(out, at.ni, w.value_ld, decay_of_taken());
    if (!one_block) dead = finish_rows(at.ni, w.maximum, w.sum, w.lost, w.row);
    if (!out.direct)
      store_rows(out.data, out.ld, one_block ? nullptr : w.row, a.out, a.dtype, molecule, row, head,
                 at.ni, a.value_dim);
    if (dead)
      for (int64_t i = 0; i < at.ni; ++i)
        if (w.sum[i] == 0)
          fill_rows(T(0), a.out, a.dtype, molecule, row + i, head, 1, a.value_dim);
    write_statistic(w.maximum, a.lse, molecule, row, head, at.ni);
  }
}

template <typename T>
void run(const AttnParams& a, const Task& task, void* buffer) {
  Arena arena(buffer);
  const ForwardScratch<T> scratch(a, arena);
  for (int64_t molecule = task.molecule; molecule < task.molecule_end; ++molecule)
    for (int64_t head = task.head; head < task.head_end; ++head)
      run_head<T>(a, task, molecule, head, scratch);
}

}  // namespace

void forward(const AttnParams& a, const Task& task, void* scratch) {
  if (a.dtype == Dtype::float64) return run<double>(a, task, scratch);
  run<float>(a, task, scratch);
}

size_t forward_scratch(const AttnParams& a) {
  Arena arena(nullptr);
  if (a.dtype == Dtype::float64) ForwardScratch<double>(a, arena);
  else ForwardScratch<float>(a, arena);
  return size_t(arena.used());
}

}  // namespace ATTN_ISA
}  // namespace attnpool

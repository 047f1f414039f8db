// First derivative, (B1) to (B7), of a task: P from the saved LSE, block by block; keys outside,
// queries inside. A molecule that fits one block is read once. Nothing quadratic is stored.
#include "../math.h"
#include "block.h"
#include "passes.h"

namespace attnpool {
namespace ATTN_ISA {
namespace {

template <typename T>
struct Scratch {
  T *q, *q_t, *k, *v, *dout, *dout_t, *out, *p, *ds, *pairs, *dq, *dk, *dv;
  T *minus_lse, *delta, *dlse;
  int64_t keys, head_ld, value_ld;

  Scratch(const AttnParams& a, int64_t longest, Arena& arena) {
    head_ld = whole_vectors<T>(a.head_dim);
    value_ld = whole_vectors<T>(a.value_dim);
    keys = key_block<T>(larger(head_ld, value_ld));
    q = arena.take<T>(QUERIES * head_ld);
    q_t = arena.take<T>(QUERIES * head_ld);
    k = arena.take<T>(keys * head_ld);
    v = arena.take<T>(keys * value_ld);
    dout = arena.take<T>(QUERIES * value_ld);
    dout_t = arena.take<T>(QUERIES * value_ld);
    out = arena.take<T>(QUERIES * value_ld);
    p = arena.take<T>(keys * QUERIES);
    ds = arena.take<T>(keys * QUERIES);
    pairs = arena.take<T>(a.bias.data || a.seed ? keys * QUERIES : 0);
    dk = arena.take<T>(keys * head_ld);
    dv = arena.take<T>(keys * value_ld);
    minus_lse = arena.take<T>(QUERIES);
    delta = arena.take<T>(QUERIES);
    dlse = arena.take<T>(QUERIES);
    dq = arena.take<T>(longest * head_ld);
  }
};

// p to P (times R), ds from dO.v to dS. ONE_BLOCK: every key is here; P is divided by its sum,
// and delta = rowsum(P dP) comes from the block itself.
template <typename T, bool DROPOUT, bool ONE_BLOCK>
void score_gradients(T* p, T* ds, const T* keep, int64_t nj, int64_t lanes, const T* delta,
                     const T* dlse) {
  for (int64_t x = 0; x < lanes; x += WIDTH<T>) {
    Vector<T> sum{}, total{};
    if (ONE_BLOCK) {
      for (int64_t j = 0; j < nj; ++j) {
        const int64_t at = j * QUERIES + x;
        const Vector<T> weight = load(p + at);
        Vector<T> dp = load(ds + at);
        if (DROPOUT) dp *= load(keep + at);
        total += weight;
        sum += weight * dp;
      }
      total = total == Vector<T>{} ? Vector<T>{} : T(1) / total;
      sum *= total;
    } else {
      sum = load(delta + x);
    }
    const Vector<T> delta_l = sum - load(dlse + x);  // (B2)
    for (int64_t j = 0; j < nj; ++j) {
      const int64_t at = j * QUERIES + x;
      Vector<T> weight = load(p + at), dp = load(ds + at);
      if (ONE_BLOCK) weight *= total;
      if (DROPOUT) {
        const Vector<T> kept = load(keep + at);
        dp *= kept;
        store(p + at, weight * kept);
      } else if (ONE_BLOCK) {
        store(p + at, weight);
      }
      store(ds + at, score_gradient(weight, dp, delta_l));  // (B3)
    }
  }
}

template <typename T>
void row_products(const T* a, const T* b, int64_t ld, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) {
    Vector<T> sum{};
    for (int64_t d = 0; d < ld; d += WIDTH<T>) sum += load(a + i * ld + d) * load(b + i * ld + d);
    T total = 0;
    for (int lane = 0; lane < WIDTH<T>; ++lane) total += sum[lane];
    to[i] = total;
  }
  for (int64_t i = count; i < whole_vectors<T>(count); ++i) to[i] = 0;
}

template <typename T>
void run_head(const AttnParams& a, const Task& task, int64_t molecule, int64_t head,
              const Scratch<T>& w) {
  Pairs at{molecule, head, query_span(a, molecule), key_span(a, molecule), 0, 0, 0, 0};
  const Span queries = at.queries, keys = at.keys;
  const int64_t first = smaller(task.first, keys.size), last = smaller(task.last, keys.size);
  if (queries.size == 0) {
    fill_rows(T(0), a.dk, a.dtype, 0, keys.first + first, head, last - first, a.head_dim);
    fill_rows(T(0), a.dv, a.dtype, 0, keys.first + first, head, last - first, a.value_dim);
    return;
  }
  if (keys.size == 0) {
    if (!task.dq_sum)
      fill_rows(T(0), a.dq, a.dtype, 0, queries.first, head, queries.size, a.head_dim);
    return;
  }
  const T scale = T(a.scale);
  const int64_t key_step = step_of(last - first, w.keys, 4);
  const int64_t query_step = step_of(queries.size, QUERIES, WIDTH<T>);
  const bool one_block = key_step >= keys.size;
  Target<T> dq;
  if (task.dq_sum)
    dq = {static_cast<T*>(task.dq_sum) + head * queries.size * w.head_ld, w.head_ld, true};
  else
    dq = target_of(a.dq, a.dtype, 0, queries.first, head, a.head_dim, w.dq, w.head_ld);
  DeadRows dead{};
  for (at.j0 = first; at.j0 < last; at.j0 += key_step) {
    at.nj = smaller(key_step, last - at.j0);
    const int64_t key = keys.first + at.j0;
    pack_rows(a.k, a.dtype, 0, key, head, at.nj, a.head_dim, w.k, w.head_ld,
              ahead_of(a.k, keys, at.nj, head, a.heads));
    pack_rows(a.v, a.dtype, 0, key, head, at.nj, a.value_dim, w.v, w.value_ld,
              ahead_of(a.v, keys, at.nj, head, a.heads));
    const Target<T> dk = target_of(a.dk, a.dtype, 0, key, head, a.head_dim, w.dk, w.head_ld);
    const Target<T> dv = target_of(a.dv, a.dtype, 0, key, head, a.value_dim, w.dv, w.value_ld);
    for (at.i0 = 0; at.i0 < queries.size; at.i0 += query_step) {
      at.ni = smaller(query_step, queries.size - at.i0);
      const int64_t row = queries.first + at.i0, nj = at.nj, lanes = whole_vectors<T>(at.ni);
      if (query_step < queries.size || at.j0 == first) {
        read_lse(a.lse, molecule, row, head, at.ni, w.minus_lse, dead);
        read_statistic(a.dlse, molecule, row, head, at.ni, w.dlse);
        dead.clear_rows(w.dlse, 1, at.ni);
        pack_rows(a.q, a.dtype, 0, row, head, at.ni, a.head_dim, w.q, w.head_ld,
                  ahead_of(a.q, queries, at.ni, head, a.heads));
        pack_rows(a.dout, a.dtype, molecule, row, head, at.ni, a.value_dim, w.dout, w.value_ld,
                  ahead_of(a.dout, queries, at.ni, head, a.heads));
        dead.clear_rows(w.q, w.head_ld, at.ni);
        dead.clear_rows(w.dout, w.value_ld, at.ni);
        transpose_rows(w.q, w.head_ld, at.ni, w.q_t);
        transpose_rows(w.dout, w.value_ld, at.ni, w.dout_t);
        if (!one_block) {
          pack_rows(a.out, a.dtype, molecule, row, head, at.ni, a.value_dim, w.out, w.value_ld);
          row_products(w.out, w.dout, w.value_ld, at.ni, w.delta);  // (B2)
        }
      }
      block_weights(a, at, one_block, w.k, w.head_ld, w.q_t, w.minus_lse, w.pairs, w.p);
      pair_products(at, w.v, w.value_ld, w.dout_t, a.value_dim, w.ds, T(1), false);  // (B1)
      dead.clear_pairs(w.p, at.ni, at.nj);
      dead.clear_pairs(w.ds, at.ni, at.nj);
      if (a.seed) keep_pairs(a, at, w.pairs);
      const auto finish = a.seed ? (one_block ? score_gradients<T, true, true>
                                              : score_gradients<T, true, false>)
                                 : (one_block ? score_gradients<T, false, true>
                                              : score_gradients<T, false, false>);
      finish(w.p, w.ds, w.pairs, nj, lanes, w.delta, w.dlse);
      const bool add = at.i0 > 0;
      sum_over_queries(at, w.p, w.dout, w.value_ld, dv.data, dv.ld, T(1), add);  // (B4)
      sum_over_queries(at, w.ds, w.q, w.head_ld, dk.data, dk.ld, scale, add);    // (B6)
      sum_over_keys(at, dead, w.ds, w.k, w.head_ld, dq.row(at.i0), dq.ld, scale,
                    task.dq_sum || at.j0 > first);  // (B5)
      if (a.dbias.data) store_pairs(a, w.ds, at, a.dbias);  // (B7)
    }
    if (!dk.direct)
      store_rows<T>(dk.data, dk.ld, nullptr, a.dk, a.dtype, 0, key, head, at.nj, a.head_dim);
    if (!dv.direct)
      store_rows<T>(dv.data, dv.ld, nullptr, a.dv, a.dtype, 0, key, head, at.nj, a.value_dim);
  }
  if (!dq.direct)
    store_rows<T>(dq.data, dq.ld, nullptr, a.dq, a.dtype, 0, queries.first, head, queries.size,
                  a.head_dim);
}

template <typename T>
void run(const AttnParams& a, const Task& task, void* buffer) {
  Arena arena(buffer);
  const Scratch<T> scratch(a, 0, arena);
  for (int64_t molecule = task.molecule; molecule < task.molecule_end; ++molecule)
    for (int64_t head = task.head; head < task.head_end; ++head)
      run_head<T>(a, task, molecule, head, scratch);
}

}  // namespace

void backward(const AttnParams& a, const Task& task, void* scratch) {
  if (a.dtype == Dtype::float64) return run<double>(a, task, scratch);
  run<float>(a, task, scratch);
}

size_t backward_scratch(const AttnParams& a, int64_t longest) {
  Arena arena(nullptr);
  if (a.dtype == Dtype::float64) Scratch<double>(a, longest, arena);
  else Scratch<float>(a, longest, arena);
  return size_t(arena.used());
}

}  // namespace ATTN_ISA
}  // namespace attnpool

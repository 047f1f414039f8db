// First derivative, (B1) to (B7), of a task: P from the saved LSE, block by block; keys outside,
// queries inside. A molecule that fits one block is read once. Nothing quadratic is stored.
//
// The rounding of an LSE is a factor of its row of P. Where it is large, with many keys or large
// logits, norms() walks all keys of a block of queries first and P is divided by its own sum.
#include "../equations.h"
#include "block.h"
#include "half_block.h"
#include "key_sums.h"
#include "passes.h"

namespace attnpool {
namespace ATTN_ISA {
namespace {

template <typename T>
struct BackwardScratch {
  T *q, *q_t, *k, *k_t, *v, *v_t, *dout, *dout_t, *out, *p, *ds, *pairs, *dq, *dk, *dv;
  T *minus_lse, *delta, *dlse, *norm;
  T* norms;  // by query of the molecule
  T *long_dq[2], *long_dk[2], *long_dv[2];
  T* key_sums[3];
  T* half;  // [keys / 2][QUERIES]
  int64_t keys, head_ld, value_ld;

  BackwardScratch(const AttnParams& a, int64_t longest, Arena& arena) {
    head_ld = whole_vectors<T>(a.head_dim);
    value_ld = whole_vectors<T>(a.value_dim);
    keys = key_block<T>(larger(head_ld, value_ld));
    q = arena.take<T>(QUERIES * head_ld);
    q_t = arena.take<T>(QUERIES * head_ld);
    k = arena.take<T>(keys * head_ld);
    k_t = arena.take<T>(KEYS * head_ld);
    v = arena.take<T>(keys * value_ld);
    v_t = arena.take<T>(KEYS * value_ld);
    dout = arena.take<T>(QUERIES * value_ld);
    dout_t = arena.take<T>(QUERIES * value_ld);
    out = arena.take<T>(QUERIES * value_ld);
    p = arena.take<T>(keys * QUERIES);
    ds = arena.take<T>(keys * QUERIES);
    pairs = arena.take<T>(a.bias.data || a.key_bias.data || a.seed ? keys * QUERIES : 0);
    dk = arena.take<T>(keys * head_ld);
    dv = arena.take<T>(keys * value_ld);
    minus_lse = arena.take<T>(QUERIES);
    delta = arena.take<T>(QUERIES);
    dlse = arena.take<T>(QUERIES);
    norm = arena.take<T>(QUERIES);
    norms = arena.take<T>(longest);
    dq = arena.take<T>(longest * head_ld);
    arena.each(KeySums<T>::elements(a, keys), key_sums[0], key_sums[1], key_sums[2]);
    half = arena.take<T>(a.dtype == Dtype::bfloat16 ? keys * QUERIES / 2 : 0);
    arena.each(keys * head_ld, long_dk[0], long_dk[1]);
    arena.each(keys * value_ld, long_dv[0], long_dv[1]);
    arena.each(long_rows<T>(a, longest, keys) * head_ld, long_dq[0], long_dq[1]);
  }
};

// From this many keys or logits of this size on, P is divided by its own sum. Below, its relative
// error from the LSE is at most 1e-6 (float).
constexpr int64_t MANY_KEYS = 2048;
constexpr int LARGE_LSE = 16;

// p to P (times R), ds from dO.v to dS, with P divided by a norm if there is one.
template <typename T, LanesAre L, bool DROPOUT, bool NORM>
void score_gradients(const Block& at, T* p, T* ds, const T* keep, const T* norm, const T* delta,
                     const T* dlse) {
  const int64_t rows = rows_of_block<T, L>(at), vectors = vectors_of<T, L>(at);
  for (int64_t r = 0; r < rows; r += ROWS<T, L>) {
    const Vector<T> delta_l = of_rows<L>(delta + r) - of_rows<L>(dlse + r);  // (B2)
    for (int64_t n = 0; n < vectors; ++n) {
      const int64_t x = vector_at<T, L>(r, n);
      Vector<T> weight = load(p + x), dp = load(ds + x);
      if (NORM) weight *= of_rows<L>(norm + r);
      if (DROPOUT) dp *= load(keep + x);
      store(ds + x, score_gradient(weight, dp, delta_l));  // (B3)
      if (DROPOUT) weight *= load(keep + x);
      if (DROPOUT || NORM) store(p + x, weight);
    }
  }
}

// The same from the logits of a block that has all keys, and the largest of each query: P is
// divided by its sum, and delta = rowsum(P dP).
template <typename T, LanesAre L, bool DROPOUT>
void own_gradients(const Block& at, T* p, T* ds, const T* keep, const T* maxima, const T* dlse) {
  const int64_t rows = rows_of_block<T, L>(at), vectors = vectors_of<T, L>(at);
  for (int64_t r = 0; r < rows; r += ROWS<T, L>) {
    const Vector<T> top = finite_top<T, L>(maxima + r);
    Vector<T> sums[2] = {};
    sum_keys<T>(vectors, sums, [&](int64_t n, Vector<T>(&few)[2]) {
      const int64_t x = vector_at<T, L>(r, n);
      const Vector<T> weight = exp2<T>(load(p + x) - top);
      Vector<T> dp = load(ds + x);
      if (DROPOUT) dp *= load(keep + x);
      few[0] += weight;
      few[1] += weight * dp;
      store(p + x, weight);
    });
    const Vector<T> total = sum_of_row<T, L>(sums[0]), weighted = sum_of_row<T, L>(sums[1]);
    const Vector<T> inverse = total == Vector<T>{} ? Vector<T>{} : T(1) / total;
    const Vector<T> delta_l = weighted * inverse - of_rows<L>(dlse + r);  // (B2)
    for (int64_t n = 0; n < vectors; ++n) {
      const int64_t x = vector_at<T, L>(r, n);
      Vector<T> weight = load(p + x) * inverse, dp = load(ds + x);
      if (DROPOUT) dp *= load(keep + x);
      store(ds + x, score_gradient(weight, dp, delta_l));  // (B3)
      if (DROPOUT) weight *= load(keep + x);
      store(p + x, weight);
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

// norms[i] = 1 / sum of P over all keys, for queries first ... last - 1 of a molecule.
template <typename T, LanesAre L>
void find_norms(const AttnParams& a, int64_t molecule, int64_t head, int64_t first, int64_t last,
                const BackwardScratch<T>& w, T* norms) {
  Block at = whole_head(a, molecule, head);
  const int64_t key_step = step_of(at.keys.size, w.keys, 4);
  const int64_t query_step = step_of(at.queries.size, QUERIES, WIDTH<T>);
  DeadRows dead{};
  for (at.i0 = first; at.i0 < last; at.i0 += query_step) {
    at.ni = smaller(query_step, last - at.i0);
    const int64_t row = at.queries.first + at.i0;
    read_lse(a.lse, molecule, row, head, at.ni, w.minus_lse, dead);
    const Side<T> q{{w.q, w.head_ld, false}, w.q_t}, k{{w.k, w.head_ld, false}, w.k_t};
    pack_rows(a.q, a.dtype, 0, row, head, at.ni, a.head_dim, w.q, w.head_ld);
    dead.clear_rows(w.q, w.head_ld, at.ni);
    turn<T, L, LanesAre::queries>(q, at.ni, a.head_dim);
    T *const sums = w.delta, *const lost = w.dlse;
    zero(sums, QUERIES);
    zero(lost, QUERIES);
    for (at.j0 = 0; at.j0 < at.keys.size; at.j0 += key_step) {
      at.nj = smaller(key_step, at.keys.size - at.j0);
      pack_rows(a.k, a.dtype, 0, at.keys.first + at.j0, head, at.nj, a.head_dim, w.k, w.head_ld);
      turn<T, L, LanesAre::keys>(k, at.nj, a.head_dim);
      block_weights<T, L>(a, at, Base::whole, k, q, w.minus_lse, w.pairs, w.p);
      dead.clear_pairs<L>(w.p, at);
      for (int64_t r = 0; r < rows_of_block<T, L>(at); r += ROWS<T, L>) {
        Vector<T> block[1] = {}, sum = of_rows<L>(sums + r), rest = of_rows<L>(lost + r);
        sum_keys<T>(vectors_of<T, L>(at), block, [&](int64_t n, Vector<T>(&few)[1]) {
          few[0] += load(w.p + vector_at<T, L>(r, n));
        });
        add_exactly<T>(sum, rest, sum_of_row<T, L>(block[0]));
        to_rows<L>(sums + r, sum);
        to_rows<L>(lost + r, rest);
      }
    }
    for (int64_t i = 0; i < at.ni; ++i) {
      const T sum = sums[i] + lost[i];
      norms[at.i0 + i] = sum == 0 ? T(0) : T(1) / sum;
    }
  }
}

// The norms of a molecule that needs them: those found before, or in the scratch; else null.
template <typename T, LanesAre L>
const T* norms_of(const AttnParams& a, const Task& task, int64_t molecule, int64_t head,
                  const BackwardScratch<T>& w) {
  const Span queries = query_span(a, molecule);
  if (task.statistics) return static_cast<T*>(task.statistics) + head * queries.size;
  bool needed = key_span(a, molecule).size > MANY_KEYS;
  for (int64_t i = 0; i < queries.size && !needed; ++i) {
    const T lse = *address<T>(a.lse, molecule, queries.first + i, head);
    needed = lse > LARGE_LSE || (lse < -LARGE_LSE && lse != -T(__builtin_inf()));
  }
  if (!needed) return nullptr;
  find_norms<T, L>(a, molecule, head, 0, queries.size, w, w.norms);
  return w.norms;
}

template <typename T, LanesAre L>
void run_head(const AttnParams& a, const Task& task, Block at, const BackwardScratch<T>& w,
              LongSum<T>& dq_sum, Ahead& ahead) {
  const int64_t molecule = at.molecule, head = at.head;
  const Span queries = at.queries, keys = at.keys;
  const int64_t first = smaller(task.first, keys.size), last = smaller(task.last, keys.size);
  if (queries.size == 0) {
    fill_rows(T(0), a.dk, a.dtype, 0, keys.first + first, head, last - first, a.head_dim);
    fill_rows(T(0), a.dv, a.dtype, 0, keys.first + first, head, last - first, a.value_dim);
    at.j0 = first, at.nj = last - first;
    KeySums<T>{}.finish(a, at, a.dkey_bias);
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
  const bool one_block = key_step >= keys.size, one_query_block = query_step >= queries.size;
  const bool once = one_block && one_query_block;
  const bool large_keys = one_query_block && is_large(a.dk, a.key_rows);  // written once
  const auto place = once ? place_of<T, true> : place_of<T, false>;
  Place<T> dq;
  if (task.dq_sum)
    dq = {static_cast<T*>(task.dq_sum) + head * queries.size * w.head_ld, w.head_ld, true};
  else
    dq = place(a.dq, a.dtype, 0, queries.first, head, a.head_dim, w.dq);
  const T* const norms = one_block ? nullptr : norms_of<T, L>(a, task, molecule, head, w);
  const Base base = norms ? Base::whole : Base::lse;
  const auto finish_own = a.seed ? own_gradients<T, L, true> : own_gradients<T, L, false>;
  const auto finish = a.seed ? (norms ? score_gradients<T, L, true, true>
                                      : score_gradients<T, L, true, false>)
                             : (norms ? score_gradients<T, L, false, true>
                                      : score_gradients<T, L, false, false>);
  const auto ahead_by = [&](const View& x, const Span& rows, int64_t count) {
    return once ? 0 : ahead_of(x, rows, count, head, a.heads);
  };
  Side<T> q{{}, w.q_t}, dout{{}, w.dout_t};
  DeadRows dead{};
  KeySums<T> ds_sum{};
  if (a.dkey_bias.data) ds_sum = {w.key_sums[0], w.key_sums[1], w.key_sums[2]};
  for (at.j0 = first; at.j0 < last; at.j0 += key_step) {
    at.nj = smaller(key_step, last - at.j0);
    const int64_t key = keys.first + at.j0;
    const bool add_dq = dq_sum.next(dq, queries.size, w.head_ld);
    LongSum<T> dk_sum{w.long_dk[0], w.long_dk[1]}, dv_sum{w.long_dv[0], w.long_dv[1]};
    const Side<T> k{rows_of(a.k, a.dtype, 0, key, head, at.nj, a.head_dim, w.k, one_query_block,
                            ahead_by(a.k, keys, at.nj)),
                    w.k_t};
    const Side<T> v{rows_of(a.v, a.dtype, 0, key, head, at.nj, a.value_dim, w.v, one_query_block,
                            ahead_by(a.v, keys, at.nj)),
                    w.v_t};
    turn<T, L, LanesAre::keys>(k, at.nj, a.head_dim, &ahead);
    turn<T, L, LanesAre::keys>(v, at.nj, a.value_dim, &ahead);
    const Place<T> dk = place(a.dk, a.dtype, 0, key, head, a.head_dim, w.dk);
    const Place<T> dv = place(a.dv, a.dtype, 0, key, head, a.value_dim, w.dv);
    for (at.i0 = 0; at.i0 < queries.size; at.i0 += query_step) {
      at.ni = smaller(query_step, queries.size - at.i0);
      const int64_t row = queries.first + at.i0, nj = at.nj, lanes = whole_vectors<T>(at.ni);
      if (query_step < queries.size || at.j0 == first) {
        read_lse(a.lse, molecule, row, head, at.ni, w.minus_lse, dead);
        read_statistic(a.dlse, molecule, row, head, at.ni, w.dlse);
        dead.clear_rows(w.dlse, 1, at.ni);
        for (int64_t i = 0; norms && i < lanes; ++i)
          w.norm[i] = i < at.ni ? norms[at.i0 + i] : T(0);
        const bool in_place = one_block && !dead.any;
        q.rows = rows_of(a.q, a.dtype, 0, row, head, at.ni, a.head_dim, w.q, in_place,
                         ahead_by(a.q, queries, at.ni));
        dout.rows = rows_of(a.dout, a.dtype, molecule, row, head, at.ni, a.value_dim, w.dout,
                            in_place, ahead_by(a.dout, queries, at.ni));
        dead.clear_rows(w.q, w.head_ld, at.ni);
        dead.clear_rows(w.dout, w.value_ld, at.ni);
        turn<T, L, LanesAre::queries>(q, at.ni, a.head_dim);
        turn<T, L, LanesAre::queries>(dout, at.ni, a.value_dim);
        if (!one_block) {
          pack_rows(a.out, a.dtype, molecule, row, head, at.ni, a.value_dim, w.out, w.value_ld);
          row_products(w.out, w.dout, w.value_ld, at.ni, w.delta);  // (B2)
        }
      }
      if (one_block) block_logits<T, L>(a, at, k, q, w.pairs, w.p, w.norm, ahead);
      else block_weights<T, L>(a, at, base, k, q, w.minus_lse, w.pairs, w.p);
      pair_products<T, L>(at, {v, dout}, a.value_dim, w.ds, T(1), false, &ahead);  // (B1)
      dead.clear_pairs<L>(w.p, at, one_block ? -T(__builtin_inf()) : T(0));
      dead.clear_pairs<L>(w.ds, at);
      if (a.seed) keep_pairs<T, L>(a, at, w.pairs);
      if (one_block) finish_own(at, w.p, w.ds, w.pairs, w.norm, w.dlse);
      else finish(at, w.p, w.ds, w.pairs, w.norm, w.delta, w.dlse);
      const bool add_dv = dv_sum.next(dv, nj, w.value_ld), add_dk = dk_sum.next(dk, nj, w.head_ld);
      sum_over_queries<T, L>(at, {w.p, dout.rows}, a.value_dim, dv, T(1), add_dv, &ahead,
                             large_keys);  // (B4)
      sum_over_queries<T, L>(at, {w.ds, q.rows}, a.head_dim, dk, scale, add_dk, &ahead,
                             large_keys);  // (B6)
      sum_over_keys<T, L>(at, dead, {w.ds, k.rows}, a.head_dim, dq, scale, add_dq, &ahead,
                          once && large_keys);                    // (B5)
      if (a.dbias.data) store_pairs<T, L>(a, w.ds, at, a.dbias);  // (B7)
      ds_sum.template add<L>(at, w.ds);                           // (B8)
    }
    ds_sum.finish(a, at, a.dkey_bias);
    dk_sum.finish(dk, at.nj, w.head_ld);
    dv_sum.finish(dv, at.nj, w.value_ld);
    if (!dk.direct)
      store_rows<T>(dk.data, dk.ld, nullptr, a.dk, a.dtype, 0, key, head, at.nj, a.head_dim);
    if (!dv.direct)
      store_rows<T>(dv.data, dv.ld, nullptr, a.dv, a.dtype, 0, key, head, at.nj, a.value_dim);
  }
  if (!a.shared_seeds) dq_sum.finish(dq, queries.size, w.head_ld);
  if (!dq.direct)
    store_rows<T>(dq.data, dq.ld, nullptr, a.dq, a.dtype, 0, queries.first, head, queries.size,
                  a.head_dim);
}

#if defined(__AVX512F__)
// The same in pairs of bfloat16, of a molecule that is one block. False: this cannot serve it.
bool run_half_head(const AttnParams& a, const Task& task, Block at,
                   const BackwardScratch<float>& w, Ahead& ahead) {
  constexpr LanesAre L = LanesAre::queries;
  const int64_t molecule = at.molecule, head = at.head;
  const int64_t row = at.queries.first, key = at.keys.first;
  const int64_t ni = at.ni = at.queries.size, nj = at.nj = at.keys.size;
  if (task.dq_sum || ni == 0 || ni > QUERIES || nj == 0 || nj > w.keys || !multiplies_pairs(a) ||
      !are_pairs(a.v, a.value_dim) || !are_pairs(a.dout, a.value_dim))
    return false;
  DeadRows dead{};
  read_lse(a.lse, molecule, row, head, ni, w.minus_lse, dead);
  if (dead.any) return false;
  read_statistic(a.dlse, molecule, row, head, ni, w.dlse);
  const Place<float> q = pairs_of(a.q, 0, row, head), k = pairs_of(a.k, 0, key, head);
  const Place<float> v = pairs_of(a.v, 0, key, head), dout = pairs_of(a.dout, molecule, row, head);
  const int head_pairs = int(a.head_dim / 2), value_pairs = int(a.value_dim / 2);
  const int lanes = int(whole_vectors<float>(ni));
  transpose_rows<float, QUERIES>(q.data, q.ld, ni, head_pairs, w.q_t);
  transpose_rows<float, QUERIES>(dout.data, dout.ld, ni, value_pairs, w.dout_t);
  forget_maxima(at, w.norm);
  pair_product_rows({k.data, k.ld, w.q_t, QUERIES, w.p, QUERIES, int(nj), lanes, head_pairs,
                     float(a.scale * LOG2_E), nullptr, false, &ahead, false, w.norm});
  with_biases<float, L>(a, at, w.pairs, w.p, w.norm);
  pair_product_rows({v.data, v.ld, w.dout_t, QUERIES, w.ds, QUERIES, int(nj), lanes, value_pairs,
                     1.f, nullptr, false, &ahead});  // (B1)
  if (a.seed) keep_pairs<float, L>(a, at, w.pairs);
  const auto finish = a.seed ? own_gradients<float, L, true> : own_gradients<float, L, false>;
  finish(at, w.p, w.ds, w.pairs, w.norm, w.dlse);
  if (a.dbias.data) store_pairs<float, L>(a, w.ds, at, a.dbias);  // (B7)
  if (a.dkey_bias.data) {                                         // (B8)
    KeySums<float> ds_sum{w.key_sums[0], w.key_sums[1], w.key_sums[2]};
    ds_sum.add<L>(at, w.ds);
    ds_sum.finish(a, at, a.dkey_bias);
  }
  const auto product = [&](auto multiply, const float* x, const float* y, int64_t rows,
                           int64_t width, int64_t depth, float factor, float* sums,
                           const View& to, int64_t first) {
    multiply({x, QUERIES, y, width, sums, width, int(rows), int(width), int((depth + 1) / 2),
              factor, nullptr, false, &ahead});
    store_rows<float>(sums, width, nullptr, to, a.dtype, 0, first, head, rows, width);
  };
  const float scale = float(a.scale);
  pair_up_rows(a.k, 0, key, head, nj, a.head_dim, w.k);
  pair_up_rows(a.q, 0, row, head, ni, a.head_dim, w.q);
  pair_up_rows(a.dout, molecule, row, head, ni, a.value_dim, w.dout);
  pair_up_keys(at, w.ds, w.half);
  pair_up_queries(at, w.p);
  pair_up_queries(at, w.ds);
  product(pair_product_rows, w.p, w.dout, nj, a.value_dim, ni, 1.f, w.dv, a.dv, key);      // (B4)
  product(pair_product_rows, w.ds, w.q, nj, a.head_dim, ni, scale, w.dk, a.dk, key);       // (B6)
  product(pair_product_columns, w.half, w.k, ni, a.head_dim, nj, scale, w.dq, a.dq, row);  // (B5)
  return true;
}
#endif

template <typename T>
void ask_for_rows(Ahead& ahead, const AttnParams& a, const Task& task, int64_t molecule,
                  int64_t head, int64_t most_keys) {
  const int64_t ni = query_span(a, molecule).size, nj = key_span(a, molecule).size;
  if (ni > QUERIES || nj > most_keys) return ahead.clear();  // pack_rows() asks for its blocks
  const bool few = few_queries<T>({0, ni}, {0, nj});
  const int64_t tiles = 2 * tiles_of<T>(nj, ni) + tiles_of<T>(nj, a.head_dim + a.value_dim) +
                        tiles_of<T>(ni, a.head_dim) +
                        (few ? squares_of<T>(nj, a.head_dim + a.value_dim) : 0);
  ask_ahead(ahead, a, task, molecule, head, tiles,
            {{a.q, a.head_dim}, {a.dout, a.value_dim}},
            {{a.k, a.head_dim}, {a.v, a.value_dim}});
}

template <typename T>
void run(const AttnParams& a, const Task& task, void* buffer) {
  Arena arena(buffer);
  const BackwardScratch<T> scratch(a, longest_of(a, task), arena);
  Ahead ahead;
  const auto run_it = [&](const Task& part, int64_t molecule, int64_t head, LongSum<T>& dq_sum) {
    const Block at = whole_head(a, molecule, head);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      if (!few_queries<T>(at.queries, at.keys) && run_half_head(a, part, at, scratch, ahead))
        return;
#endif
    const auto run_head_by = few_queries<T>(at.queries, at.keys) ? run_head<T, LanesAre::keys>
                                                                 : run_head<T, LanesAre::queries>;
    run_head_by(a, part, at, scratch, dq_sum, ahead);
  };
  if (task.part_of_keys() && query_span(a, task.molecule).size <= QUERIES)
    for_each_piece<T>(task, scratch.keys, scratch.long_dq,
                      [&](const Task& piece, int64_t head, LongSum<T>& dq_sum) {
                        const int64_t count = piece.last - piece.first;
                        ask_for_share(ahead, a, head,
                                      after(key_span(a, task.molecule), piece.first, count),
                                      squares_of<T>(count, a.head_dim + a.value_dim), {a.k, a.v});
                        run_it(piece, task.molecule, head, dq_sum);
                      });
  else
    for_each_head<T>(a, task, scratch.long_dq, scratch.head_ld,
                     [&](int64_t molecule, int64_t head, LongSum<T>& dq_sum) {
                       ask_for_rows<T>(ahead, a, task, molecule, head, scratch.keys);
                       run_it(task, molecule, head, dq_sum);
                     });
  publish_streams();
}

template <typename T>
void run_norms(const AttnParams& a, const Task& task, void* buffer) {
  Arena arena(buffer);
  const BackwardScratch<T> scratch(a, longest_of(a, task), arena);
  const Span queries = query_span(a, task.molecule), keys = key_span(a, task.molecule);
  const auto find = few_queries<T>(queries, keys) ? find_norms<T, LanesAre::keys>
                                                  : find_norms<T, LanesAre::queries>;
  for (int64_t head = task.head; head < task.head_end; ++head)
    find(a, task.molecule, head, task.first, task.last, scratch,
         static_cast<T*>(task.statistics) + head * queries.size);
}

}  // namespace

void backward(const AttnParams& a, const Task& task, void* scratch) {
  if (a.dtype == Dtype::float64) return run<double>(a, task, scratch);
  run<float>(a, task, scratch);
}

void norms(const AttnParams& a, const Task& task, void* scratch) {
  if (a.dtype == Dtype::float64) return run_norms<double>(a, task, scratch);
  run_norms<float>(a, task, scratch);
}

size_t backward_scratch(const AttnParams& a, int64_t longest) {
  Arena arena(nullptr);
  if (a.dtype == Dtype::float64) BackwardScratch<double>(a, longest, arena);
  else BackwardScratch<float>(a, longest, arena);
  return size_t(arena.used());
}

}  // namespace ATTN_ISA
}  // namespace attnpool

// Second derivative, (D1) to (D12), of a task. A molecule whose keys fit one block is read once:
// its row statistics come from the block. Otherwise statistics() walks all keys of a block of
// queries first, and the blocks are recomputed with keys outside and queries inside, as in
// backward.cpp.
#include "../equations.h"
#include "block.h"
#include "key_sums.h"
#include "passes.h"

namespace attnpool {
namespace ATTN_ISA {
namespace {

template <typename T>
struct DoubleBackwardScratch {
  T *q, *q_t, *k, *v, *dout, *dout_t;             // Q, K, V, dO
  T *ddq, *ddq_t, *ddk, *ddv;                     // A, B, C
  T *p, *tangent, *dp, *g, *pairs;                // P, T, dP, G of the block
  T *gk, *gv;
  T *minus_lse, *dlse, *delta_l, *t, *y, *w, *inverse;
  T* linear;  // by query of the molecule: statistics [4, n_q], gq, gdout
  T *long_gq[2], *long_gdout[2], *long_gk[2], *long_gv[2];
  T* key_sums[3];
  int64_t keys, head_ld, value_ld;

  DoubleBackwardScratch(const AttnParams& a, int64_t longest, Arena& arena) {
    head_ld = whole_vectors<T>(a.head_dim);
    value_ld = whole_vectors<T>(a.value_dim);
    keys = key_block<T>(larger(head_ld, value_ld));
    arena.each(QUERIES * head_ld, q, q_t, ddq, ddq_t);
    arena.each(QUERIES * value_ld, dout, dout_t);
    arena.each(keys * head_ld, k, ddk, gk);
    arena.each(keys * value_ld, v, ddv, gv);
    arena.each(keys * QUERIES, p, tangent, dp, g);
    pairs = arena.take<T>(a.bias.data || a.key_bias.data || a.seed ? keys * QUERIES : 0);
    arena.each(QUERIES, minus_lse, dlse, delta_l, t, y, w, inverse);
    linear = arena.take<T>(whole_vectors<T>(longest) * (4 + head_ld + value_ld));
    arena.each(KeySums<T>::elements(a, keys), key_sums[0], key_sums[1], key_sums[2]);
    arena.each(keys * head_ld, long_gk[0], long_gk[1]);
    arena.each(keys * value_ld, long_gv[0], long_gv[1]);
    arena.each(long_rows<T>(a, longest, keys) * head_ld, long_gq[0], long_gq[1]);
    arena.each(a.key_rows > TOGETHER * keys ? longest * value_ld : 0, long_gdout[0],
               long_gdout[1]);
  }
};

// Row sums of one block of queries over the keys seen so far. P is divided by its own sum in the
// end: the rounding of a large LSE would spoil the cancellations in (D5) and (D6).
template <typename T>
struct RowSums {
  enum { TOTAL, DELTA, T_, S1, W, COUNT };
  alignas(64) T sum[COUNT][QUERIES], lost[COUNT][QUERIES];

  Vector<T> of(int which, int64_t x) const {
    return whole_sum<T>(load(sum[which] + x), load(lost[which] + x));
  }
};

template <typename T>
class Head {
 public:
  Head(const AttnParams& a, const Task& task, int64_t molecule, int64_t head,
       const DoubleBackwardScratch<T>& w, Ahead& ahead)
      : a_(a), task_(task), w_(w), ahead_(ahead), scale_(T(a.scale)),
        at_{molecule, head, query_span(a, molecule), key_span(a, molecule), 0, 0, 0, 0} {
    query_step_ = step_of(at_.queries.size, QUERIES, WIDTH<T>);
    rows_ = task.statistics ? static_cast<T*>(task.statistics) + head * 4 * at_.queries.size
                            : w.linear;
  }

  // Row statistics of queries first ... last - 1 to rows_, (D2) to (D4) and (D12).
  void statistics(int64_t first, int64_t last) {
    const int64_t step = step_of(at_.keys.size, w_.keys, 4), n = at_.queries.size;
    for (at_.i0 = first; at_.i0 < last; at_.i0 += query_step_) {
      at_.ni = smaller(query_step_, last - at_.i0);
      load_queries();
      RowSums<T> sums;
      for (at_.j0 = 0; at_.j0 < at_.keys.size; at_.j0 += step) {
        at_.nj = smaller(step, at_.keys.size - at_.j0);
        load_keys();
        products();
        add_sums<false>(sums, at_.j0 == 0);
      }
      finish(sums);
      for (int64_t i = 0; i < at_.ni; ++i) {
        rows_[at_.i0 + i] = w_.delta_l[i];
        rows_[n + at_.i0 + i] = w_.t[i];
        rows_[2 * n + at_.i0 + i] = w_.y[i];
        rows_[3 * n + at_.i0 + i] = w_.inverse[i];
      }
    }
  }

  void run(LongSum<T>& gq_sum) {
    const Span queries = at_.queries, keys = at_.keys;
    const int64_t first = smaller(task_.first, keys.size), last = smaller(task_.last, keys.size);
    if (queries.size == 0) {
      fill_rows(T(0), a_.gk, a_.dtype, 0, keys.first + first, at_.head, last - first, a_.head_dim);
      fill_rows(T(0), a_.gv, a_.dtype, 0, keys.first + first, at_.head, last - first, a_.value_dim);
      at_.j0 = first, at_.nj = last - first;
      KeySums<T>{}.finish(a_, at_, a_.gkey_bias);
      return;
    }
    if (keys.size == 0) return no_keys();
    const int64_t key_step = step_of(last - first, w_.keys, 4);
    const bool one_block = all_keys_ = key_step >= keys.size;
    once_ = query_step_ >= queries.size;
    const auto place = one_block && once_ ? place_of<T, true> : place_of<T, false>;
    if (!one_block && !task_.statistics) statistics(0, queries.size);
    T* const gq_buffer = w_.linear + 4 * whole_vectors<T>(queries.size);
    T* const gdout_buffer = gq_buffer + queries.size * w_.head_ld;
    const Place<T> gq = sum_of(place, task_.dq_sum, a_.gq, 0, a_.head_dim, gq_buffer);
    const Place<T> gdout =
        sum_of(place, task_.gdout_sum, a_.gdout, at_.molecule, a_.value_dim, gdout_buffer);
    LongSum<T> gdout_sum{w_.long_gdout[0], w_.long_gdout[1]};
    KeySums<T> z_sum{};
    if (a_.gkey_bias.data) z_sum = {w_.key_sums[0], w_.key_sums[1], w_.key_sums[2]};
    for (at_.j0 = first; at_.j0 < last; at_.j0 += key_step) {
      at_.nj = smaller(key_step, last - at_.j0);
      const bool add_gq = gq_sum.next(gq, queries.size, w_.head_ld);
      const bool add_gdout = gdout_sum.next(gdout, queries.size, w_.value_ld);
      LongSum<T> gk_sum{w_.long_gk[0], w_.long_gk[1]}, gv_sum{w_.long_gv[0], w_.long_gv[1]};
      const int64_t key = keys.first + at_.j0;
      load_keys();
      const Place<T> gk =
          place(a_.gk, a_.dtype, 0, key, at_.head, a_.head_dim, w_.gk);
      const Place<T> gv =
          place(a_.gv, a_.dtype, 0, key, at_.head, a_.value_dim, w_.gv);
      for (at_.i0 = 0; at_.i0 < queries.size; at_.i0 += query_step_) {
        at_.ni = smaller(query_step_, queries.size - at_.i0);
        if (query_step_ < queries.size || at_.j0 == first) load_queries();
        products();
        if (one_block) {
          RowSums<T> sums;
          add_sums<true>(sums, true);
          finish(sums);
          centre();
        } else {
          read_rows();
        }
        elementwise();
        accumulate(gq, add_gq, gdout, add_gdout, gk, gk_sum.next(gk, at_.nj, w_.head_ld), gv,
                   gv_sum.next(gv, at_.nj, w_.value_ld));
        z_sum.add(at_, w_.g);  // (D13)
      }
      z_sum.finish(a_, at_, a_.gkey_bias);
      gk_sum.finish(gk, at_.nj, w_.head_ld);
      gv_sum.finish(gv, at_.nj, w_.value_ld);
      if (!gk.direct)
        store_rows<T>(gk.data, gk.ld, nullptr, a_.gk, a_.dtype, 0, key, at_.head, at_.nj,
                      a_.head_dim);
      if (!gv.direct)
        store_rows<T>(gv.data, gv.ld, nullptr, a_.gv, a_.dtype, 0, key, at_.head, at_.nj,
                      a_.value_dim);
    }
    if (!a_.shared_seeds) gq_sum.finish(gq, queries.size, w_.head_ld);
    gdout_sum.finish(gdout, queries.size, w_.value_ld);
    if (!gq.direct)
      store_rows<T>(gq.data, gq.ld, nullptr, a_.gq, a_.dtype, 0, queries.first, at_.head,
                    queries.size, a_.head_dim);
    if (!gdout.direct)
      store_rows<T>(gdout.data, gdout.ld, nullptr, a_.gdout, a_.dtype, at_.molecule, queries.first,
                    at_.head, queries.size, a_.value_dim);
  }

 private:
  void no_keys() {
    const int64_t row = at_.queries.first, count = at_.queries.size;
    if (!task_.dq_sum) fill_rows(T(0), a_.gq, a_.dtype, 0, row, at_.head, count, a_.head_dim);
    fill_rows(T(0), a_.gdout, a_.dtype, at_.molecule, row, at_.head, count, a_.value_dim);
    for (int64_t i = 0; i < count; ++i) *address<T>(a_.gdlse, at_.molecule, row + i, at_.head) = 0;
  }

  template <typename F>
  Place<T> sum_of(F place, void* sum, const View& x, int64_t molecule, int64_t width,
                  T* buffer) const {
    const int64_t ld = whole_vectors<T>(width);
    if (sum) return {static_cast<T*>(sum) + at_.head * at_.queries.size * ld, ld, true};
    return place(x, a_.dtype, molecule, at_.queries.first, at_.head, width, buffer);
  }

  // What pack_rows() asks for; a molecule of one block leaves that to ahead_.
  int64_t ahead_by(const View& x, const Span& rows, int64_t count) const {
    return once_ && all_keys_ ? 0 : ahead_of(x, rows, count, at_.head, a_.heads);
  }

  // All rows are packed, because several products read each of them again.
  void load_keys() {
    const int64_t key = at_.keys.first + at_.j0;
    const auto read = [&](const View& x, int64_t width, T* buffer) {
      if (!x.data) return Place<T>{};
      const Place<T> rows{buffer, whole_vectors<T>(width), false};
      pack_rows(x, a_.dtype, 0, key, at_.head, at_.nj, width, buffer, rows.ld,
                ahead_by(x, at_.keys, at_.nj));
      return rows;
    };
    k_ = read(a_.k, a_.head_dim, w_.k);
    v_ = read(a_.v, a_.value_dim, w_.v);
    ddk_ = read(a_.ddk, a_.head_dim, w_.ddk);
    ddv_ = read(a_.ddv, a_.value_dim, w_.ddv);
  }

  void load_queries() {
    const int64_t row = at_.queries.first + at_.i0;
    read_lse(a_.lse, at_.molecule, row, at_.head, at_.ni, w_.minus_lse, dead_);
    read_statistic(a_.dlse, at_.molecule, row, at_.head, at_.ni, w_.dlse);
    dead_.clear_rows(w_.dlse, 1, at_.ni);
    const auto read = [&](const View& x, int64_t molecule, int64_t width, T* buffer, T* turned) {
      if (!x.data) return Place<T>{};
      const Place<T> rows{buffer, whole_vectors<T>(width), false};
      pack_rows(x, a_.dtype, molecule, row, at_.head, at_.ni, width, buffer, rows.ld,
                ahead_by(x, at_.queries, at_.ni));
      dead_.clear_rows(buffer, rows.ld, at_.ni);
      transpose_rows(rows.data, rows.ld, at_.ni, columns_of<T>(width), turned);
      return rows;
    };
    q_ = read(a_.q, 0, a_.head_dim, w_.q, w_.q_t);
    dout_ = read(a_.dout, at_.molecule, a_.value_dim, w_.dout, w_.dout_t);
    ddq_ = read(a_.ddq, 0, a_.head_dim, w_.ddq, w_.ddq_t);
  }

  int64_t lanes() const { return whole_vectors<T>(at_.ni); }

  void scores(const Place<T>& x, const T* y_t, int64_t width, T* to, T factor, bool add) {
    pair_products(at_, x, y_t, width, to, factor, add, &ahead_);
  }

  // P (before it is divided by its sum; its logits, if the block has all keys), T, dP and G of the
  // block, (D1), (B1), (D3).
  void products() {
    const int64_t nj = at_.nj, count = nj * QUERIES;
    if (all_keys_) block_logits(a_, at_, k_, w_.q_t, w_.pairs, w_.p, w_.minus_lse, ahead_);
    else block_weights(a_, at_, Base::whole, k_, w_.q_t, w_.minus_lse, w_.pairs, w_.p);
    bool add = a_.ddbias.data != nullptr;
    if (add) pack_pairs(a_, a_.ddbias, at_, w_.tangent);
    if (a_.ddkey_bias.data) {
      for_keys(a_, a_.ddkey_bias, at_, [&](int64_t j, auto* key) {
        const Vector<T> more = splat(T(widened(*key)));
        for (int64_t x = j * QUERIES; x < j * QUERIES + lanes(); x += WIDTH<T>)
          store(w_.tangent + x, add ? load(w_.tangent + x) + more : more);
      });
      add = true;
    }
    if (a_.ddq.data) {
      scores(k_, w_.ddq_t, a_.head_dim, w_.tangent, scale_, add);
      add = true;
    }
    if (a_.ddk.data) {
      scores(ddk_, w_.q_t, a_.head_dim, w_.tangent, scale_, add);
      add = true;
    }
    if (!add) zero(w_.tangent, count);
    scores(v_, w_.dout_t, a_.value_dim, w_.dp, T(1), false);
    if (a_.ddv.data) scores(ddv_, w_.dout_t, a_.value_dim, w_.g, T(1), false);
    else zero(w_.g, count);
    if (a_.seed) {
      keep_pairs(a_, at_, w_.pairs);
      for (int64_t j = 0; j < nj; ++j)
        for (int64_t x = j * QUERIES; x < j * QUERIES + lanes(); x += WIDTH<T>) {
          const Vector<T> kept = load(w_.pairs + x);
          store(w_.dp + x, load(w_.dp + x) * kept);
          store(w_.g + x, load(w_.g + x) * kept);
        }
    }
    if (!dead_.any) return;
    dead_.clear_pairs(w_.p, at_.ni, nj, all_keys_ ? -T(__builtin_inf()) : T(0));
    dead_.clear_pairs(w_.tangent, at_.ni, nj);
    dead_.clear_pairs(w_.dp, at_.ni, nj);
    dead_.clear_pairs(w_.g, at_.ni, nj);
  }

  // FROM_LOGITS: P is made on the way, from the logits of a block that has all keys.
  template <bool FROM_LOGITS>
  void add_sums(RowSums<T>& sums, bool first) {
    for (int64_t x = 0; x < lanes(); x += WIDTH<T>) {
      Vector<T> block[RowSums<T>::COUNT] = {};
      const Vector<T> top = FROM_LOGITS ? finite_top(w_.minus_lse + x) : Vector<T>{};
      sum_keys<T>(at_.nj, block, [&](int64_t j, Vector<T>(&few)[RowSums<T>::COUNT]) {
        const int64_t at = j * QUERIES + x;
        Vector<T> p = load(w_.p + at);
        if (FROM_LOGITS) store(w_.p + at, p = exp2<T>(p - top));
        const Vector<T> dp = load(w_.dp + at);
        const Vector<T> weighted = p * load(w_.tangent + at);
        few[sums.TOTAL] += p;
        few[sums.DELTA] += p * dp;
        few[sums.T_] += weighted;
        few[sums.S1] += weighted * dp;
        few[sums.W] += p * load(w_.g + at);
      });
#pragma GCC unroll 5
      for (int i = 0; i < RowSums<T>::COUNT; ++i) {
        Vector<T> sum = block[i], lost{};
        if (!first) {
          sum = load(sums.sum[i] + x), lost = load(sums.lost[i] + x);
          add_exactly<T>(sum, lost, block[i]);
        }
        store(sums.sum[i] + x, sum);
        store(sums.lost[i] + x, lost);
      }
    }
  }

  void finish(const RowSums<T>& sums) {
    for (int64_t x = 0; x < lanes(); x += WIDTH<T>) {
      const Vector<T> total = sums.of(sums.TOTAL, x);
      const Vector<T> inverse = total == Vector<T>{} ? Vector<T>{} : T(1) / total;
      const Vector<T> delta = sums.of(sums.DELTA, x) * inverse, t = sums.of(sums.T_, x) * inverse;
      const Vector<T> s1 = sums.of(sums.S1, x) * inverse, w = sums.of(sums.W, x) * inverse;
      const Vector<T> delta_l = delta - load(w_.dlse + x);  // (B2)
      store(w_.delta_l + x, delta_l);
      store(w_.t + x, t);
      store(w_.y + x, s1 - delta * t + w);
      store(w_.w + x, w);
      store(w_.inverse + x, inverse);
    }
    write_statistic(w_.t, a_.gdlse, at_.molecule, at_.queries.first + at_.i0, at_.head,
                    at_.ni);  // (D12)
  }

  // The same y from centred terms, which do not cancel: needs t and delta of all keys first.
  void centre() {
    for (int64_t x = 0; x < lanes(); x += WIDTH<T>) {
      const Vector<T> t = load(w_.t + x), delta = load(w_.delta_l + x) + load(w_.dlse + x);
      Vector<T> sum[1] = {};
      sum_keys<T>(at_.nj, sum, [&](int64_t j, Vector<T>(&few)[1]) {
        const int64_t at = j * QUERIES + x;
        few[0] += load(w_.p + at) * (load(w_.tangent + at) - t) * (load(w_.dp + at) - delta);
      });
      store(w_.y + x, sum[0] * load(w_.inverse + x) + load(w_.w + x));
    }
  }

  void read_rows() {
    const int64_t n = at_.queries.size;
    for (int64_t i = 0; i < lanes(); ++i) {
      const bool there = i < at_.ni;
      w_.delta_l[i] = there ? rows_[at_.i0 + i] : T(0);
      w_.t[i] = there ? rows_[n + at_.i0 + i] : T(0);
      w_.y[i] = there ? rows_[2 * n + at_.i0 + i] : T(0);
      w_.inverse[i] = there ? rows_[3 * n + at_.i0 + i] : T(0);
    }
  }

  // P, T, dP, G become P R, U R, dS, Z: (B3), (D5), (D6).
  void elementwise() {
    for (int64_t x = 0; x < lanes(); x += WIDTH<T>) {
      const Vector<T> delta_l = load(w_.delta_l + x), t = load(w_.t + x), y = load(w_.y + x);
      const Vector<T> inverse = load(w_.inverse + x);
      for (int64_t j = 0; j < at_.nj; ++j) {
        const int64_t at = j * QUERIES + x;
        Vector<T> p = load(w_.p + at) * inverse;
        const Vector<T> tangent = load(w_.tangent + at), dp = load(w_.dp + at);
        Vector<T> u = weight_cotangent(p, tangent, t);
        store(w_.dp + at, score_gradient(p, dp, delta_l));
        store(w_.g + at, centred_second_gradient(p, tangent - t, dp, delta_l,
                                                 Vector<T>(load(w_.g + at)), y));
        if (a_.seed) {
          const Vector<T> kept = load(w_.pairs + at);
          u *= kept;
          p *= kept;
        }
        store(w_.tangent + at, u);
        store(w_.p + at, p);
      }
    }
  }

  void by_queries(const T* x, const Place<T>& y, int64_t width, const Place<T>& to, T factor,
                  bool add) {
    sum_over_keys(at_, dead_, x, y, width, to, factor, add, &ahead_);
  }
  void by_keys(const T* x, const Place<T>& y, int64_t width, const Place<T>& to, T factor,
               bool add) {
    sum_over_queries(at_, x, y, width, to, factor, add, &ahead_);
  }

  // add_...: whether this is added to the target, which else begins here.
  void accumulate(const Place<T>& gq, bool add_gq, const Place<T>& gdout, bool add_gdout,
                  const Place<T>& gk, bool add_gk, const Place<T>& gv, bool add_gv) {
    const T *pr = w_.p, *ur = w_.tangent, *ds = w_.dp, *z = w_.g;
    by_queries(z, k_, a_.head_dim, gq, scale_, add_gq);  // (D7)
    if (a_.ddk.data) by_queries(ds, ddk_, a_.head_dim, gq, scale_, true);
    by_keys(z, q_, a_.head_dim, gk, scale_, add_gk);  // (D8)
    if (a_.ddq.data) by_keys(ds, ddq_, a_.head_dim, gk, scale_, true);
    by_keys(ur, dout_, a_.value_dim, gv, T(1), add_gv);           // (D9)
    by_queries(ur, v_, a_.value_dim, gdout, T(1), add_gdout);  // (D11)
    if (a_.ddv.data) by_queries(pr, ddv_, a_.value_dim, gdout, T(1), true);
    if (a_.gbias.data) store_pairs(a_, z, at_, a_.gbias);  // (D10)
  }

  const AttnParams& a_;
  const Task& task_;
  const DoubleBackwardScratch<T>& w_;
  Ahead& ahead_;
  const T scale_;
  Block at_;
  int64_t query_step_;
  T* rows_;
  bool all_keys_ = false, once_ = false;  // whether one block has all keys, all queries
  Place<T> q_{}, dout_{}, ddq_{}, k_{}, v_{}, ddk_{}, ddv_{};
  DeadRows dead_{};
};

template <typename T>
void ask_for_rows(Ahead& ahead, const AttnParams& a, const Task& task, int64_t molecule,
                  int64_t head, int64_t most_keys) {
  const int64_t ni = query_span(a, molecule).size, nj = key_span(a, molecule).size;
  if (ni > QUERIES || nj > most_keys) return ahead.clear();  // pack_rows() asks for its blocks
  const int64_t tiles = 5 * tiles_of<T>(nj, ni) + tiles_of<T>(nj, 2 * a.head_dim + a.value_dim) +
                        tiles_of<T>(ni, 2 * (a.head_dim + a.value_dim));
  ask_ahead(ahead, a, task, molecule, head, tiles,
            {{a.q, a.head_dim}, {a.dout, a.value_dim}, {a.ddq, a.head_dim}},
            {{a.k, a.head_dim}, {a.v, a.value_dim},
             {a.ddk, a.head_dim}, {a.ddv, a.value_dim}});
}

template <typename T>
void run(const AttnParams& a, const Task& task, void* buffer, bool only_statistics) {
  Arena arena(buffer);
  const DoubleBackwardScratch<T> scratch(a, longest_of(a, task), arena);
  Ahead ahead;
  if (only_statistics) {
    for (int64_t head = task.head; head < task.head_end; ++head)
      Head<T>(a, task, task.molecule, head, scratch, ahead).statistics(task.first, task.last);
    return;
  }
  for_each_head<T>(a, task, scratch.long_gq, scratch.head_ld,
                   [&](int64_t molecule, int64_t head, LongSum<T>& gq_sum) {
                     ask_for_rows<T>(ahead, a, task, molecule, head, scratch.keys);
                     Head<T>(a, task, molecule, head, scratch, ahead).run(gq_sum);
                   });
}

}  // namespace

void statistics(const AttnParams& a, const Task& task, void* scratch) {
  if (a.dtype == Dtype::float64) return run<double>(a, task, scratch, true);
  run<float>(a, task, scratch, true);
}

void double_backward(const AttnParams& a, const Task& task, void* scratch) {
  if (a.dtype == Dtype::float64) return run<double>(a, task, scratch, false);
  run<float>(a, task, scratch, false);
}

size_t double_backward_scratch(const AttnParams& a, int64_t longest) {
  Arena arena(nullptr);
  if (a.dtype == Dtype::float64) DoubleBackwardScratch<double>(a, longest, arena);
  else DoubleBackwardScratch<float>(a, longest, arena);
  return size_t(arena.used());
}

}  // namespace ATTN_ISA
}  // namespace attnpool

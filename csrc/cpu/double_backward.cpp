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
  T *k_t, *v_t, *ddk_t, *ddv_t;
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
    arena.each(KEYS * head_ld, k_t, ddk_t);
    arena.each(KEYS * value_ld, v_t, ddv_t);
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

template <typename T, LanesAre L>
class Head {
 public:
  Head(const AttnParams& a, const Task& task, const Block& at, const DoubleBackwardScratch<T>& w,
       Ahead& ahead)
      : a_(a), task_(task), w_(w), ahead_(ahead), scale_(T(a.scale)), at_(at) {
    query_step_ = step_of(at_.queries.size, QUERIES, WIDTH<T>);
    rows_ = task.statistics ? static_cast<T*>(task.statistics) + at.head * 4 * at_.queries.size
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
    large_keys_ = once_ && is_large(a_.gk, a_.key_rows);
    large_queries_ = large_keys_ && one_block;
    const auto place = one_block && once_ ? place_of<T, true> : place_of<T, false>;
    if (!one_block && !task_.statistics) statistics(0, queries.size);
    T* const gq_buffer = w_.linear + 4 * whole_vectors<T>(queries.size);
    T* const gdout_buffer = gq_buffer + queries.size * w_.head_ld;
    const Place<T> gq = sum_of(place, task_.dq_sum, a_.gq, 0, a_.head_dim, gq_buffer);
    const Place<T> gdout =
        sum_of(place, task_.gdout_sum, a_.gdout, at_.molecule, a_.value_dim, gdout_buffer);
    LongSum<T> gdout_sum{w_.long_gdout[0], w_.long_gdout[1], gq_sum.blocks && task_.gdout_sum};
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
        z_sum.template add<L>(at_, w_.g);  // (D13)
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
    const auto read = [&](const View& x, int64_t width, T* buffer, T* turned) {
      if (!x.data) return Side<T>{};
      const Side<T> side{{buffer, whole_vectors<T>(width), false}, turned};
      pack_rows(x, a_.dtype, 0, key, at_.head, at_.nj, width, buffer, side.rows.ld,
                ahead_by(x, at_.keys, at_.nj));
      turn<T, L, LanesAre::keys>(side, at_.nj, width);
      return side;
    };
    k_ = read(a_.k, a_.head_dim, w_.k, w_.k_t);
    v_ = read(a_.v, a_.value_dim, w_.v, w_.v_t);
    ddk_ = read(a_.ddk, a_.head_dim, w_.ddk, w_.ddk_t);
    ddv_ = read(a_.ddv, a_.value_dim, w_.ddv, w_.ddv_t);
  }

  void load_queries() {
    const int64_t row = at_.queries.first + at_.i0;
    read_lse(a_.lse, at_.molecule, row, at_.head, at_.ni, w_.minus_lse, dead_);
    read_statistic(a_.dlse, at_.molecule, row, at_.head, at_.ni, w_.dlse);
    dead_.clear_rows(w_.dlse, 1, at_.ni);
    const auto read = [&](const View& x, int64_t molecule, int64_t width, T* buffer, T* turned) {
      if (!x.data) return Side<T>{};
      const Side<T> side{{buffer, whole_vectors<T>(width), false}, turned};
      pack_rows(x, a_.dtype, molecule, row, at_.head, at_.ni, width, buffer, side.rows.ld,
                ahead_by(x, at_.queries, at_.ni));
      dead_.clear_rows(buffer, side.rows.ld, at_.ni);
      turn<T, L, LanesAre::queries>(side, at_.ni, width);
      return side;
    };
    q_ = read(a_.q, 0, a_.head_dim, w_.q, w_.q_t);
    dout_ = read(a_.dout, at_.molecule, a_.value_dim, w_.dout, w_.dout_t);
    ddq_ = read(a_.ddq, 0, a_.head_dim, w_.ddq, w_.ddq_t);
  }

  // to (+)= factor * the products of the sides, of which some may be absent; whether anything is
  // there now.
  bool scores(const Sides<T>& x, const Sides<T>& more, int64_t width, T* to, T factor, bool add) {
    const auto there = [](const Sides<T>& s) { return s.keys.rows.data && s.queries.rows.data; };
    if (!there(x) && !there(more)) return add;
    const bool both = there(x) && there(more);
    pair_products<T, L>(at_, there(x) ? x : more, width, to, factor, add, &ahead_, nullptr,
                        both ? &more : nullptr);
    return true;
  }

  // P (before it is divided by its sum; its logits, if the block has all keys), T, dP and G of the
  // block, (D1), (B1), (D3).
  void products() {
    if (all_keys_) block_logits<T, L>(a_, at_, k_, q_, w_.pairs, w_.p, w_.minus_lse, ahead_);
    else block_weights<T, L>(a_, at_, Base::whole, k_, q_, w_.minus_lse, w_.pairs, w_.p);
    bool add = a_.ddbias.data != nullptr;
    if (add) pack_pairs<T, L>(a_, a_.ddbias, at_, w_.tangent);
    if (a_.ddkey_bias.data) {
      spread_keys<T, L>(a_, a_.ddkey_bias, at_, w_.tangent, add, [](T x) { return x; });
      add = true;
    }
    add = scores({k_, ddq_}, {ddk_, q_}, a_.head_dim, w_.tangent, scale_, add);
    if (!add) zero(w_.tangent, area<L>(at_));
    pair_products<T, L>(at_, {v_, dout_}, a_.value_dim, w_.dp, T(1), false, &ahead_);
    if (a_.ddv.data)
      pair_products<T, L>(at_, {ddv_, dout_}, a_.value_dim, w_.g, T(1), false, &ahead_);
    else zero(w_.g, area<L>(at_));
    if (a_.seed) {
      keep_pairs<T, L>(a_, at_, w_.pairs);
      for_vectors<T, L>(at_, [&](int64_t x) {
        const Vector<T> kept = load(w_.pairs + x);
        store(w_.dp + x, load(w_.dp + x) * kept);
        store(w_.g + x, load(w_.g + x) * kept);
      });
    }
    if (!dead_.any) return;
    dead_.clear_pairs<L>(w_.p, at_, all_keys_ ? -T(__builtin_inf()) : T(0));
    dead_.clear_pairs<L>(w_.tangent, at_);
    dead_.clear_pairs<L>(w_.dp, at_);
    dead_.clear_pairs<L>(w_.g, at_);
  }

  // FROM_LOGITS: P is made on the way, from the logits of a block that has all keys.
  template <bool FROM_LOGITS>
  void add_sums(RowSums<T>& sums, bool first) {
    for (int64_t r = 0; r < rows_of_block<T, L>(at_); r += ROWS<T, L>) {
      Vector<T> block[RowSums<T>::COUNT] = {};
      const Vector<T> top = FROM_LOGITS ? finite_top<T, L>(w_.minus_lse + r) : Vector<T>{};
      sum_keys<T>(vectors_of<T, L>(at_), block, [&](int64_t n, Vector<T>(&few)[RowSums<T>::COUNT]) {
        const int64_t x = vector_at<T, L>(r, n);
        Vector<T> p = load(w_.p + x);
        if (FROM_LOGITS) store(w_.p + x, p = exp2<T>(p - top));
        const Vector<T> dp = load(w_.dp + x);
        const Vector<T> weighted = p * load(w_.tangent + x);
        few[sums.TOTAL] += p;
        few[sums.DELTA] += p * dp;
        few[sums.T_] += weighted;
        few[sums.S1] += weighted * dp;
        few[sums.W] += p * load(w_.g + x);
      });
#pragma GCC unroll 5
      for (int i = 0; i < RowSums<T>::COUNT; ++i) {
        Vector<T> sum = sum_of_row<T, L>(block[i]), lost{};
        if (!first) {
          const Vector<T> more = sum;
          sum = of_rows<L>(sums.sum[i] + r), lost = of_rows<L>(sums.lost[i] + r);
          add_exactly<T>(sum, lost, more);
        }
        to_rows<L>(sums.sum[i] + r, sum);
        to_rows<L>(sums.lost[i] + r, lost);
      }
    }
  }

  void finish(const RowSums<T>& sums) {
    for (int64_t x = 0; x < at_.ni; x += WIDTH<T>) {
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
    for (int64_t r = 0; r < rows_of_block<T, L>(at_); r += ROWS<T, L>) {
      const Vector<T> t = of_rows<L>(w_.t + r);
      const Vector<T> delta = of_rows<L>(w_.delta_l + r) + of_rows<L>(w_.dlse + r);
      Vector<T> sum[1] = {};
      sum_keys<T>(vectors_of<T, L>(at_), sum, [&](int64_t n, Vector<T>(&few)[1]) {
        const int64_t x = vector_at<T, L>(r, n);
        few[0] += load(w_.p + x) * (load(w_.tangent + x) - t) * (load(w_.dp + x) - delta);
      });
      to_rows<L>(w_.y + r,
                 sum_of_row<T, L>(sum[0]) * of_rows<L>(w_.inverse + r) + of_rows<L>(w_.w + r));
    }
  }

  void read_rows() {
    const int64_t n = at_.queries.size;
    for (int64_t i = 0; i < whole_vectors<T>(at_.ni); ++i) {
      const bool there = i < at_.ni;
      w_.delta_l[i] = there ? rows_[at_.i0 + i] : T(0);
      w_.t[i] = there ? rows_[n + at_.i0 + i] : T(0);
      w_.y[i] = there ? rows_[2 * n + at_.i0 + i] : T(0);
      w_.inverse[i] = there ? rows_[3 * n + at_.i0 + i] : T(0);
    }
  }

  // P, T, dP, G become P R, U R, dS, Z: (B3), (D5), (D6).
  void elementwise() {
    for (int64_t r = 0; r < rows_of_block<T, L>(at_); r += ROWS<T, L>) {
      const Vector<T> delta_l = of_rows<L>(w_.delta_l + r), t = of_rows<L>(w_.t + r);
      const Vector<T> y = of_rows<L>(w_.y + r), inverse = of_rows<L>(w_.inverse + r);
      for (int64_t n = 0; n < vectors_of<T, L>(at_); ++n) {
        const int64_t x = vector_at<T, L>(r, n);
        Vector<T> p = load(w_.p + x) * inverse;
        const Vector<T> tangent = load(w_.tangent + x), dp = load(w_.dp + x);
        Vector<T> u = weight_cotangent(p, tangent, t);
        store(w_.dp + x, score_gradient(p, dp, delta_l));
        store(w_.g + x, centred_second_gradient(p, tangent - t, dp, delta_l,
                                                Vector<T>(load(w_.g + x)), y));
        if (a_.seed) {
          const Vector<T> kept = load(w_.pairs + x);
          u *= kept;
          p *= kept;
        }
        store(w_.tangent + x, u);
        store(w_.p + x, p);
      }
    }
  }

  // add_...: whether this is added to the target, which else begins here.
  void accumulate(const Place<T>& gq, bool add_gq, const Place<T>& gdout, bool add_gdout,
                  const Place<T>& gk, bool add_gk, const Place<T>& gv, bool add_gv) {
    const T *pr = w_.p, *ur = w_.tangent, *ds = w_.dp, *z = w_.g;
    const auto terms = [](const T* x, const Side<T>& y, const T* more_x, const Side<T>& more_y) {
      const T* const more = more_y.rows.data;
      return Terms<T>{x, y.rows, more ? more_x : nullptr, more};
    };
    sum_over_keys<T, L>(at_, dead_, terms(z, k_, ds, ddk_), a_.head_dim, gq, scale_, add_gq,
                        &ahead_, large_queries_);  // (D7)
    sum_over_queries<T, L>(at_, terms(z, q_, ds, ddq_), a_.head_dim, gk, scale_, add_gk, &ahead_,
                           large_keys_);  // (D8)
    sum_over_queries<T, L>(at_, {ur, dout_.rows}, a_.value_dim, gv, T(1), add_gv, &ahead_,
                           large_keys_);  // (D9)
    sum_over_keys<T, L>(at_, dead_, terms(ur, v_, pr, ddv_), a_.value_dim, gdout, T(1), add_gdout,
                        &ahead_, large_queries_);              // (D11)
    if (a_.gbias.data) store_pairs<T, L>(a_, z, at_, a_.gbias);  // (D10)
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
  // See is_large(): of results that are written once, rows of keys and of queries.
  bool large_keys_ = false, large_queries_ = false;
  Side<T> q_{}, dout_{}, ddq_{}, k_{}, v_{}, ddk_{}, ddv_{};
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

template <typename T, LanesAre L>
void run_head(const AttnParams& a, const Task& task, const Block& at,
              const DoubleBackwardScratch<T>& w, Ahead& ahead, LongSum<T>* gq_sum) {
  Head<T, L> head(a, task, at, w, ahead);
  if (gq_sum) head.run(*gq_sum);
  else head.statistics(task.first, task.last);
}

template <typename T>
void run(const AttnParams& a, const Task& task, void* buffer, bool only_statistics) {
  Arena arena(buffer);
  const DoubleBackwardScratch<T> scratch(a, longest_of(a, task), arena);
  Ahead ahead;
  const auto run_it = [&](const Task& part, int64_t molecule, int64_t head, LongSum<T>* gq_sum) {
    const Block at = whole_head(a, molecule, head);
    const auto run_head_by = few_queries<T>(at.queries, at.keys) ? run_head<T, LanesAre::keys>
                                                                 : run_head<T, LanesAre::queries>;
    run_head_by(a, part, at, scratch, ahead, gq_sum);
  };
  if (only_statistics) {
    for (int64_t head = task.head; head < task.head_end; ++head)
      run_it(task, task.molecule, head, nullptr);
    return;
  }
  if (task.part_of_keys() && query_span(a, task.molecule).size <= QUERIES)
    for_each_piece<T>(task, scratch.keys, scratch.long_gq,
                      [&](const Task& piece, int64_t head, LongSum<T>& gq_sum) {
                        run_it(piece, task.molecule, head, &gq_sum);
                      });
  else
    for_each_head<T>(a, task, scratch.long_gq, scratch.head_ld,
                     [&](int64_t molecule, int64_t head, LongSum<T>& gq_sum) {
                       ask_for_rows<T>(ahead, a, task, molecule, head, scratch.keys);
                       run_it(task, molecule, head, &gq_sum);
                     });
  publish_streams();
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

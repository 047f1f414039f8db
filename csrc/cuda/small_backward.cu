// (B1)-(B8) for small sets: dq, dk, dv, dbias, dkey_bias in one sweep. See small_sets.cuh; one warp a
// head, or a warp for every 16 rows where there are more than 32. The weights are made again from
// q and k, and delta is rowsum(P o dP) in float, so neither `out` nor `lse` is read. Each of the
// five products is done once: P and dS go through shared memory to the warps of their keys.
#include "../equations.h"
#include "instances.cuh"
#include "small_sets.cuh"

namespace attnpool {

template <typename T, int D, bool PLAIN, typename S_>
struct BackwardItem {
  using S = S_;
  using Rows = SetRows<T, D, PLAIN>;
  using Tiles = Turned<T, S>;
  using P = SmallPairs<T, S, PLAIN>;
  static constexpr int SUM_BYTES = PLAIN ? 0 : S::WARPS * 8 * S::NT * int(sizeof(float));
  static constexpr int TEAM_BYTES = 2 * Tiles::BYTES + SUM_BYTES + S::WARPS * P::BYTES;
  static constexpr int CHUNKS = ByColumn<T, D>::CHUNKS, UNITS = ByColumn<T, D>::TILES;
  const KernelParams& p;
  const SmallSet& set;
  int head, from, part, team;
  Tiles weight_tiles, ds_tiles;
  float* key_sums;
  unsigned char* pair_memory;
  Rows q, dout, k, v, dq, dk, dv;  // by row the queries of this warp, by column those of all

  ATTN_DEVICE BackwardItem(const KernelParams& params, const SmallSet& set_, int head_, int part_,
                           int team_, unsigned char* memory)
      : p(params), set(set_), head(head_), from(part_ * S::QT * 8), part(part_), team(team_),
        weight_tiles{memory}, ds_tiles{memory + Tiles::BYTES},
        key_sums(reinterpret_cast<float*>(memory + 2 * Tiles::BYTES)),
        pair_memory(memory + 2 * Tiles::BYTES + SUM_BYTES + part * P::BYTES),
        q(of_queries(p.q, 0, p.head_dim)), dout(of_queries(p.dout, 0, p.value_dim)),
        k(of_keys(p.k, 0, p.head_dim)), v(of_keys(p.v, 0, p.value_dim)),
        dq(of_queries(p.dq, from, p.head_dim)), dk(of_keys(p.dk, part * S::KT * 8, p.head_dim)),
        dv(of_keys(p.dv, part * S::KT * 8, p.value_dim)) {}

  ATTN_DEVICE void next_head(int step) {
    head += step;
    for (Rows* x : {&q, &dout, &k, &v, &dq, &dk, &dv}) x->next_head(step);
  }

  ATTN_DEVICE void run() const {
    const P pairs(p, set, head, from, pair_memory);
    Scores<S::QT, S::NT> weight, ds;
    float peak[S::QT], sum[S::QT];
    {
      Sums<T> s[S::MT][S::NT];
      multiply_rows<T, D, S::SURE_OWN, S::SURE, S::QT>(s, q, k, p.zero);
      pairs.logits(weight, s);
      pairs.softmax(weight, peak, sum);                                              // (F2)
    }
    {
      Sums<T> s[S::MT][S::NT];
      multiply_rows<T, D, S::SURE_OWN, S::SURE, S::QT>(s, dout, v, p.zero);
      pairs.kept(ds, s);                                                             // (B1)
    }
    const DeadRows<S::QT> dead = pairs.dead(sum);
    ATTN_UNROLL
    for (int i = 0; i < S::QT; ++i) {
      const float delta = pairs.row_sum(weight[i], ds[i]) - pairs.row_value(p.dlse, i);  // (B2)
      ATTN_UNROLL
      for (int n = 0; n < S::NT; ++n) {
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          ds[i][n][e] = score_gradient(weight[i][n][e], ds[i][n][e], delta);         // (B3)
          if (!PLAIN && sum[i] == 0) ds[i][n][e] = 0;
          weight[i][n][e] *= pairs.keep(i, n, e);
        }
      }
    }
    pairs.store_pairs(p.dbias, ds);                                                  // (B7)
    if (!PLAIN && p.dkey_bias.data) pairs.add_up(key_sums + part * 8 * S::NT, ds);
    const float early = SCALE_EARLY<T> ? p.scale_float : 1.0f, late = SCALE_EARLY<T> ? 1.0f : p.scale_float;
    Weights<T> of_query[S::QT][S::NT];
    ATTN_UNROLL
    for (int i = 0; i < S::QT; ++i)
      ATTN_UNROLL
      for (int n = 0; n < S::NT; ++n) {
        of_query[i][n] = Weights<T>(ds[i][n][0] * early, ds[i][n][1] * early);
        ds_tiles.write(part * S::QT + i, n, of_query[i][n]);
        weight_tiles.write(part * S::QT + i, n, Weights<T>(weight[i][n][0], weight[i][n][1]));
      }
    ATTN_ROLLED
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      Sums<T> y[S::QT][UNITS];
      multiply_columns<S::SURE>(y, {Term<T, D, S::QT, S::NT, PLAIN>{of_query, k}}, chunk);                        // (B5)
      store_query_rows<T, D, S::SURE_OWN>(p, set, head, from, dq, chunk, late, y,
                                          PLAIN ? nullptr : &dead);
    }
    team_barrier<S::WARPS>(team);  // the tiles of all warps

    if (!PLAIN && p.dkey_bias.data) pairs.store_sums(p.dkey_bias, key_sums, part);   // (B8)
    Weights<T> of_key[S::KT][S::NT];
    weight_tiles.read(of_key, part * S::KT);
    ATTN_ROLLED
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      Sums<T> y[S::KT][UNITS];
      multiply_columns<S::SURE>(y, {Term<T, D, S::KT, S::NT, PLAIN>{of_key, dout}}, chunk);                       // (B4)
      store_columns<T, D, S::SURE_OWN>(dv, chunk, 1.0f, y);
    }
    ds_tiles.read(of_key, part * S::KT);
    ATTN_ROLLED
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      Sums<T> y[S::KT][UNITS];
      multiply_columns<S::SURE>(y, {Term<T, D, S::KT, S::NT, PLAIN>{of_key, q}}, chunk);                          // (B6)
      store_columns<T, D, S::SURE_OWN>(dk, chunk, late, y);
    }
    team_barrier<S::WARPS>(team);  // before the tiles are written again
  }

 private:
  ATTN_DEVICE Rows of_queries(const View& x, int column_from, int64_t units) const {
    return {x, set.molecule, set.queries, from, column_from, head, units};
  }
  ATTN_DEVICE Rows of_keys(const View& x, int column_from, int64_t units) const {
    return {x, set.molecule, set.keys, 0, column_from, head, units};
  }
};

template <typename T, int D, bool PLAIN_>
struct SmallBackward {
  static constexpr bool PLAIN = PLAIN_;
  template <int NT, int QT, int WARPS, int SURE>
  using Item = BackwardItem<T, D, PLAIN, Shape<NT, QT, WARPS, PLAIN ? SURE : 0>>;
  using Two = Item<2, 2, 1, 0>;
  using Three = Item<3, 3, 1, 2>;
  using Four = Item<4, 4, 1, 3>;
  static constexpr bool SIX = PLAIN;
  using Six = Item<6, 2, 3, 4>;
  using Eight = Item<8, 2, 4, SIX ? 6 : 4>;

  static ATTN_DEVICE void nobody(const KernelParams& p, int thread) {
    if (!p.shared_seeds) fill_rows_of_nobody<T>(p, p.dq, true, p.head_dim, T{}, thread);
    fill_rows_of_nobody<T>(p, p.dk, false, p.head_dim, T{}, thread);
    fill_rows_of_nobody<T>(p, p.dv, false, p.value_dim, T{}, thread);
    clear_added_of_nobody(p, p.dbias, p.dkey_bias, thread);
  }
};

template <typename T, int D, int VARIANT>
ATTN_KERNEL ATTN_BLOCKS_OF_SM(32 * SMALL_WARPS, IS_PLAIN<VARIANT> && IS_HALF<T> && D <= 64 ? 3 : 2)
    small_backward_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  ATTN_SHARED_MEMORY(memory);
  small_block<SmallBackward<T, D, IS_PLAIN<VARIANT>>, IS_LARGE<VARIANT>>(p, memory);
}

template <typename T, int D>
struct RunSmallBackward {
  template <int VARIANT>
  static int run(const KernelParams& p, void* stream) {
    using Plan = SmallPlan<SmallBackward<T, D, IS_PLAIN<VARIANT>>, IS_LARGE<VARIANT>>;
    return launch<small_backward_kernel<T, D, VARIANT>, Plan>(small_blocks(p), p, stream);
  }
};

int launch_small_backward(const KernelParams& p, void* stream) {
  return for_small<RunSmallBackward>(p, stream);
}

}  // namespace attnpool

// (D1)-(D13) for small sets in one sweep: gradients of q, k, v, bias, key_bias, dout and dlse. See
// small_sets.cuh; one warp a head up to 24 rows, else a warp for every 16. Logits, T, dP and G of a
// warp are in registers together, so each product is done once. dS, Z and U o R go through shared
// memory to the warps of their keys.
#include "../equations.h"
#include "instances.cuh"
#include "small_sets.cuh"

namespace attnpool {

template <typename T, int D, bool PLAIN, typename S_>
struct DoubleBackwardItem {
  using S = S_;
  using Rows = SetRows<T, D, PLAIN>;
  using Tiles = Turned<T, S>;
  using P = SmallPairs<T, S, PLAIN>;
  static constexpr int SUM_BYTES = PLAIN ? 0 : S::WARPS * 8 * S::NT * int(sizeof(float));
  static constexpr int TEAM_BYTES = 3 * Tiles::BYTES + SUM_BYTES + S::WARPS * P::BYTES;
  static constexpr int CHUNKS = ByColumn<T, D>::CHUNKS, UNITS = ByColumn<T, D>::TILES;
  const KernelParams& p;
  const SmallSet& set;
  int head, from, part, team;
  Tiles u_tiles, ds_tiles, z_tiles;
  float* key_sums;
  unsigned char* pair_memory;
  // By row the queries of this warp, by column those of all. a, b, c: the cotangents of dq, dk, dv.
  Rows q, a, dout, k, b, v, c, gq, gdout, gk, gv;
  QueryNumbers<S> gdlse;

  ATTN_DEVICE DoubleBackwardItem(const KernelParams& params, const SmallSet& set_, int head_,
                                 int part_, int team_, unsigned char* memory)
      : p(params), set(set_), head(head_), from(part_ * S::QT * 8), part(part_), team(team_),
        u_tiles{memory}, ds_tiles{memory + Tiles::BYTES}, z_tiles{memory + 2 * Tiles::BYTES},
        key_sums(reinterpret_cast<float*>(memory + 3 * Tiles::BYTES)),
        pair_memory(memory + 3 * Tiles::BYTES + SUM_BYTES + part * P::BYTES),
        q(of_queries(p.q, 0, p.head_dim)), a(of_queries(p.ddq, 0, p.head_dim)),
        dout(of_queries(p.dout, 0, p.value_dim)),
        k(of_keys(p.k, 0, p.head_dim)), b(of_keys(p.ddk, 0, p.head_dim)),
        v(of_keys(p.v, 0, p.value_dim)), c(of_keys(p.ddv, 0, p.value_dim)),
        gq(of_queries(p.gq, from, p.head_dim)), gdout(of_queries(p.gdout, from, p.value_dim)),
        gk(of_keys(p.gk, part * S::KT * 8, p.head_dim)),
        gv(of_keys(p.gv, part * S::KT * 8, p.value_dim)), gdlse(p.gdlse, set, from, head) {}

  ATTN_DEVICE void next_head(int step) {
    head += step;
    gdlse.next_head(step);
    for (Rows* x : {&q, &a, &dout, &k, &b, &v, &c, &gq, &gdout, &gk, &gv}) x->next_head(step);
  }

  ATTN_DEVICE void run() const {
    const P pairs(p, set, head, from, pair_memory);
    Scores<S::QT, S::NT> weight, tangent, dp, g;
    float sum[S::QT];
    products(pairs, weight, tangent, dp, g, sum);
    const DeadRows<S::QT> dead = pairs.dead(sum);
    const float early = SCALE_EARLY<T> ? p.scale_float : 1.0f;
    const float late = SCALE_EARLY<T> ? 1.0f : p.scale_float;
    Weights<T> of_ds[S::QT][S::NT], of_z[S::QT][S::NT], of_u[S::QT][S::NT], of_p[S::QT][S::NT];
    float row_t[S::QT];
    ATTN_UNROLL
    for (int i = 0; i < S::QT; ++i) {
      const float t = pairs.row_sum(weight[i], tangent[i]);                          // (D2)
      const float delta = pairs.row_sum(weight[i], dp[i]);                           // (B2)
      const float delta_l = delta - pairs.row_value(p.dlse, i);
      float y = 0;
      ATTN_UNROLL
      for (int n = 0; n < S::NT; ++n)
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          tangent[i][n][e] -= t;
          y += weight[i][n][e] * (tangent[i][n][e] * (dp[i][n][e] - delta) + g[i][n][e]);
        }
      y = quad_sum(y);                                                               // (D4)
      row_t[i] = t;
      ATTN_UNROLL
      for (int n = 0; n < S::NT; ++n) {
        float ds[2], u[2], r[2];
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float w = weight[i][n][e], centred = tangent[i][n][e];
          r[e] = pairs.keep(i, n, e);
          ds[e] = score_gradient(w * early, dp[i][n][e], delta_l);                   // (B3)
          u[e] = w * centred * r[e];                                                 // (D5)
          const float scaled = PLAIN ? w * early : w;
          g[i][n][e] = centred_second_gradient(scaled, centred, dp[i][n][e], delta_l, g[i][n][e], y);
          if (!PLAIN && sum[i] == 0) ds[e] = u[e] = g[i][n][e] = 0;                  // (D6)
        }
        of_ds[i][n] = Weights<T>(ds[0], ds[1]);
        of_u[i][n] = Weights<T>(u[0], u[1]);
        const float rest = PLAIN ? 1.0f : early;
        of_z[i][n] = Weights<T>(g[i][n][0] * rest, g[i][n][1] * rest);
        of_p[i][n] = Weights<T>(weight[i][n][0] * r[0], weight[i][n][1] * r[1]);
        ds_tiles.write(part * S::QT + i, n, of_ds[i][n]);
        u_tiles.write(part * S::QT + i, n, of_u[i][n]);
        z_tiles.write(part * S::QT + i, n, of_z[i][n]);
      }
      if (!PLAIN && sum[i] == 0) row_t[i] = 0;
    }
    gdlse.store(pairs.own_row(row_t));                                               // (D12)
    pairs.store_pairs(p.gbias, g);                                                   // (D10)
    if (!PLAIN && p.gkey_bias.data) pairs.add_up(key_sums + part * 8 * S::NT, g);
    ATTN_ROLLED
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      Sums<T> y[S::QT][UNITS];
      multiply_columns<S::SURE>(y, {OfQueries{of_u, v}, OfQueries{of_p, c}}, chunk);   // (D11)
      store_columns<T, D, S::SURE_OWN>(gdout, chunk, 1.0f, y, PLAIN ? nullptr : &dead);
    }
    ATTN_ROLLED
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      Sums<T> y[S::QT][UNITS];
      multiply_columns<S::SURE>(y, {OfQueries{of_ds, b}, OfQueries{of_z, k}}, chunk);  // (D7)
      store_query_rows<T, D, S::SURE_OWN>(p, set, head, from, gq, chunk, late, y,
                                          PLAIN ? nullptr : &dead);
    }
    team_barrier<S::WARPS>(team);  // the tiles of all warps

    if (!PLAIN && p.gkey_bias.data) pairs.store_sums(p.gkey_bias, key_sums, part);   // (D13)
    {
      Weights<T> u[S::KT][S::NT];
      u_tiles.read(u, part * S::KT);
      ATTN_ROLLED
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        Sums<T> y[S::KT][UNITS];
        multiply_columns<S::SURE>(y, {OfKeys{u, dout}}, chunk);                      // (D9)
        store_columns<T, D, S::SURE_OWN>(gv, chunk, 1.0f, y);
      }
    }
    Weights<T> ds[S::KT][S::NT], z[S::KT][S::NT];
    ds_tiles.read(ds, part * S::KT);
    z_tiles.read(z, part * S::KT);
    ATTN_ROLLED
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      Sums<T> y[S::KT][UNITS];
      multiply_columns<S::SURE>(y, {OfKeys{ds, a}, OfKeys{z, q}}, chunk);            // (D8)
      store_columns<T, D, S::SURE_OWN>(gk, chunk, late, y);
    }
    team_barrier<S::WARPS>(team);  // before the tiles are written again
  }

 private:
  using OfQueries = Term<T, D, S::QT, S::NT, PLAIN>;  // terms of the gradients of queries
  using OfKeys = Term<T, D, S::KT, S::NT, PLAIN>;

  ATTN_DEVICE Rows of_queries(const View& x, int column_from, int64_t units) const {
    return {x, set.molecule, set.queries, from, column_from, head, units};
  }
  ATTN_DEVICE Rows of_keys(const View& x, int column_from, int64_t units) const {
    return {x, set.molecule, set.keys, 0, column_from, head, units};
  }

  // Weights (F2), T (D1), dP (B1), G (D3).
  ATTN_DEVICE void products(const P& pairs, Scores<S::QT, S::NT>& weight,
                            Scores<S::QT, S::NT>& tangent, Scores<S::QT, S::NT>& dp,
                            Scores<S::QT, S::NT>& g, float (&sum)[S::QT]) const {
    using Form = ByRow<T, D>;
    {
      Sums<T> s[S::MT][S::NT], t[S::MT][S::NT];
      ATTN_UNROLL_BY(Form::TOGETHER)
      for (int chunk = 0; chunk < Form::CHUNKS; ++chunk) {
        uint32_t x[S::QT][Form::WORDS], y[S::NT][Form::WORDS], of_b[S::NT][Form::WORDS];
        load_tiles<S::SURE_OWN>(x, q, chunk);
        load_tiles<S::SURE>(y, k, chunk);
        load_tiles<S::SURE>(of_b, b, chunk);
        multiply_tiles<T>(s, x, y, p.zero);
        multiply_tiles<T>(t, x, of_b, p.zero);
        load_tiles<S::SURE_OWN>(x, a, chunk);
        multiply_tiles<T>(t, x, y, p.zero);
      }
      float peak[S::QT];
      pairs.logits(weight, s);
      pairs.softmax(weight, peak, sum);
      pairs.tangents(tangent, t);
    }
    Sums<T> s[S::MT][S::NT], t[S::MT][S::NT];
    ATTN_UNROLL_BY(Form::TOGETHER)
    for (int chunk = 0; chunk < Form::CHUNKS; ++chunk) {
      uint32_t x[S::QT][Form::WORDS], y[S::NT][Form::WORDS];
      load_tiles<S::SURE_OWN>(x, dout, chunk);
      load_tiles<S::SURE>(y, v, chunk);
      multiply_tiles<T>(s, x, y, p.zero);
      load_tiles<S::SURE>(y, c, chunk);
      multiply_tiles<T>(t, x, y, p.zero);
    }
    pairs.kept(dp, s);
    pairs.kept(g, t);
  }
};

template <typename T, int D, bool PLAIN_>
struct SmallDoubleBackward {
  static constexpr bool PLAIN = PLAIN_;
  template <int NT, int QT, int WARPS, int SURE>
  using Item = DoubleBackwardItem<T, D, PLAIN, Shape<NT, QT, WARPS, PLAIN ? SURE : 0>>;
  using Two = Item<2, 2, 1, 0>;
  using Three = Item<3, 3, 1, 2>;
  using Four = Item<4, 2, 2, 3>;
  static constexpr bool SIX = false;
  using Six = Item<8, 2, 4, 4>;
  using Eight = Item<8, 2, 4, 4>;

  static ATTN_DEVICE void nobody(const KernelParams& p, int thread) {
    if (!p.shared_seeds) {
      fill_rows_of_nobody<T>(p, p.gq, true, p.head_dim, T{}, thread);
      fill_rows_of_nobody<T>(p, p.gdout, true, p.value_dim, T{}, thread);
      fill_rows_of_nobody<float>(p, p.gdlse, true, 1, 0.0f, thread);
    }
    fill_rows_of_nobody<T>(p, p.gk, false, p.head_dim, T{}, thread);
    fill_rows_of_nobody<T>(p, p.gv, false, p.value_dim, T{}, thread);
    clear_added_of_nobody(p, p.gbias, p.gkey_bias, thread);
  }
};

template <typename T, int D, int VARIANT>
ATTN_KERNEL ATTN_BLOCKS_OF_SM(32 * SMALL_WARPS, 2)
    small_double_backward_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  ATTN_SHARED_MEMORY(memory);
  small_block<SmallDoubleBackward<T, D, IS_PLAIN<VARIANT>>, IS_LARGE<VARIANT>>(p, memory);
}

template <typename T, int D>
struct RunSmallDoubleBackward {
  template <int VARIANT>
  static int run(const KernelParams& p, void* stream) {
    using Plan = SmallPlan<SmallDoubleBackward<T, D, IS_PLAIN<VARIANT>>, IS_LARGE<VARIANT>>;
    return launch<small_double_backward_kernel<T, D, VARIANT>, Plan>(small_blocks(p), p, stream);
  }
};

int launch_small_double_backward(const KernelParams& p, void* stream) {
  return for_small<RunSmallDoubleBackward>(p, stream);
}

}  // namespace attnpool

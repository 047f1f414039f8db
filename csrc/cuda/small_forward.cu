// (F1)-(F3) for small sets: out and lse. See small_sets.cuh; one block a set, one warp a head, or
// two for more than 32 rows. Shared memory: none.
#include "instances.cuh"
#include "small_sets.cuh"

namespace attnpool {

template <typename T, int D, bool PLAIN, typename S_>
struct ForwardItem {
  using S = S_;
  using Rows = SetRows<T, D, PLAIN>;
  using P = SmallPairs<T, S, PLAIN>;
  static constexpr int TEAM_BYTES = S::WARPS * P::BYTES;
  const KernelParams& p;
  const SmallSet& set;
  int head, from;
  unsigned char* pair_memory;
  Rows q, k, v, out;
  QueryNumbers<S> lse;

  ATTN_DEVICE ForwardItem(const KernelParams& params, const SmallSet& set_, int head_, int part, int,
                          unsigned char* memory)
      : p(params), set(set_), head(head_), from(part * S::QT * 8),
        pair_memory(memory + part * P::BYTES),
        q(p.q, set.molecule, set.queries, from, from, head, p.head_dim),
        k(p.k, set.molecule, set.keys, 0, 0, head, p.head_dim),
        v(p.v, set.molecule, set.keys, 0, 0, head, p.value_dim),
        out(p.out, set.molecule, set.queries, from, from, head, p.value_dim),
        lse(p.lse, set, from, head) {}

  ATTN_DEVICE void next_head(int step) {
    head += step;
    q.next_head(step), k.next_head(step), v.next_head(step), out.next_head(step);
    lse.next_head(step);
  }

  ATTN_DEVICE void run() const {
    const P pairs(p, set, head, from, pair_memory);
    Sums<T> s[S::MT][S::NT];
    multiply_rows<T, D, S::SURE_OWN, S::SURE, S::QT>(s, q, k, p.zero);
    Scores<S::QT, S::NT> x;
    float peak[S::QT], sum[S::QT];
    pairs.logits(x, s);
    pairs.softmax(x, peak, sum);
    lse.store(pairs.lse(peak, sum));                                                 // (F2)
    const DeadRows<S::QT> dead = pairs.dead(sum);
    Weights<T> weights[S::QT][S::NT];
    ATTN_UNROLL
    for (int i = 0; i < S::QT; ++i)
      ATTN_UNROLL
      for (int n = 0; n < S::NT; ++n)
        weights[i][n] = Weights<T>(x[i][n][0] * pairs.keep(i, n, 0),
                                   x[i][n][1] * pairs.keep(i, n, 1));
    ATTN_ROLLED
    for (int chunk = 0; chunk < ByColumn<T, D>::CHUNKS; ++chunk) {
      Sums<T> y[S::QT][ByColumn<T, D>::TILES];
      multiply_columns<S::SURE>(y, {Term<T, D, S::QT, S::NT, PLAIN>{weights, v}}, chunk);  // (F3)
      store_columns<T, D, S::SURE_OWN>(out, chunk, 1.0f, y, PLAIN ? nullptr : &dead);
    }
  }
};

template <typename T, int D, bool PLAIN_>
struct SmallForward {
  static constexpr bool PLAIN = PLAIN_;
  template <int NT, int QT, int WARPS, int SURE>
  using Item = ForwardItem<T, D, PLAIN, Shape<NT, QT, WARPS, PLAIN ? SURE : 0>>;
  using Two = Item<2, 2, 1, 0>;
  using Three = Item<3, 3, 1, 2>;
  using Four = Item<4, 4, 1, 3>;
  // 32 queries a warp repeat fewer loads of keys and values, but not for all there are registers.
  static constexpr bool SIX = PLAIN && IS_HALF<T> && D <= 64;
  using Six = Item<6, 3, 2, 4>;
  using Eight = Item<8, SIX ? 4 : 2, SIX ? 2 : 4, SIX ? 6 : 4>;

  static ATTN_DEVICE void nobody(const KernelParams& p, int thread) {
    if (p.shared_seeds) return;
    fill_rows_of_nobody<T>(p, p.out, true, p.value_dim, T{}, thread);
    fill_rows_of_nobody<float>(p, p.lse, true, 1, -INFINITY, thread);
  }
};

template <typename T, int D, int VARIANT>
ATTN_KERNEL ATTN_BLOCKS_OF_SM(32 * SMALL_WARPS, VARIANT == SMALL_PLAIN && IS_HALF<T> && D <= 64 ? 4 : 3)
    small_forward_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  ATTN_SHARED_MEMORY(memory);
  small_block<SmallForward<T, D, IS_PLAIN<VARIANT>>, IS_LARGE<VARIANT>>(p, memory);
}

template <typename T, int D>
struct RunSmallForward {
  template <int VARIANT>
  static int run(const KernelParams& p, void* stream) {
    using Plan = SmallPlan<SmallForward<T, D, IS_PLAIN<VARIANT>>, IS_LARGE<VARIANT>>;
    return launch<small_forward_kernel<T, D, VARIANT>, Plan>(small_blocks(p), p, stream);
  }
};

int launch_small_forward(const KernelParams& p, void* stream) {
  return for_small<RunSmallForward>(p, stream);
}

}  // namespace attnpool

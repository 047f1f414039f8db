// Sets of at most SMALL_ROWS queries and keys: what the three passes have in common.
//
// A block has one set and several heads of it. A team of WARPS warps has one head at a time: each
// warp has QT tiles of 8 queries and all NT tiles of 8 keys, logits and weights in registers, so
// softmax needs one sweep and no running maximum. What the gradients of keys sum over queries comes
// from all warps of the team, by tiles of weights in shared memory (Turned). A set of other size
// has another shape; the shape depends on the set alone, so its bits do not depend on its batch.
// PLAIN: self-attention as wide as the kernel, a positive scale, nothing added to the logits and
// nothing dropped. Everything else is the other instance, which asks at run time and has fewer
// shapes. Each is two kernels, because a kernel has the registers of its largest shape:
//   up to 32 rows   PLAIN: 2 tiles (any size to 16 rows), 3, 4; else 4
//   up to 64 rows   PLAIN, where registers allow: 6 tiles (33 to 48 rows), 8; else 8
#pragma once

#include "launch.h"
#include "nobody.cuh"
#include "small_rows.cuh"

namespace attnpool {

// SURE: so many tiles are whole where queries and keys are the same rows.
template <int NT_, int QT_, int WARPS_, int SURE_>
struct Shape {
  static constexpr int NT = NT_, QT = QT_, WARPS = WARPS_, SURE = SURE_;
  static constexpr int MT = (QT + 1) / 2, KT = (NT + WARPS - 1) / WARPS;  // tiles of keys of a warp
  static constexpr int TEAMS = SMALL_WARPS / WARPS;
  // Whole tiles among those of a warp, which are all of them where a team is one warp.
  static constexpr int SURE_OWN = WARPS == 1 ? SURE : 0;
};

// Where the scale of d(q) and d(k) is: in dS, which is less work, or after the sums, as float16 has
// no exponents to spare.
template <typename T>
constexpr bool SCALE_EARLY = true;
template <>
constexpr bool SCALE_EARLY<Half> = false;

// One set of the batch.
struct SmallSet {
  int molecule;
  Range queries, keys;

  ATTN_DEVICE SmallSet(const KernelParams& p, int molecule_, bool plain) : molecule(molecule_) {
    const Span k = key_span(p, molecule), q = plain ? k : query_span(p, molecule);
    queries = {int(q.first), int(q.size < INT32_MAX ? q.size : INT32_MAX)};
    keys = {int(k.first), int(k.size < INT32_MAX ? k.size : INT32_MAX)};
  }
  ATTN_DEVICE int rows() const { return larger(queries.size, keys.size); }
};

// One number of each query row of a warp, in one head: lane t of the quad that shares row g of all
// tiles has that of tile t (QT <= 4).
template <typename S>
struct QueryNumbers {
  float* own;  // of this lane
  int64_t head_stride;
  bool exists;

  ATTN_DEVICE QueryNumbers(const View& x, const SmallSet& set, int from, int head)
      : head_stride(x.head) {
    const int row = from + 8 * (lane_index() % 4) + lane_index() / 4;
    own = address<float>(x, set.molecule, set.queries.first + row, head);
    exists = x.data && lane_index() % 4 < S::QT && row < set.queries.size;
  }
  ATTN_DEVICE void next_head(int step) { own += step * head_stride; }
  ATTN_DEVICE void store(float x) const {
    if (exists) *own = x;
  }
};

// The logits of a warp and what a row of them sums to. x[i][n][e] is of row g of tile i and column
// 2 t + e of tile n.
template <int QT, int NT>
using Scores = float[QT][NT][2];

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// The pairs of one warp: its set and head, and the query rows from `from` on. What is added to a
// logit, or stored for a pair, passes through shared memory: a lane's own two numbers of each tile,
// so that one copy of the code serves all tiles.
template <typename T, typename S, bool PLAIN>
struct SmallPairs {
  static constexpr int TILES = S::QT * S::NT;
  static constexpr int BYTES = PLAIN ? 0 : TILES * 32 * 2 * int(sizeof(float));  // of a warp
  const KernelParams& p;
  const SmallSet& set;
  int head, from;
  float* lane_pairs;  // 64 numbers from tile to tile
  Pairs<T> pairs;
  uint64_t kept_bits = ~uint64_t(0);  // bits 2 (i NT + n) + e

  ATTN_DEVICE SmallPairs(const KernelParams& params, const SmallSet& set_, int head_, int from_,
                         unsigned char* memory)
      : p(params), set(set_), head(head_), from(from_),
        lane_pairs(reinterpret_cast<float*>(memory) + 2 * lane_index()),
        pairs(params, set_.molecule, head_, set_.keys.size, set_.keys.first) {
    if (PLAIN || !p.seed) return;
    kept_bits = 0;
    ATTN_ROLLED
    for (int tile = 0; tile < TILES; ++tile)
      kept_bits |= uint64_t(pairs.keep_two(query(tile / S::NT), key(tile % S::NT, 0))) << 2 * tile;
  }

  ATTN_DEVICE int query(int i) const { return from + 8 * i + lane_index() / 4; }
  ATTN_DEVICE int key(int n, int e) const { return 8 * n + lane_index() % 4 * 2 + e; }
  ATTN_DEVICE bool exists(int i, int n, int e) const {
    return query(i) < set.queries.size && key(n, e) < set.keys.size;
  }

  // (B1) R
  ATTN_DEVICE float keep(int i, int n, int e) const {
    if (PLAIN) return 1;
    return kept_bits >> (2 * (i * S::NT + n) + e) & 1 ? pairs.keep_scale : 0.0f;
  }

  // Products of queries and keys as logits (F1), -inf where there is no key. PLAIN leaves the scale
  // to softmax, which has it in its exponent.
  ATTN_DEVICE void logits(Scores<S::QT, S::NT>& x, const Sums<T> (&s)[S::MT][S::NT]) const {
    const bool added = !PLAIN && (p.bias.data || p.key_bias.data);
    if (added) load_added(p.bias, p.key_bias);
    ATTN_UNROLL
    for (int i = 0; i < S::QT; ++i)
      ATTN_UNROLL
      for (int n = 0; n < S::NT; ++n)
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          x[i][n][e] = s[i / 2][n][i % 2 * 2 + e] * (PLAIN ? 1.0f : p.scale_float);
          if (added) x[i][n][e] += lane_pairs[64 * (i * S::NT + n) + e];
          if ((!PLAIN || n >= S::SURE) && key(n, e) >= set.keys.size) x[i][n][e] = -INFINITY;
        }
  }

  // Logits to weights (F2); gives the rows' largest logits and sums for their LSE.
  ATTN_DEVICE void softmax(Scores<S::QT, S::NT>& x, float (&peak)[S::QT],
                           float (&sum)[S::QT]) const {
    const float factor = PLAIN ? p.scale_float * LOG2_E : LOG2_E;
    ATTN_UNROLL
    for (int i = 0; i < S::QT; ++i) {
      float most = fmaxf(x[i][0][0], x[i][0][1]);
      ATTN_UNROLL
      for (int n = 1; n < S::NT; ++n) most = fmaxf(most, fmaxf(x[i][n][0], x[i][n][1]));
      most = fmaxf(most, __shfl_xor_sync(WARP, most, 1));
      most = fmaxf(most, __shfl_xor_sync(WARP, most, 2));
      peak[i] = most;
      const float base = most == -INFINITY ? 0.0f : PLAIN ? most * factor : most;
      float total = 0;
      ATTN_UNROLL
      for (int n = 0; n < S::NT; ++n)
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          x[i][n][e] = exp2_fast(PLAIN ? x[i][n][e] * factor - base : (x[i][n][e] - base) * factor);
          total += x[i][n][e];
        }
      total = quad_sum(total);
      sum[i] = total;
      const float inverse = total == 0 ? 0.0f : inverse_fast(total);
      ATTN_UNROLL
      for (int n = 0; n < S::NT; ++n)
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e) x[i][n][e] *= inverse;
    }
  }

  // (D1) from products
  ATTN_DEVICE void tangents(Scores<S::QT, S::NT>& x, const Sums<T> (&s)[S::MT][S::NT]) const {
    const bool added = !PLAIN && (p.ddbias.data || p.ddkey_bias.data);
    if (added) load_added(p.ddbias, p.ddkey_bias);
    ATTN_UNROLL
    for (int i = 0; i < S::QT; ++i)
      ATTN_UNROLL
      for (int n = 0; n < S::NT; ++n)
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          x[i][n][e] = s[i / 2][n][i % 2 * 2 + e] * p.scale_float;
          if (added) x[i][n][e] += lane_pairs[64 * (i * S::NT + n) + e];
        }
  }

  // (B1), (D3) from products with the values
  ATTN_DEVICE void kept(Scores<S::QT, S::NT>& x, const Sums<T> (&s)[S::MT][S::NT]) const {
    ATTN_UNROLL
    for (int i = 0; i < S::QT; ++i)
      ATTN_UNROLL
      for (int n = 0; n < S::NT; ++n)
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e) x[i][n][e] = s[i / 2][n][i % 2 * 2 + e] * keep(i, n, e);
  }

  // sum x y over the keys of a row
  static ATTN_DEVICE float row_sum(const float (&x)[S::NT][2], const float (&y)[S::NT][2]) {
    float sum = 0;
    ATTN_UNROLL
    for (int n = 0; n < S::NT; ++n) sum += x[n][0] * y[n][0] + x[n][1] * y[n][1];
    return quad_sum(sum);
  }

  // Rows without a finite logit. With PLAIN there is none: a set without keys has no queries.
  ATTN_DEVICE DeadRows<S::QT> dead(const float (&sum)[S::QT]) const {
    DeadRows<S::QT> rows;
    ATTN_UNROLL
    for (int i = 0; i < S::QT; ++i) rows.lanes[i] = PLAIN ? 0 : __ballot_sync(WARP, sum[i] == 0);
    return rows;
  }

  // What is added to logits, or to their tangents; 0 where there is no pair.
  ATTN_DEVICE void load_added(const View& bias, const View& key_bias) const {
    ATTN_ROLLED
    for (int number = 0; number < 2 * TILES; ++number) {
      const int tile = number / 2, e = number % 2, i = query(tile / S::NT), j = key(tile % S::NT, e);
      const bool real = exists(tile / S::NT, tile % S::NT, e);
      lane_pairs[64 * tile + e] =
          real ? pairs.pair_value(bias, i, j) + pairs.key_value(key_bias, j) : 0.0f;
    }
  }

  // (F2) of the row that is this lane's own.
  ATTN_DEVICE float lse(const float (&peak)[S::QT], const float (&sum)[S::QT]) const {
    const float most = own_row(peak), total = own_row(sum);
    const float log = IS_HALF<T> ? log2_fast(total) * LN_2 : natural_log(total);
    return total == 0 ? -INFINITY : (PLAIN ? most * p.scale_float : most) + log;
  }

  ATTN_DEVICE float own_row(const float (&of_tiles)[S::QT]) const {
    float mine = of_tiles[0];
    ATTN_UNROLL
    for (int i = 1; i < S::QT; ++i) mine = lane_index() % 4 == i ? of_tiles[i] : mine;
    return mine;
  }
  ATTN_DEVICE float row_value(const View& x, int i) const {
    if (!x.data || query(i) >= set.queries.size) return 0;
    return *address<const float>(x, set.molecule, set.queries.first + query(i), head);
  }

  ATTN_DEVICE void store_pairs(const View& x, const Scores<S::QT, S::NT>& value) const {
    if constexpr (!PLAIN) {
      if (!x.data) return;
      ATTN_UNROLL
      for (int i = 0; i < S::QT; ++i)
        ATTN_UNROLL
        for (int n = 0; n < S::NT; ++n)
          ATTN_UNROLL
          for (int e = 0; e < 2; ++e) lane_pairs[64 * (i * S::NT + n) + e] = value[i][n][e];
      ATTN_ROLLED
      for (int number = 0; number < 2 * TILES; ++number) {
        const int tile = number / 2, e = number % 2, i = tile / S::NT, n = tile % S::NT;
        if (exists(i, n, e))
          pairs.store_pair(x, query(i), key(n, e), lane_pairs[64 * tile + e]);
      }
    }
  }

  // Sums over the queries of this warp (B8), to shared memory: one number for each key.
  ATTN_DEVICE void add_up(float* to, const Scores<S::QT, S::NT>& value) const {
    ATTN_UNROLL
    for (int n = 0; n < S::NT; ++n)
      ATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        float sum = 0;
        ATTN_UNROLL
        for (int i = 0; i < S::QT; ++i) sum += value[i][n][e];
        sum += __shfl_xor_sync(WARP, sum, 4);
        sum += __shfl_xor_sync(WARP, sum, 8);
        sum += __shfl_xor_sync(WARP, sum, 16);
        if (lane_index() < 4) to[key(n, e)] = sum;
      }
  }
  // ... of all warps, for the keys of this one
  ATTN_DEVICE void store_sums(const View& x, const float* from_all, int part) const {
    const int j = part * 8 * S::KT + lane_index();
    if (lane_index() >= 8 * S::KT || j >= 8 * S::NT) return;
    float sum = 0;
    ATTN_UNROLL
    for (int w = 0; w < S::WARPS; ++w) sum += from_all[w * 8 * S::NT + j];
    pairs.store_key(x, j, sum);
  }

};

// ---- tiles of weights in shared memory, read transposed ------------------------------------------

template <typename T, typename S>
struct Turned {
  static constexpr int TILE = IS_HALF<T> ? 128 : 256;  // bytes
  static constexpr int BYTES = (S::NT * S::NT + 3) * TILE;  // tiles are read by fours
  unsigned char* tiles;

  ATTN_DEVICE unsigned char* place(int query_tile, int key_tile) const {
    return tiles + (key_tile * S::NT + query_tile) * TILE;
  }

  // Tiles of floats have their even rows first, so that no two lanes below read from one bank.
  ATTN_DEVICE void write(int query_tile, int key_tile, const Weights<T>& x) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    if constexpr (IS_HALF<T>) {
      reinterpret_cast<uint32_t*>(place(query_tile, key_tile))[lane_index()] = x.word;
    } else {
      uint32_t* to = reinterpret_cast<uint32_t*>(place(query_tile, key_tile)) + g % 2 * 32 +
                     g / 2 * 8 + 2 * t;
      to[0] = x.word[0];
      to[1] = x.word[1];
    }
  }

  // Weights of the tiles of keys from `first` on: a row is a key, its columns are queries.
  ATTN_DEVICE void read(Weights<T> (&x)[S::KT][S::NT], int first) const {
    ATTN_UNROLL
    for (int j = 0; j < S::KT; ++j) read_one(x[j], first + j);
  }

 private:
  ATTN_DEVICE void read_one(Weights<T> (&x)[S::NT], int key_tile) const {
    if constexpr (IS_HALF<T>) {
      ATTN_UNROLL
      for (int i = 0; i < S::NT; i += 4) {
        uint32_t four[4];
        load_matrices_transposed(four, place(i, key_tile) + 16 * lane_index());
        ATTN_UNROLL
        for (int j = 0; j < 4 && i + j < S::NT; ++j) x[i + j].word = four[j];
      }
    } else {
      const int g = lane_index() / 4, t = lane_index() % 4;
      ATTN_UNROLL
      for (int i = 0; i < S::NT; ++i) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(place(i, key_tile)) + 8 * t + g;
        x[i].word[0] = from[0];
        x[i].word[1] = from[32];
      }
    }
  }
};

// (B5), (D7): rows of d(q) of a warp, or with shared seeds of the partial result of this molecule.
template <typename T, int D, int B, int R, bool EXACT>
ATTN_DEVICE void store_query_rows(const KernelParams& p, const SmallSet& set, int head, int from,
                                  const SetRows<T, D, EXACT>& to, int chunk, float factor,
                                  const Sums<T> (&sums)[R][ByColumn<T, D>::TILES],
                                  const DeadRows<R>* dead) {
  if (EXACT || !p.shared_seeds) {
    store_columns<T, D, B>(to, chunk, factor, sums, dead);
    return;
  }
  using Form = ByColumn<T, D>;
  const int first = chunk * Form::CHUNK + to.g * Form::UNITS;
  ATTN_UNROLL
  for (int r = 0; r < R; ++r)
    ATTN_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * r + 2 * to.t + e;
      if (row >= to.columns_left || first >= to.width) continue;
      float* x = static_cast<float*>(p.partial) +
                 ((set.molecule * p.query_rows + from + row) * p.heads + head) * p.head_dim + first;
      const bool none = dead && dead->has(r, 2 * to.t + e);
      ATTN_UNROLL
      for (int w = 0; w < Form::UNITS; ++w)
        x[w] = none ? 0.0f : sums[r][w / 2][e + w % 2 * 2] * factor;
    }
}

template <int WARPS>
ATTN_DEVICE void team_barrier(int team) {
  if constexpr (WARPS == 1) warp_barrier();
  else group_barrier(1 + team, 32 * WARPS);
}

// ---- blocks ------------------------------------------------------------------------------------

// ITEM<S>(p, set, head, part of the team, team, its shared memory): run() does a head, then
// next_head(step) goes on.
template <typename ITEM>
ATTN_DEVICE void for_heads(const KernelParams& p, const SmallSet& set, int share,
                           unsigned char* memory) {
  using S = typename ITEM::S;
  const int warp = threadIdx.x / 32, team = warp / S::WARPS, part = warp % S::WARPS;
  int head = share * S::TEAMS + team;
  const int heads = int(p.heads);
  if (team >= S::TEAMS || head >= heads) return;
  const int step = S::TEAMS << p.head_shift;
  ITEM item(p, set, head, part, team, memory + team * ITEM::TEAM_BYTES);
  for (;;) {
    item.run();
    head += step;
    if (head >= heads) return;
    item.next_head(step);
  }
}

// LARGE: sets of 33 to 64 rows. A larger one than the caller knew of stops the device, as nobody
// else comes for it.
template <typename PASS, bool LARGE>
ATTN_DEVICE void small_block(const KernelParams& p, unsigned char* memory) {
  const int blocks = int(p.molecules) << p.head_shift;
  if (int(blockIdx.x) >= blocks) {
    if (!LARGE) PASS::nobody(p, (blockIdx.x - blocks) * SMALL_WARPS * 32 + threadIdx.x);
    return;
  }
  const SmallSet set(p, blockIdx.x >> p.head_shift, PASS::PLAIN);
  const int share = blockIdx.x & ((1 << p.head_shift) - 1), tiles = (set.rows() + 7) / 8;
  constexpr int MOST = LARGE ? 8 : 4;
  if (tiles > MOST) {
    if (p.longest && p.longest <= MOST * 8) stop();
    return;
  }
  if constexpr (LARGE) {
    if (tiles < 5) return;
    if (PASS::SIX && tiles <= 6) for_heads<typename PASS::Six>(p, set, share, memory);
    else for_heads<typename PASS::Eight>(p, set, share, memory);
  } else if constexpr (PASS::PLAIN) {
    if (tiles == 0) return;
    if (tiles <= 2) for_heads<typename PASS::Two>(p, set, share, memory);
    else if (tiles == 3) for_heads<typename PASS::Three>(p, set, share, memory);
    else for_heads<typename PASS::Four>(p, set, share, memory);
  } else {
    for_heads<typename PASS::Four>(p, set, share, memory);
  }
}

template <typename PASS, bool LARGE>
struct SmallPlan {
  static constexpr int GROUPS = 1, THREADS = 32 * SMALL_WARPS;
  template <typename ITEM>
  static constexpr int OF = ITEM::S::TEAMS * ITEM::TEAM_BYTES;
  static constexpr int BYTES =
      LARGE ? larger(PASS::SIX ? OF<typename PASS::Six> : 0, OF<typename PASS::Eight>)
      : PASS::PLAIN ? larger(OF<typename PASS::Two>, larger(OF<typename PASS::Three>,
                                                            OF<typename PASS::Four>))
                    : OF<typename PASS::Four>;
};

// ---- the host's side ---------------------------------------------------------------------------

// Which instance of a kernel.
constexpr int SMALL_PLAIN = 0, SMALL_ANY = 1, SMALL_PLAIN_LARGE = 2, SMALL_ANY_LARGE = 3;
template <int VARIANT>
constexpr bool IS_PLAIN = VARIANT % 2 == 0;
template <int VARIANT>
constexpr bool IS_LARGE = VARIANT >= 2;

inline int64_t small_blocks(const KernelParams& p) {
  return (p.molecules << p.head_shift) + NOBODY_BLOCKS;
}

// RUN<T, D>::run<VARIANT> for sets of up to 32 rows, and for larger ones unless there are none.
template <template <typename, int> class RUN, typename T, int D>
int run_small(const KernelParams& p, bool plain, void* stream) {
  using R = RUN<T, D>;
  const bool large = !p.longest || p.longest > 32;
  if (plain) {
    const int status = R::template run<SMALL_PLAIN>(p, stream);
    return status || !large ? status : R::template run<SMALL_PLAIN_LARGE>(p, stream);
  }
  if constexpr (D <= SMALL_WIDTH) {
    const int status = R::template run<SMALL_ANY>(p, stream);
    return status || !large ? status : R::template run<SMALL_ANY_LARGE>(p, stream);
  }
  return -1;
}

template <template <typename, int> class RUN, typename T>
int for_small_width(const KernelParams& p, void* stream) {
  const bool plain = is_plain_small(p);
  const int64_t widest = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (widest <= 32) return run_small<RUN, T, 32>(p, plain, stream);
  if (widest <= 64) return run_small<RUN, T, 64>(p, plain, stream);
  return run_small<RUN, T, 128>(p, plain, stream);
}

template <template <typename, int> class RUN>
int for_small(const KernelParams& p, void* stream) {
#ifdef ATTN_ONLY_TYPE
  const bool plain = is_plain_small(p) && p.head_dim == ATTN_ONLY_WIDTH;
  return run_small<RUN, ATTN_ONLY_TYPE, ATTN_ONLY_WIDTH>(p, plain, stream);
#else
  switch (p.dtype) {
    case Dtype::float16: return for_small_width<RUN, Half>(p, stream);
    case Dtype::bfloat16: return for_small_width<RUN, Bfloat16>(p, stream);
    case Dtype::float32: return for_small_width<RUN, float>(p, stream);
    default: return -1;
  }
#endif
}

}  // namespace attnpool

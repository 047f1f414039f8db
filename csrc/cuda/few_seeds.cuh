// Pooling with few seeds (shared queries, at most MAX_SEEDS): what its three passes have in common.
//
// Tensor cores have nothing to do there and memory is the limit, so keys and values are streamed
// once through shared memory. One warp is one group, for a head and a molecule, or a part of one: a
// molecule of more than `split` keys is cut from its own first key on, so its bits depend on
// nothing but its own size, and one huge set fills the chip. Results of parts lie in `parts` until
// a second kernel merges them in order. A warp changes sides within a tile of KEYS keys:
//   by key   a lane has one key (LANES lanes share one where rows are long): products with the
//            seeds, softmax, terms of a pair, which go to shared memory
//   by unit  a lane has UNITS units of every row: weighted sums over keys or over seeds
// Loops over seeds are unrolled, as their sums are registers, and skip by a mask those that are not
// there, so there is one instance for all numbers of seeds.
#pragma once

#include "launch.h"
#include "pairs.cuh"

namespace attnpool {

constexpr int SEEDS = MAX_SEEDS;

// Shared memory: TENSORS with a row for every key, SEED_TENSORS with one for every seed, PAIR_TERMS
// numbers of each pair of the seeds and PAIR_TILES tiles of keys, ROW_TERMS numbers of each seed.
template <typename T, int D, int MOST_KEYS, int STAGES_, int TENSORS, int SEED_TENSORS,
          int PAIR_TERMS, int PAIR_TILES, int ROW_TERMS>
struct SeedsPlan {
  using A = Acc<T>;
  static constexpr int STAGES = STAGES_, KEYS = smaller(MOST_KEYS, 4096 / (D * int(sizeof(T))));
  static constexpr int LANES = 32 / KEYS, UNITS = D / 32, WIDTH = 16 / int(sizeof(T));
  static constexpr int TILE = KEYS * STRIDE<T, D>, PAIR_KEYS = PAIR_TILES * KEYS;
  static constexpr int SEED_ROWS = SEEDS * D, TERMS = SEEDS * PAIR_KEYS;
  static constexpr int TOGETHER = D * int(sizeof(A)) <= 512 ? 16 / int(sizeof(A)) : 1;  // keys
  static constexpr int GROUP_THREADS = 32;
  static constexpr int GROUP_BYTES =
      TENSORS * STAGES * TILE * int(sizeof(T)) +
      (SEED_TENSORS * SEED_ROWS + PAIR_TERMS * TERMS + ROW_TERMS * SEEDS) * int(sizeof(A));
  static constexpr int GROUPS = larger(1, smaller(2, (48 << 10) / GROUP_BYTES));
  static constexpr int THREADS = GROUPS * 32, BYTES = GROUPS * GROUP_BYTES;
};

// ---- parts of molecules --------------------------------------------------------------------

// Keys first ... last - 1 of a molecule that starts at `row` and has `keys`; none: last = 0.
struct Part {
  int molecule, row, keys, first, last;
};

// Slot x holds at most one part that starts at a row of x split ... (x + 1) split - 1 and is not
// its molecule's first, as parts of two molecules cannot start so close; and at most one first part
// of a molecule of several parts.
ATTN_HD int64_t slot_count(const KernelParams& p) { return p.key_rows / p.split + 1; }

// The last molecule that starts at or before a row, -1: none. One warp, 33 ranges a step.
ATTN_DEVICE int64_t molecule_of_row(const Axis& axis, int64_t row) {
  int64_t low = -1, high = axis.molecules;  // edge(low) <= row < edge(high)
  while (high - low > 1) {
    const int64_t step = (high - low + 32) / 33, probe = low + (lane_index() + 1) * step;
    const bool before = probe < high && edge(axis, probe) <= row;
    const int passed = lowest_zero(__ballot_sync(WARP, before));  // -1: all 32
    low += (passed < 0 ? 32 : passed) * step;
    high = high < low + step ? high : low + step;
  }
  return low;
}

ATTN_DEVICE Part part_of_molecule(const KernelParams& p, int64_t molecule, int first) {
  const Span span = key_span(p, molecule);
  const int keys = int(span.size), left = keys - first;
  return {int(molecule), int(span.first), keys, first, first + (left < p.split ? left : p.split)};
}

// The part in a slot: the first of a molecule of several, or one that is not the first.
ATTN_DEVICE Part part_in_slot(const KernelParams& p, int64_t slot, bool starts) {
  const int64_t low = slot * p.split, end = low + p.split < p.key_rows ? low + p.split : p.key_rows;
  const Part none = {0, 0, 0, 0, 0};
  const int64_t molecule = molecule_of_row(key_axis(p), starts ? end - 1 : low);
  if (molecule < 0) return none;
  const Span span = key_span(p, molecule);
  const int64_t ahead = low - span.first;  // the first part starts so many rows before the slot
  if (span.size <= p.split || (ahead > 0) == starts) return none;
  const int64_t first = starts ? 0 : (ahead + p.split - 1) / p.split * p.split;
  if (first >= span.size) return none;
  return part_of_molecule(p, molecule, int(first));
}

// Where in `parts` a part of a molecule has its numbers for a seed: value_dim of a row, then
// four.
template <typename A>
ATTN_DEVICE A* numbers_of_part(const KernelParams& p, const Part& part, int first, int head,
                               int seed) {
  const int64_t slot = (int64_t(part.row) + first) / p.split * 2 + (first == 0);
  const int64_t at = (slot * p.heads + head) * p.query_rows + seed;
  return static_cast<A*>(p.parts) + at * (p.value_dim + PART_NUMBERS);
}

// What a warp of the gradients does: a slot, or some molecules; or one part for its statistics.
struct SeedsWork {
  int64_t tile, slots;
  int items;
  bool surplus, clears;

  ATTN_DEVICE SeedsWork(const KernelParams& p, int64_t tile_)
      : tile(tile_), slots(slot_count(p)), items(1),
        surplus(tile >= (p.only_statistics ? 2 * slots : p.partial_rows)),
        clears(!p.only_statistics && tile < slots) {
    if (surplus || clears || p.only_statistics) return;
    const int64_t left = p.molecules - (tile - slots) * p.molecule_chunk;
    items = left < p.molecule_chunk ? int(left) : p.molecule_chunk;
  }

  ATTN_DEVICE Part part(const KernelParams& p, int item) const {
    if (p.only_statistics) return part_in_slot(p, tile / 2, tile % 2);
    if (clears) return part_in_slot(p, tile, false);
    return part_of_molecule(p, (tile - slots) * p.molecule_chunk + item, 0);
  }
};

// The launches of the gradients: statistics of parts where there may be any, then everything.
template <void (*KERNEL)(KernelParams), typename Plan>
int launch_parts(const KernelParams& p, void* stream) {
  KernelParams first = p;
  first.only_statistics = 1;
  int status = 0;
  if (p.key_rows > p.split)
    status = launch<KERNEL, Plan>(2 * slot_count(p) * p.heads, first, stream);
  return status ? status : launch<KERNEL, Plan>(p.partial_rows * p.heads, p, stream);
}

// ---- one warp together ---------------------------------------------------------------------

// Over lanes that differ in bits from `bit` on, below 32.
template <typename A>
ATTN_DEVICE A sum_above(A x, int bit) {
  for (int i = 16; i >= bit; i /= 2) x += __shfl_xor_sync(WARP, x, i);
  return x;
}
// Over lanes that differ in bits below `bits`; the others hold the same.
template <typename A>
ATTN_DEVICE A sum_below(A x, int bits) {
  for (int i = bits / 2; i > 0; i /= 2) x += __shfl_xor_sync(WARP, x, i);
  return x;
}
template <typename A>
ATTN_DEVICE A max_below(A x, int bits) {
  for (int i = bits / 2; i > 0; i /= 2) {
    const A other = __shfl_xor_sync(WARP, x, i);
    x = other > x ? other : x;
  }
  return x;
}

// ---- rows ------------------------------------------------------------------------------------

// N elements that are read or written together.
template <typename X, int N>
struct alignas(N * sizeof(X) < 16 ? N * sizeof(X) : 16) Pack {
  X at[N];
};
template <int N, typename X>
ATTN_DEVICE Pack<X, N> load_pack(const X* from) {
  return *reinterpret_cast<const Pack<X, N>*>(from);
}

// Keys first ... of a tensor into a tile of KEYS rows, zeros behind the last. Complete after
// copy_commit, copy_wait and a barrier.
template <typename Plan, typename T, int D>
ATTN_DEVICE void load_tile(T* tile, const View& x, bool by_16_bytes, const Part& part, int first,
                           int head, int units) {
  constexpr int W = Plan::WIDTH, CHUNKS = D / W, STEP = CHUNKS < 32 ? 32 / CHUNKS : 1;
  const int live = rows_from(part.last, first, Plan::KEYS);
  const T* base = address<const T>(x, 0, int64_t(part.row) + first, head);
  if (!by_16_bytes) {
    ATTN_ROLLED
    for (int i = lane_index(); i < Plan::KEYS * D; i += 32) {
      const int row = i / D, unit = i % D;
      tile[row * STRIDE<T, D> + unit] =
          row < live && unit < units ? base[row * x.row + unit * x.unit] : T{};
    }
    return;
  }
  for (int chunk = lane_index() % (CHUNKS < 32 ? CHUNKS : 32); chunk < CHUNKS; chunk += 32) {
    const bool inside = chunk * W < units;
    int row = lane_index() / CHUNKS;
    const T* from = base + row * x.row + chunk * W;
    T* to = tile + row * STRIDE<T, D> + chunk * W;
    ATTN_UNROLL
    for (int i = 0; i < Plan::KEYS / STEP; ++i) {
      const bool wanted = inside && row < live;
      copy_async(to, wanted ? from : x.data, wanted);
      row += STEP;
      from += STEP * x.row;
      to += STEP * STRIDE<T, D>;
    }
  }
}

// Rows of the seeds in the accumulator's type, zeros from `units` on. Several loads at a time.
template <typename T, int D>
ATTN_DEVICE void load_seeds(Acc<T>* rows, const View& x, int molecule, int head, int seeds,
                            int units) {
  constexpr int N = 4;
  const T* base = address<const T>(x, molecule, 0, head);
  ATTN_ROLLED
  for (int from = lane_index(); from < seeds * D; from += 32 * N) {
    Acc<T> found[N];
    ATTN_UNROLL
    for (int n = 0; n < N; ++n) {
      const int i = from + 32 * n, unit = i % D;
      const bool real = i < seeds * D && unit < units;
      found[n] = real ? to_acc(base[i / D * x.row + unit * x.unit]) : Acc<T>(0);
    }
    ATTN_UNROLL
    for (int n = 0; n < N; ++n)
      if (from + 32 * n < seeds * D) rows[from + 32 * n] = found[n];
  }
}

// The UNITS units of a lane, into a row of a tensor.
template <typename T, int N>
ATTN_DEVICE void store_units(const View& x, int molecule, int64_t row, int head, int units,
                             const Acc<T> (&values)[N]) {
  T* to = address<T>(x, molecule, row, head);
  const int first = lane_index() * N;
  if (first >= units) return;
  Pack<T, N> pack;
  ATTN_UNROLL
  for (int u = 0; u < N; ++u) from_acc(values[u], pack.at[u]);
  const uint64_t bits = reinterpret_cast<uint64_t>(to) | uint64_t(units) * sizeof(T);
  if (x.unit == 1 && bits % alignof(Pack<T, N>) == 0 && units % N == 0) {
    *reinterpret_cast<Pack<T, N>*>(to + first) = pack;
    return;
  }
  ATTN_UNROLL
  for (int u = 0; u < N; ++u)
    if (first + u < units) to[(first + u) * x.unit] = pack.at[u];
}

// A partial d(q): one row of `partial`.
template <typename T, int N>
ATTN_DEVICE void store_partial(const KernelParams& p, int64_t row, int head,
                               Acc<T> (&dq)[SEEDS][N]) {
  const int seeds = int(p.query_rows), units = int(p.head_dim);
  const View partial = {p.partial, 0, p.heads * p.head_dim, p.head_dim, 1};
  ATTN_UNROLL
  for (int s = 0; s < SEEDS; ++s) {
    if (s >= seeds) continue;
    ATTN_UNROLL
    for (int u = 0; u < N; ++u) dq[s][u] *= Acc<T>(p.scale);                           // (B5)
    store_units<Acc<T>>(partial, 0, row * seeds + s, head, units, dq[s]);
  }
}

// Zeros for the rows of a slot that belong to no molecule.
template <typename T, int N>
ATTN_DEVICE void clear_rows_of_nobody(const KernelParams& p, const View& x, int64_t slot, int head,
                                      int units) {
  const Axis axis = key_axis(p);
  const int64_t begin = edge(axis, 0), end = edge(axis, p.molecules);
  const int64_t first = slot * p.split;
  const int64_t last = first + p.split < p.key_rows ? first + p.split : p.key_rows;
  const Acc<T> zeros[N] = {};
  for (int64_t row = first; row < last; ++row)
    if (row < begin || row >= end) store_units<T>(x, 0, row, head, units, zeros);
}

// The same for a tensor like key_bias, a lane a row.
ATTN_DEVICE void clear_keys_of_nobody(const KernelParams& p, const View& x, int64_t slot,
                                      int head) {
  if (!x.data) return;
  const Axis axis = key_axis(p);
  const int64_t begin = edge(axis, 0), end = edge(axis, p.molecules);
  for (int i = lane_index(); i < p.split; i += 32) {
    const int64_t row = slot * p.split + i;
    if (row < p.key_rows && (row < begin || row >= end))
      clear_element(x, p.key_bias_dtype, row, head);
  }
}

ATTN_DEVICE void clear_pairs_of_nobody(const KernelParams& p, const View& dbias, int64_t slot,
                                       int head) {
  if (slot > 0) return;
  const Rows behind(Tile{p.molecules, 0, {0, 0}, {0, 0}, false});
  clear_pairs_of_nobody(p, dbias, behind, head, lane_index(), 32);
}

// lse of the seeds of a molecule, to shared memory; returns which of them have a finite logit.
template <typename A>
ATTN_DEVICE uint32_t load_lse(A* lse, const KernelParams& p, int molecule, int head) {
  const int seed = lane_index();
  const A found = seed < p.query_rows ? *address<const A>(p.lse, molecule, seed, head)
                                      : -A(INFINITY);
  if (seed < SEEDS) lse[seed] = found;
  return __ballot_sync(WARP, found != -A(INFINITY));
}

// Starts to fetch the first tiles, as stream_tiles wants it.
template <typename Plan, typename Load>
ATTN_DEVICE void begin_tiles(int tiles, const Load& load) {
  for (int tile = 0; tile < Plan::STAGES - 1; ++tile) {
    if (tile < tiles) load(tile, tile);
    copy_commit();
  }
}

// Calls use(tile, its stage) for tiles 0, 1, ... in order, while load(tile, stage) fetches the
// next ones; after begin_tiles, or resident: all of them lie in their stages already.
template <typename Plan, typename Load, typename Use>
ATTN_DEVICE void stream_tiles(int tiles, bool resident, const Load& load, const Use& use) {
  constexpr int AHEAD = Plan::STAGES - 1;
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    if (!resident) {
      if (tile + AHEAD < tiles) load(tile + AHEAD, stage == 0 ? AHEAD : stage - 1);
      copy_commit();
      copy_wait<AHEAD>();
      warp_barrier();
    }
    use(tile, stage);
    warp_barrier();  // before the stage is filled again
    stage = stage == AHEAD ? 0 : stage + 1;
  }
}

// ---- by key ------------------------------------------------------------------------------------

// sum[s] += the lane's share of row . seeds[s]. row: of the lane's key.
template <typename Plan, typename T, int D>
ATTN_DEVICE void add_products(Acc<T> (&sum)[SEEDS], const T* row, const Acc<T>* seeds,
                              uint32_t mask) {
  using A = Acc<T>;
  constexpr int W = Plan::WIDTH, N = 16 / int(sizeof(A));
  const auto add = [&](int unit) {
    const Pack<T, W> x = load_pack<W>(row + unit);
    A y[W];
    ATTN_UNROLL
    for (int i = 0; i < W; ++i) y[i] = to_acc(x.at[i]);
    ATTN_UNROLL
    for (int s = 0; s < SEEDS; ++s) {
      if (!(mask >> s & 1)) continue;
      A part = 0;
      ATTN_UNROLL
      for (int i = 0; i < W; i += N) {
        const Pack<A, N> z = load_pack<N>(seeds + s * D + unit + i);
        ATTN_UNROLL
        for (int j = 0; j < N; ++j) part += z.at[j] * y[i + j];
      }
      sum[s] += part;
    }
  };
  const int first = lane_index() / Plan::KEYS * W;
  if constexpr (sizeof(A) == 8) {  // two at a time take too many registers
    ATTN_ROLLED
    for (int unit = first; unit < D; unit += Plan::LANES * W) add(unit);
  } else {
    ATTN_UNROLL_TWO
    for (int unit = first; unit < D; unit += Plan::LANES * W) add(unit);
  }
}

template <typename Plan, typename A>
ATTN_DEVICE void complete_products(A (&sum)[SEEDS], uint32_t mask) {
  if (Plan::LANES == 1) return;
  ATTN_UNROLL
  for (int s = 0; s < SEEDS; ++s)
    if (mask >> s & 1) sum[s] = sum_above(sum[s], Plan::KEYS);
}

template <typename A>
ATTN_DEVICE void clear_seeds(A (&x)[SEEDS]) {
  ATTN_UNROLL
  for (int s = 0; s < SEEDS; ++s) x[s] = 0;
}
template <typename A, int N>
ATTN_DEVICE void clear_seeds(A (&x)[SEEDS][N]) {
  ATTN_UNROLL
  for (int s = 0; s < SEEDS; ++s)
    ATTN_UNROLL
    for (int n = 0; n < N; ++n) x[s][n] = 0;
}

// Which pairs of key j, one a lane, with the seeds are kept: bit s. Four neighbours in j share
// their random words, so each draws those of one seed in four and gets the others' from them.
template <typename T>
ATTN_DEVICE uint32_t keep_seeds(const Pairs<T>& pairs, int j, int seeds) {
  if (!pairs.p.seed) return ~0u;
  uint32_t kept = 0;
  ATTN_ROLLED
  for (int from = 0; from < seeds; from += 4) {
    const PhiloxWords words =
        keep_words(pairs.key, pairs.molecule, pairs.head, from + (j & 3), j);
    uint32_t bits = 0;
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) bits |= uint32_t(words.word[i] >= pairs.p.drop_threshold) << i;
    ATTN_UNROLL
    for (int other = 0; other < 4; ++other)
      kept |= (__shfl_xor_sync(WARP, bits, other) >> (j & 3) & 1) << (from + ((j ^ other) & 3));
  }
  return kept;
}

// ---- by unit -----------------------------------------------------------------------------------

// The lane's units of a row of a tile or of a seed.
template <int N, typename X>
ATTN_DEVICE void read_units(Acc<X> (&to)[N], const X* row) {
  const Pack<X, N> pack = load_pack<N>(row + lane_index() * N);
  ATTN_UNROLL
  for (int n = 0; n < N; ++n) to[n] = to_acc(pack.at[n]);
}

// sum[s] += sum over the keys of a tile of terms[s][key] rows[key], TOGETHER of them at a time.
// Absent keys of the last of these have rows of zeros and terms that are finite.
template <typename Plan, typename T, int D>
ATTN_DEVICE void add_rows(Acc<T> (&sum)[SEEDS][D / 32], const Acc<T>* terms, const T* rows,
                          int keys, uint32_t mask) {
  using A = Acc<T>;
  constexpr int N = Plan::TOGETHER, U = D / 32;
  ATTN_ROLLED
  for (int key = 0; key < keys; key += N) {
    A x[N][U];
    ATTN_UNROLL
    for (int i = 0; i < N; ++i) read_units(x[i], rows + (key + i) * STRIDE<T, D>);
    ATTN_UNROLL
    for (int s = 0; s < SEEDS; ++s) {
      if (!(mask >> s & 1)) continue;
      const Pack<A, N> weight = load_pack<N>(terms + s * Plan::PAIR_KEYS + key);
      ATTN_UNROLL
      for (int u = 0; u < U; ++u) {
        A part = 0;
        ATTN_UNROLL
        for (int i = 0; i < N; ++i) part += weight.at[i] * x[i][u];
        sum[s][u] += part;
      }
    }
  }
}

}  // namespace attnpool

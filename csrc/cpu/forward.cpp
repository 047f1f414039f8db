// Forward pass of a task: (F1) to (F3), softmax kept online over blocks of keys.
//
// Source of the algorithm: Dao et al., FlashAttention (NeurIPS 2022); blocks as in block.h.
#include "block.h"
#include "half_block.h"
#include "passes.h"

namespace attnpool {
namespace ATTN_ISA {
namespace {

constexpr int64_t KEPT_BYTES = 1 << 20;  // packed keys and values that stay in the L2 cache

// Of the rows of a block: what the weights so far are relative to, their sum, what rounding has
// taken from it, and what the sums of earlier blocks must be multiplied by.
template <typename T>
struct Running {
  T *maximum, *sum, *lost, *row;
};

template <typename T>
struct ForwardScratch {
  T *q, *q_t, *k, *k_t, *v, *s, *pairs, *o, *o_sum, *o_lost;
  T *maximum, *top, *taken, *sum, *lost, *row, *running;
  int64_t keys, kept, head_ld, value_ld;

  ForwardScratch(const AttnParams& a, Arena& arena) {
    head_ld = whole_vectors<T>(a.head_dim);
    value_ld = whole_vectors<T>(a.value_dim);
    keys = key_block<T>(larger(head_ld, value_ld));
    q = arena.take<T>(QUERIES * head_ld);
    q_t = arena.take<T>(QUERIES * head_ld);
    k_t = arena.take<T>(KEYS * head_ld);
    kept = larger(keys, KEPT_BYTES / (int64_t(sizeof(T)) * (head_ld + value_ld)));
    k = arena.take<T>(kept * head_ld);
    v = arena.take<T>(kept * value_ld);
    s = arena.take<T>(keys * QUERIES);
    pairs = arena.take<T>(a.bias.data || a.key_bias.data || a.seed ? keys * QUERIES : 0);
    arena.each(QUERIES * value_ld, o, o_sum, o_lost);
    arena.each(QUERIES, maximum, top, taken, sum, lost, row);
    running = arena.take<T>(a.heads * 4 * QUERIES);
  }
};

// 2^(old - now): what sums relative to an old maximum must be multiplied by.
template <typename T>
ATTN_INLINE Vector<T> fading(Vector<T> old, Vector<T> now) {
  const Vector<T> infinity = splat(T(__builtin_inf()));
  return exp2<T>(old - (now == -infinity ? Vector<T>{} : now));
}

// Logits of the vectors of row r to weights 2^(s - top); returns their sums.
template <typename T, LanesAre L>
ATTN_INLINE Vector<T> weigh(const Block& at, T* s, int64_t r, Vector<T> top) {
  Vector<T> sums[1] = {};
  sum_keys<T>(vectors_of<T, L>(at), sums, [&](int64_t n, Vector<T>(&sum)[1]) {
    T* const place = s + vector_at<T, L>(r, n);
    const Vector<T> weight = exp2<T>(load(place) - top);
    sum[0] += weight;
    store(place, weight);
  });
  return sum_of_row<T, L>(sums[0]);
}

// Turns logits s (and biases) into weights and moves the running statistics on. The maximum is
// rounded to a whole number: then the factor of earlier blocks is a power of 2, which rounds
// nothing away, however often the maximum rises.
template <typename T, LanesAre L>
void soften(Added added, const Block& at, T* s, const T* bias, T* largest,
            const Running<T>& w) {
  add_biases<T, L>(added, at, s, bias, largest);
  const int64_t rows = rows_of_block<T, L>(at);
  for (int64_t r = 0; r < rows; r += ROWS<T, L>) {
    const Vector<T> old = of_rows<L>(w.maximum + r);
    const Vector<T> top = nearest_whole<T>(larger_lanes(of_rows<L>(largest + r), old));
    to_rows<L>(w.maximum + r, top);
    const Vector<T> block = weigh<T, L>(at, s, r, finite<T>(top));
    const Vector<T> fade = fading<T>(old, top);
    Vector<T> sum = of_rows<L>(w.sum + r) * fade, rest = of_rows<L>(w.lost + r) * fade;
    add_exactly<T>(sum, rest, block);
    to_rows<L>(w.sum + r, sum);
    to_rows<L>(w.lost + r, rest);
    to_rows<L>(w.row + r, fade);
  }
}

template <typename T, LanesAre L>
void multiply_pairs(const Block& at, T* s, const T* by) {
  for_vectors<T, L>(at, [&](int64_t p) { store(s + p, load(s + p) * load(by + p)); });
}

// maximum becomes lse = max + log sum; row = 1 / sum, 0 in rows without a finite logit. Returns
// whether there are such rows.
template <typename T>
bool finish_rows(int64_t ni, T* maximum, const T* sum, const T* lost, T* row) {
  bool dead = false;
  for (int64_t x = 0; x < ni; x += WIDTH<T>) {
    dead |= any_zero<T>(load(sum + x));  // also in lanes without a row, which is only slower
    const Vector<T> total = whole_sum<T>(load(sum + x), load(lost + x));
    store(maximum + x, load(maximum + x) * T(LN_2) + log<T>(total));
    store(row + x, total == Vector<T>{} ? Vector<T>{} : T(1) / total);
  }
  return dead;
}

// The logits of a block that has all keys to weights (times R), and the statistics of its rows;
// whether there are rows without a finite logit.
template <typename T, LanesAre L>
bool weigh_block(const AttnParams& a, const Block& at, const ForwardScratch<T>& w) {
  const int64_t rows = rows_of_block<T, L>(at);
  for (int64_t r = 0; r < rows; r += ROWS<T, L>) {
    to_rows<L>(w.sum + r, weigh<T, L>(at, w.s, r, finite_top<T, L>(w.maximum + r)));
    to_rows<L>(w.lost + r, Vector<T>{});
  }
  if (a.seed) {
    keep_pairs<T, L>(a, at, w.pairs);
    multiply_pairs<T, L>(at, w.s, w.pairs);
  }
  return finish_rows(at.ni, w.maximum, w.sum, w.lost, w.row);
}

// out (+)= s v, each row times row[i] if there is one.
template <typename T, LanesAre L>
void weighted_values(const AttnParams& a, const Block& at, const Place<T>& v, const T* s,
                     const Place<T>& out, T* row, bool add, Ahead* ahead = nullptr,
                     bool large = false) {
  const auto product = L == LanesAre::queries ? product_columns<T> : product_rows<T>;
  product({s, L == LanesAre::queries ? QUERIES : KEYS, v.data, v.ld, out.data, out.ld, int(at.ni),
           int(columns_of<T>(a.value_dim)), int(at.nj), T(1), row, add, ahead,
           large && out.direct});
}

// out = 0 in rows without a finite logit.
template <typename T>
void clear_dead(const AttnParams& a, const Block& at, const T* sum) {
  const int64_t row = at.queries.first + at.i0;
  for (int64_t i = 0; i < at.ni; ++i)
    if (sum[i] == 0)
      fill_rows(T(0), a.out, a.dtype, at.molecule, row + i, at.head, 1, a.value_dim);
}

#if defined(__AVX512F__)
// As run_one_block(), in pairs of bfloat16.
void run_one_half_block(const AttnParams& a, Block at, int64_t first, int64_t last,
                        const ForwardScratch<float>& w, Ahead& ahead) {
  constexpr LanesAre L = LanesAre::queries;
  const int64_t molecule = at.molecule, head = at.head, key = at.keys.first;
  const int64_t query_step = step_of(at.queries.size, QUERIES, WIDTH<float>);
  at.nj = at.keys.size;
  const Place<float> k = pairs_of(a.k, 0, key, head), out{w.o, w.value_ld, false};
  pair_up_rows(a.v, 0, key, head, at.nj, a.value_dim, w.v);
  for (at.i0 = first; at.i0 < last; at.i0 += query_step) {
    at.ni = smaller(query_step, last - at.i0);
    const int64_t row = at.queries.first + at.i0, lanes = whole_vectors<float>(at.ni);
    const Place<float> q = pairs_of(a.q, molecule, row, head);
    transpose_rows<float, QUERIES>(q.data, q.ld, at.ni, a.head_dim / 2, w.q_t);
    forget_maxima(at, w.maximum);
    pair_product_rows({k.data, k.ld, w.q_t, QUERIES, w.s, QUERIES, int(at.nj), int(lanes),
                       int(a.head_dim / 2), float(a.scale * LOG2_E), nullptr, false, &ahead, false,
                       w.maximum});
    with_biases<float, L>(a, at, w.pairs, w.s, w.maximum);
    const bool dead = weigh_block<float, L>(a, at, w);
    pair_up_keys(at, w.s, w.s);
    pair_product_columns({w.s, QUERIES, w.v, a.value_dim, out.data, out.ld, int(at.ni),
                          int(a.value_dim), int((at.nj + 1) / 2), 1.f, w.row, false, &ahead});
    store_rows<float>(out.data, out.ld, nullptr, a.out, a.dtype, molecule, row, head, at.ni,
                      a.value_dim);
    if (dead) clear_dead(a, at, w.sum);
    write_statistic(w.maximum, a.lse, molecule, row, head, at.ni);
  }
}
#endif

// Queries first ... last - 1 of a molecule whose keys are one block.
template <typename T, LanesAre L>
void run_one_block(const AttnParams& a, Block at, int64_t first, int64_t last,
                   const ForwardScratch<T>& w, Ahead& ahead) {
  const int64_t molecule = at.molecule, head = at.head, key = at.keys.first;
  const int64_t query_step = step_of(at.queries.size, QUERIES, WIDTH<T>);
  const bool large = is_large(a.out, a.query_rows);
  at.nj = at.keys.size;
  const Side<T> k{rows_of(a.k, a.dtype, 0, key, head, at.nj, a.head_dim, w.k, true, 0), w.k_t};
  const Place<T> v = rows_of(a.v, a.dtype, 0, key, head, at.nj, a.value_dim, w.v, true, 0);
  turn<T, L, LanesAre::keys>(k, at.nj, a.head_dim, &ahead);
  for (at.i0 = first; at.i0 < last; at.i0 += query_step) {
    at.ni = smaller(query_step, last - at.i0);
    const int64_t row = at.queries.first + at.i0;
    const Side<T> q{rows_of(a.q, a.dtype, molecule, row, head, at.ni, a.head_dim, w.q, true, 0),
                    w.q_t};
    const Place<T> out = place_of<T, true>(a.out, a.dtype, molecule, row, head, a.value_dim, w.o);
    turn<T, L, LanesAre::queries>(q, at.ni, a.head_dim);
    block_logits<T, L>(a, at, k, q, w.pairs, w.s, w.maximum, ahead);  // (F1), (F2)
    const bool dead = weigh_block<T, L>(a, at, w);
    weighted_values<T, L>(a, at, v, w.s, out, w.row, false, &ahead, large);  // (F3)
    if (!out.direct)
      store_rows<T>(out.data, out.ld, nullptr, a.out, a.dtype, molecule, row, head, at.ni,
                    a.value_dim);
    if (dead) clear_dead(a, at, w.sum);
    write_statistic(w.maximum, a.lse, molecule, row, head, at.ni);
  }
}

// Adds a block of keys to the rows of `out` and their statistics.
template <typename T, LanesAre L>
void attend_block(const AttnParams& a, const Block& at, const Side<T>& k, const Side<T>& q,
                  const Place<T>& v, const Place<T>& out, bool add, const ForwardScratch<T>& w,
                  const Running<T>& running, Ahead* ahead = nullptr) {
  pair_products<T, L>(at, {k, q}, a.head_dim, w.s, T(a.scale * LOG2_E), false, ahead);
  soften<T, L>(pack_bias<T, L>(a, at, w.pairs), at, w.s, w.pairs, w.top, running);  // (F1), (F2)
  if (a.seed) {
    keep_pairs<T, L>(a, at, w.pairs);
    multiply_pairs<T, L>(at, w.s, w.pairs);
  }
  weighted_values<T, L>(a, at, v, w.s, out, add ? running.row : nullptr, add, ahead);  // (F3)
}

// The same with several blocks of keys: softmax kept online.
template <typename T, LanesAre L>
void run_blocks(const AttnParams& a, Block at, int64_t first, int64_t last,
                const ForwardScratch<T>& w) {
  const int64_t molecule = at.molecule, head = at.head;
  const T infinity = T(__builtin_inf());
  const int64_t key_step = step_of(at.keys.size, w.keys, 4);
  const int64_t query_step = step_of(at.queries.size, QUERIES, WIDTH<T>);
  const bool keep = at.keys.size <= w.kept && L == LanesAre::queries;
  const Place<T> out{w.o, w.value_ld, false};
  for (at.i0 = first; at.i0 < last; at.i0 += query_step) {
    at.ni = smaller(query_step, last - at.i0);
    const int64_t row = at.queries.first + at.i0, lanes = whole_vectors<T>(at.ni);
    const Side<T> q{rows_of(a.q, a.dtype, molecule, row, head, at.ni, a.head_dim, w.q, true,
                            ahead_of(a.q, at.queries, at.ni, head, a.heads)),
                    w.q_t};
    turn<T, L, LanesAre::queries>(q, at.ni, a.head_dim);
    for (int64_t i = 0; i < lanes; ++i)
      w.maximum[i] = w.taken[i] = -infinity, w.sum[i] = w.lost[i] = 0;
    const Running<T> running{w.maximum, w.sum, w.lost, w.row};
    LongSum<T> sums{w.o_sum, w.o_lost};
    const auto decay_of_taken = [&] {
      for (int64_t x = 0; x < lanes; x += WIDTH<T>) {
        store(w.row + x, fading<T>(load(w.taken + x), load(w.maximum + x)));
        store(w.taken + x, load(w.maximum + x));
      }
      return w.row;
    };
    for (at.j0 = 0; at.j0 < at.keys.size; at.j0 += key_step) {
      if (sums.blocks == TOGETHER) sums.take_over(out, at.ni, w.value_ld, decay_of_taken());
      at.nj = smaller(key_step, at.keys.size - at.j0);
      const int64_t key = at.keys.first + at.j0;
      Side<T> k{{w.k + (keep ? at.j0 * w.head_ld : 0), w.head_ld, false}, w.k_t};
      Place<T> v{w.v + (keep ? at.j0 * w.value_ld : 0), w.value_ld, false};
      if (!keep || at.i0 == first) {
        const bool in_place = L == LanesAre::keys;  // what is read once only
        k.rows = rows_of(a.k, a.dtype, molecule, key, head, at.nj, a.head_dim, k.rows.data,
                         in_place, ahead_of(a.k, at.keys, at.nj, head, a.heads));
        v = rows_of(a.v, a.dtype, molecule, key, head, at.nj, a.value_dim, v.data, in_place,
                    ahead_of(a.v, at.keys, at.nj, head, a.heads));
        turn<T, L, LanesAre::keys>(k, at.nj, a.head_dim);
      }
      attend_block<T, L>(a, at, k, q, v, out, sums.blocks++ > 0, w, running);
    }
    if (sums.started) sums.finish(out, at.ni, w.value_ld, decay_of_taken());
    const bool dead = finish_rows(at.ni, w.maximum, w.sum, w.lost, w.row);
    store_rows(out.data, out.ld, w.row, a.out, a.dtype, molecule, row, head, at.ni, a.value_dim);
    if (dead) clear_dead(a, at, w.sum);
    write_statistic(w.maximum, a.lse, molecule, row, head, at.ni);
  }
}

// Some keys of a molecule with few queries, all heads of a block of them before the next one, so
// that rows are read in the order in which they lie.
template <typename T, LanesAre L>
void run_part(const AttnParams& a, const Task& task, Block at, const ForwardScratch<T>& w,
              Ahead& ahead) {
  const int64_t molecule = task.molecule, rows = at.queries.size;
  const int64_t ld = w.value_ld + PartialRow::REST;
  const int64_t key_step = step_of(task.last - task.first, w.keys, 4);
  T* const partial = static_cast<T*>(task.partial);
  const auto running_of = [&](int64_t head) {
    T* const all = w.running + head * 4 * QUERIES;
    return Running<T>{all, all + QUERIES, all + 2 * QUERIES, all + 3 * QUERIES};
  };
  at.ni = rows;
  for (int64_t head = 0; head < a.heads; ++head)
    for (int64_t i = 0; i < QUERIES; ++i) {
      const Running<T> x = running_of(head);
      x.maximum[i] = -T(__builtin_inf()), x.sum[i] = x.lost[i] = 0;
    }
  for (at.j0 = task.first; at.j0 < task.last; at.j0 += key_step) {
    at.nj = smaller(key_step, task.last - at.j0);
    const int64_t key = at.keys.first + at.j0;
    for (at.head = 0; at.head < a.heads; ++at.head) {
      const auto read = [&](const View& x, int64_t width, T* buffer) {
        const int64_t next = at.head + 1 < a.heads ? x.head : at.nj * x.row - at.head * x.head;
        return rows_of(x, a.dtype, 0, key, at.head, at.nj, width, buffer, L == LanesAre::keys,
                       next);
      };
      if (L == LanesAre::keys)
        ask_for_share(ahead, a, at.head, after(at.keys, at.j0, at.nj),
                      squares_of<T>(at.nj, a.head_dim), {a.k, a.v});
      const Side<T> k{read(a.k, a.head_dim, w.k), w.k_t};
      const Place<T> v = read(a.v, a.value_dim, w.v);
      const Side<T> q{rows_of(a.q, a.dtype, molecule, at.queries.first, at.head, rows, a.head_dim,
                              w.q, true, 0),
                      w.q_t};
      turn<T, L, LanesAre::keys>(k, at.nj, a.head_dim, &ahead);
      turn<T, L, LanesAre::queries>(q, rows, a.head_dim);
      attend_block<T, L>(a, at, k, q, v, {partial + at.head * rows * ld, ld, true},
                         at.j0 > task.first, w, running_of(at.head), &ahead);
    }
  }
  for (int64_t head = 0; head < a.heads; ++head)
    for (int64_t i = 0; i < rows; ++i) {
      T* const rest = partial + (head * rows + i) * ld + w.value_ld;
      const Running<T> x = running_of(head);
      rest[PartialRow::TOP] = x.maximum[i];
      rest[PartialRow::SUM] = x.sum[i];
      rest[PartialRow::LOST] = x.lost[i];
    }
}

// out and lse from what the parts of the keys gave, in their order.
template <typename T>
void merge(const AttnParams& a, const SumOfParts& sum, int64_t head) {
  constexpr int W = WIDTH<T>;
  const int64_t width = whole_vectors<T>(sum.width), ld = width + PartialRow::REST;
  alignas(64) T total[MAX_WIDTH], rest[MAX_WIDTH];
  for (int64_t i = 0; i < sum.rows; ++i) {
    const T* const first = static_cast<const T*>(sum.part) + (head * sum.rows + i) * ld;
    const int64_t next = a.heads * sum.rows * ld;
    T top = -T(__builtin_inf());
    for (int64_t x = 0; x < sum.parts; ++x) {
      const T other = first[x * next + width + PartialRow::TOP];
      top = other > top ? other : top;
    }
    Vector<T> weights{}, lost{};
    zero(total, width);
    zero(rest, width);
    for (int64_t x = 0; x < sum.parts; ++x) {
      const T* const part = first + x * next;
      const T* const statistics = part + width;
      const Vector<T> factor = fading<T>(splat(statistics[PartialRow::TOP]), splat(top));
      add_exactly<T>(weights, lost, splat(statistics[PartialRow::SUM]) * factor);
      lost += splat(statistics[PartialRow::LOST]) * factor;
      for (int64_t d = 0; d < width; d += W) {
        Vector<T> all = load(total + d), more = load(rest + d);
        add_exactly<T>(all, more, load(part + d) * factor);
        store(total + d, all);
        store(rest + d, more);
      }
    }
    const Vector<T> whole = whole_sum<T>(weights, lost);
    const bool dead = weights[0] == 0;
    const T inverse = dead ? T(0) : T(1) / whole[0];
    for (int64_t d = 0; d < width; d += W)
      store(total + d, whole_sum<T>(load(total + d), load(rest + d)));
    if (dead) zero(total, width);
    store_rows<T>(total, width, &inverse, sum.to, a.dtype, sum.molecule, sum.first_row + i, head, 1,
                  sum.width);
    const Vector<T> lse = splat(top) * T(LN_2) + log<T>(whole);
    *address<T>(a.lse, sum.molecule, sum.first_row + i, head) = lse[0];
  }
}

template <typename T>
void run_head(const AttnParams& a, const Task& task, const Block& at, const ForwardScratch<T>& w,
              Ahead& ahead) {
  const int64_t first = smaller(task.first, at.queries.size);
  const int64_t last = smaller(task.last, at.queries.size);
  const bool few = few_queries<T>(at.queries, at.keys);
  if (at.keys.size > w.keys)
    return few ? run_blocks<T, LanesAre::keys>(a, at, first, last, w)
               : run_blocks<T, LanesAre::queries>(a, at, first, last, w);
  if (at.keys.size > 0) {
    const int64_t tiles = tiles_of<T>(at.keys.size, at.queries.size) +
                          tiles_of<T>(at.queries.size, a.value_dim) +
                          (few ? squares_of<T>(at.keys.size, a.head_dim) : 0);
    ask_ahead(ahead, a, task, at.molecule, at.head, tiles, {{a.q, a.head_dim}},
              {{a.k, a.head_dim}, {a.v, a.value_dim}});
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      if (!few && multiplies_pairs(a)) return run_one_half_block(a, at, first, last, w, ahead);
#endif
    return few ? run_one_block<T, LanesAre::keys>(a, at, first, last, w, ahead)
               : run_one_block<T, LanesAre::queries>(a, at, first, last, w, ahead);
  }
  const int64_t row = at.queries.first + first;
  fill_rows(T(0), a.out, a.dtype, at.molecule, row, at.head, last - first, a.value_dim);
  for (int64_t i = 0; i < last - first; ++i)
    *address<T>(a.lse, at.molecule, row + i, at.head) = -T(__builtin_inf());
}

template <typename T>
void run(const AttnParams& a, const Task& task, void* buffer) {
  Arena arena(buffer);
  const ForwardScratch<T> scratch(a, arena);
  Ahead ahead;
  if (task.partial) {
    const Block at = whole_head(a, task.molecule, 0);
    const auto run_part_by = few_queries<T>(at.queries, at.keys) ? run_part<T, LanesAre::keys>
                                                                 : run_part<T, LanesAre::queries>;
    return run_part_by(a, task, at, scratch, ahead);
  }
  for (int64_t molecule = task.molecule; molecule < task.molecule_end; ++molecule) {
    for (int64_t head = task.head; head < task.head_end; ++head)
      run_head<T>(a, task, whole_head(a, molecule, head), scratch, ahead);
  }
  publish_streams();
}

}  // namespace

void forward(const AttnParams& a, const Task& task, void* scratch) {
  if (a.dtype == Dtype::float64) return run<double>(a, task, scratch);
  run<float>(a, task, scratch);
}

void merge_parts(const AttnParams& a, const SumOfParts& parts, int64_t head) {
  if (a.dtype == Dtype::float64) return merge<double>(a, parts, head);
  merge<float>(a, parts, head);
}

size_t forward_scratch(const AttnParams& a) {
  Arena arena(nullptr);
  if (a.dtype == Dtype::float64) ForwardScratch<double>(a, arena);
  else ForwardScratch<float>(a, arena);
  return size_t(arena.used());
}

}  // namespace ATTN_ISA
}  // namespace attnpool

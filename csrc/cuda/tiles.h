// Which rows belong to which tile, without a prefix sum and without knowing any size on the host.
// Molecule i of a packed axis owns the tiles
//   floor(edge(i) / R) + i + 1  ...  floor(edge(i + 1) / R) + i + 1
// which are at least ceil(n_i / R), so tile -> molecule is a search in ptr itself and the number of
// tiles follows from the shapes alone. Two virtual molecules, -1 and B, hold the rows of nobody
// (before ptr[0] and after ptr[B]); they have no partner rows, so every result of theirs is zero.
#pragma once

#include "../params.h"

namespace attnpool {

// One packed axis: the query rows or the key rows.
struct Axis {
  const void* ptr;
  int64_t molecules, rows;
  int32_t ptr_is_64;
};

ATTN_HD Axis query_axis(const AttnParams& a) {
  return {a.q_ptr, a.molecules, a.query_rows, a.ptr_is_64};
}

ATTN_HD Axis key_axis(const AttnParams& a) {
  return {a.k_ptr, a.molecules, a.key_rows, a.ptr_is_64};
}

// First row of molecule i = -1 ... B + 1, inside [0, rows] whatever ptr holds.
ATTN_HD int64_t edge(const Axis& axis, int64_t i) {
  if (i < 0) return 0;
  if (i > axis.molecules) return axis.rows;
  const int64_t row = axis.ptr_is_64 ? static_cast<const int64_t*>(axis.ptr)[i]
                                     : static_cast<const int32_t*>(axis.ptr)[i];
  return row < 0 ? 0 : row > axis.rows ? axis.rows : row;
}

ATTN_HD int64_t first_tile(const Axis& axis, int64_t i, int tile_rows) {
  return edge(axis, i) / tile_rows + i + 1;
}

ATTN_HD int64_t tile_count(const Axis& axis, int tile_rows) {
  return axis.rows / tile_rows + axis.molecules + 2;
}

// Shared seeds: every molecule owns the same number of query tiles, at least one.
ATTN_HD int64_t tiles_of_seeds(int64_t seeds, int tile_rows) {
  return seeds > tile_rows ? (seeds + tile_rows - 1) / tile_rows : 1;
}

ATTN_HD int64_t query_tile_count(const AttnParams& a, int tile_rows) {
  if (a.shared_seeds) return a.molecules * tiles_of_seeds(a.query_rows, tile_rows);
  return tile_count(query_axis(a), tile_rows);
}

// A tile: rows first ... of `own`, the rows of its molecule on the tile's axis; `other` are the
// molecule's rows on the other axis.
struct Tile {
  int64_t molecule, first;
  Span own, other;
  bool real;  // false for the virtual molecules of the rows of nobody
};

ATTN_HD Tile query_tile(const AttnParams& a, int64_t molecule, int64_t index, int tile_rows) {
  Tile tile = {molecule, index * tile_rows, {0, 0}, {0, 0}, true};
  if (a.shared_seeds) {
    tile.own = {0, a.query_rows};
  } else {
    const Axis axis = query_axis(a);
    tile.own = span_between(edge(axis, molecule), edge(axis, molecule + 1), axis.rows);
    tile.real = molecule >= 0 && molecule < a.molecules;
  }
  if (tile.real) tile.other = key_span(a, molecule);
  return tile;
}

ATTN_HD Tile key_tile(const AttnParams& a, int64_t molecule, int64_t index, int tile_rows) {
  const Axis axis = key_axis(a);
  Tile tile = {molecule, index * tile_rows,
               span_between(edge(axis, molecule), edge(axis, molecule + 1), axis.rows), {0, 0},
               molecule >= 0 && molecule < a.molecules};
  if (tile.real) tile.other = query_span(a, molecule);
  return tile;
}

}  // namespace attnpool

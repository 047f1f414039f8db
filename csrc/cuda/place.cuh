// Who and where: a group of warps in the grid, its molecule, and a tile in shared memory. That is
// [rows][STRIDE] of T, D elements and 16 bytes of padding a row, so that eight rows start in eight
// different groups of banks. Unused units are zero.
#pragma once

#include "warp.cuh"

namespace attnpool {

template <typename T, int D>
constexpr int STRIDE = D + 16 / static_cast<int>(sizeof(T));

ATTN_HD constexpr int smaller(int a, int b) { return a < b ? a : b; }
ATTN_HD constexpr int larger(int a, int b) { return a > b ? a : b; }
ATTN_HD constexpr int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// Rows first ... of `rows`, at most `most` of them.
ATTN_DEVICE int rows_from(int rows, int first, int most) {
  const int left = rows - first;
  return left <= 0 ? 0 : left < most ? left : most;
}

// A group of warps in the grid: GROUPS groups a block, heads of one tile after each other. A warp
// owns the 16 rows from `slot` on.
template <typename Plan>
struct Place {
  int group, thread, slot, head;
  int64_t tile;

  ATTN_DEVICE explicit Place(const KernelParams& p)
      : group(Plan::GROUPS == 1 ? 0 : threadIdx.x / Plan::GROUP_THREADS),
        thread(threadIdx.x % Plan::GROUP_THREADS), slot(thread / 32 * 16) {
    const uint32_t work = blockIdx.x * Plan::GROUPS + group;
    const uint32_t heads = static_cast<uint32_t>(p.heads);
    tile = work / heads;
    head = static_cast<int>(work % heads);
  }
  ATTN_DEVICE unsigned char* memory(unsigned char* of_block) const {
    return of_block + group * Plan::GROUP_BYTES;
  }
};

// The molecule of a tile: the last i with first_tile(i) <= tile. One warp, 33 ranges a step.
ATTN_DEVICE int64_t molecule_of_tile(const Axis& axis, int64_t tile, int tile_rows) {
  int64_t low = -1, high = axis.molecules + 1;  // first_tile(low) <= tile < first_tile(high)
  while (high - low > 1) {
    const int64_t step = (high - low + 32) / 33, probe = low + (lane_index() + 1) * step;
    const bool before = probe < high && first_tile(axis, probe, tile_rows) <= tile;
    const int passed = lowest_zero(__ballot_sync(WARP, before));  // -1: all 32
    low += (passed < 0 ? 32 : passed) * step;
    high = high < low + step ? high : low + step;
  }
  return low;
}

// A Tile in 32 bits, enough for MAX_ROWS: in 64, what lives through a whole kernel takes so many
// registers that others spill. Offsets into tensors are computed in 64.
struct Range {
  int first, size;
};
struct Rows {
  int molecule, first;
  Range own, other;
  bool real;

  ATTN_DEVICE explicit Rows(const Tile& tile)
      : molecule(int(tile.molecule)),
        first(int(tile.first < INT32_MAX ? tile.first : INT32_MAX)),  // a surplus tile
        own{int(tile.own.first), int(tile.own.size)},
        other{int(tile.other.first), int(tile.other.size)}, real(tile.real) {}
};

ATTN_DEVICE Rows find_query_tile(const AttnParams& a, int64_t tile, int tile_rows) {
  if (a.shared_seeds) {
    const int64_t each = tiles_of_seeds(a.query_rows, tile_rows);
    return Rows(query_tile(a, tile / each, tile % each, tile_rows));
  }
  const Axis axis = query_axis(a);
  const int64_t molecule = molecule_of_tile(axis, tile, tile_rows);
  const int64_t index = tile - first_tile(axis, molecule, tile_rows);
  return Rows(query_tile(a, molecule, index, tile_rows));
}

ATTN_DEVICE Rows find_key_tile(const AttnParams& a, int64_t tile, int tile_rows) {
  const Axis axis = key_axis(a);
  const int64_t molecule = molecule_of_tile(axis, tile, tile_rows);
  const int64_t index = tile - first_tile(axis, molecule, tile_rows);
  return Rows(key_tile(a, molecule, index, tile_rows));
}

// Whether the kernels for small sets do a tile, or the rows of nobody.
ATTN_DEVICE bool is_small(const KernelParams& p, const Rows& tile) {
  return p.small_rows > 0 &&
         (!tile.real || (tile.own.size <= p.small_rows && tile.other.size <= p.small_rows));
}

}  // namespace attnpool

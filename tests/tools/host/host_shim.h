// The hardware layer of csrc/cuda/warp.cuh on a CPU, so that g++ compiles the CUDA kernels as they
// are: each function here is the twin of one function there, inline assembly included. Compile with
//   g++ -std=c++17 -x c++ -include tests/tools/host/host_shim.h csrc/cuda/forward.cu
//
// Closer to the worst allowed behaviour than to a fast one: a copy to shared memory arrives at its
// wait and is NaN until then; shared memory is NaN at the start of a block; products of the tensor
// cores are truncated.
#pragma once

#include <cmath>

#include "../../../csrc/cuda/kernel_params.h"
#include "fibers.h"

#define ATTN_HOST_SHIM
#define ATTN_KERNEL inline void
#define ATTN_BOUNDS(...)
#define ATTN_BLOCKS_OF_SM(threads, blocks)
#define ATTN_GRID_CONSTANT const
#define ATTN_DEVICE inline
#define ATTN_SHARED_MEMORY(name) unsigned char* name = (unsigned char*)fibers::shared_base
#define ATTN_UNROLL
#define ATTN_UNROLL_TWO
#define ATTN_ROLLED
#define ATTN_UNROLL_BY(copies)

#define threadIdx (fibers::current->index)
#define blockIdx (fibers::block_index)

namespace attnpool {

inline void stop() { throw fibers::Error("a kernel stopped the device"); }

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline int lowest_zero(uint32_t x) { return ~x ? __builtin_ctz(~x) : -1; }

struct Half {
  uint16_t bits = 0;
};
struct Bfloat16 {
  uint16_t bits = 0;
};
inline float to_acc(Half x) {
  _Float16 half;
  memcpy(&half, &x.bits, 2);
  return float(half);
}
inline float to_acc(Bfloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
inline void from_acc(float x, Half& out) {
  const _Float16 half = _Float16(x);
  memcpy(&out.bits, &half, 2);
}
inline void from_acc(float x, Bfloat16& out) {
  const uint32_t bits = float_bits(x);
  const bool nan = x != x;
  out.bits = nan ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <typename T>
uint32_t pack(float low, float high, T) {
  T l, h;
  from_acc(low, l);
  from_acc(high, h);
  return l.bits | uint32_t(h.bits) << 16;
}
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float inverse_fast(float x) { return 1 / x; }
inline float exp_fast(float x) { return exp2f(x * 1.4426950408889634f); }

// ---- waiting -----------------------------------------------------------------------------------

inline void group_barrier(int number, int threads, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  if (fibers::meets("barrier", file, line)) fibers::barrier(number, unsigned(threads));
}
inline void copy_async(void* shared, const void* global, bool wanted) {
  fibers::copy(shared, wanted ? global : nullptr);
}
inline void copy_commit() { fibers::commit(); }
template <int PENDING>
void copy_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (fibers::meets("wait", file, line)) fibers::wait(PENDING);
}

// ---- one lane ----------------------------------------------------------------------------------

template <int BYTES>
void load_words(uint32_t* x, const void* from) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  if (uintptr_t(from) % BYTES) throw fibers::Error("a load is not aligned");
  memcpy(x, from, BYTES);
}
template <int BYTES>
void store_words(void* to, const uint32_t* x) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  if (uintptr_t(to) % BYTES) throw fibers::Error("a store is not aligned");
  memcpy(to, x, BYTES);
}
inline uint32_t lower_halves(uint32_t first, uint32_t second) {
  return (first & 0xffffu) | second << 16;
}
inline uint32_t upper_halves(uint32_t first, uint32_t second) {
  return first >> 16 | (second & 0xffff0000u);
}

// ---- one warp together -------------------------------------------------------------------------

inline void warp_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  int none = 0;
  if (fibers::meets("barrier", file, line)) fibers::together("warp barrier", none, [](int**) {});
}

template <typename T>
T __shfl_xor_sync(uint32_t, T value, int bits) {
  T given = value;
  struct Lane {
    T given, taken;
    int bits;
  } mine{given, given, bits};
  fibers::together("shuffle", mine, [](Lane** lane) {
    for (int i = 0; i < 32; ++i) lane[i]->taken = lane[i ^ lane[i]->bits]->given;
  });
  return mine.taken;
}

inline uint32_t __ballot_sync(uint32_t, bool vote) {
  struct Lane {
    bool vote;
    uint32_t votes;
  } mine{vote, 0};
  fibers::together("ballot", mine, [](Lane** lane) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i) votes |= uint32_t(lane[i]->vote) << i;
    for (int i = 0; i < 32; ++i) lane[i]->votes = votes;
  });
  return mine.votes;
}

// Lane 4 g + t receives elements 2t and 2t + 1 of row g of each matrix, or of column g.
inline void read_matrices(uint32_t (&x)[4], const void* row, bool transposed) {
  struct Lane {
    const uint16_t* row;
    uint32_t x[4];
    bool transposed;
  } mine{static_cast<const uint16_t*>(row), {0, 0, 0, 0}, transposed};
  if (uintptr_t(row) % 16) throw fibers::Error("ldmatrix: a row is not aligned");
  fibers::together(transposed ? "ldmatrix.trans" : "ldmatrix", mine, [](Lane** lane) {
    for (int m = 0; m < 4; ++m)
      for (int i = 0; i < 32; ++i) {
        const int g = i / 4, t = i % 4;
        const auto element = [&](int r, int c) { return uint32_t(lane[8 * m + r]->row[c]); };
        lane[i]->x[m] = lane[i]->transposed
                            ? element(2 * t, g) | element(2 * t + 1, g) << 16
                            : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
      }
  });
  memcpy(x, mine.x, sizeof x);
}
inline void load_matrices(uint32_t (&x)[4], const void* row) { read_matrices(x, row, false); }
inline void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  read_matrices(x, row, true);
}

inline float toward_zero(double x) {
  const float nearest = float(x);
  return std::fabs(double(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Fragments {
  float* c;
  const uint32_t *a, *b;
};

// c (16 x 8) += a (16 x K) b (K x 8) of one warp, from rows and columns of floats. As hardware does
// it (Fasi et al., 2021): the addends are aligned to the largest of them and cut off, here one bit
// behind those of a float where chips keep two or more, and so is the sum.
template <int K>
void accumulate(Fragments** lane, const float (&a)[16][K], const float (&b)[8][K]) {
  for (int i = 0; i < 32; ++i)
    for (int e = 0; e < 4; ++e) {
      const int row = i / 4 + e / 2 * 8, column = i % 4 * 2 + e % 2;
      double addends[K + 1], largest = 0, sum = 0;
      for (int k = 0; k < K; ++k) addends[k] = double(a[row][k]) * b[column][k];
      addends[K] = lane[i]->c[e];
      for (const double x : addends) largest = std::fmax(largest, std::fabs(x));
      if (largest > 0 && std::isfinite(largest)) {
        const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
        for (const double x : addends) sum += std::trunc(x / unit) * unit;
      } else {
        for (const double x : addends) sum += x;
      }
      lane[i]->c[e] = toward_zero(sum);
    }
}

template <typename T>
void mma_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  const uint32_t b[2] = {b0, b1};
  Fragments mine{c, a, b};
  fibers::together("mma", mine, [](Fragments** lane) {
    const auto part = [](uint32_t word, int k) {
      T x;
      x.bits = uint16_t(k & 1 ? word >> 16 : word);
      return to_acc(x);
    };
    float x[16][16], y[8][16];
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, upper = k / 8;
      for (int i = 0; i < 16; ++i)
        x[i][k] = part(lane[i % 8 * 4 + t]->a[i / 8 + 2 * upper], k);
      for (int n = 0; n < 8; ++n) y[n][k] = part(lane[n * 4 + t]->b[upper], k);
    }
    accumulate<16>(lane, x, y);
  });
}

template <typename T>
void mma_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b, T) {
  const uint32_t a[4] = {a0, a1, 0, 0};
  mma_16(c, a, b, 0, T{});
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  Fragments mine{c, a, b};
  fibers::together("mma.tf32", mine, [](Fragments** lane) {
    const auto read = [](uint32_t word) { return bits_float(word & 0xffffe000u); };
    float x[16][8], y[8][8];
    for (int k = 0; k < 8; ++k) {
      for (int i = 0; i < 16; ++i) x[i][k] = read(lane[i % 8 * 4 + k % 4]->a[i / 8 + k / 4 * 2]);
      for (int n = 0; n < 8; ++n) y[n][k] = read(lane[n * 4 + k % 4]->b[k / 4]);
    }
    accumulate<8>(lane, x, y);
  });
}

inline void mma_double(double& c0, double& c1, double a, double b) {
  struct Lane {
    double a, b, c0, c1;
  } mine{a, b, c0, c1};
  fibers::together("mma", mine, [](Lane** lane) {
    for (int i = 0; i < 32; ++i)
      for (int k = 0; k < 4; ++k) {
        const double left = lane[i / 4 * 4 + k]->a;
        lane[i]->c0 += left * lane[i % 4 * 2 * 4 + k]->b;
        lane[i]->c1 += left * lane[(i % 4 * 2 + 1) * 4 + k]->b;
      }
  });
  c0 = mine.c0;
  c1 = mine.c1;
}

// ---- launch ------------------------------------------------------------------------------------

// A launch that was noted instead of run, for the PTX simulator.
struct Launch {
  std::string kernel;
  int64_t blocks;
  int threads, bytes;
  KernelParams params;
};
inline std::vector<Launch> launches;
inline bool only_note = false;

template <void (*KERNEL)(KernelParams), typename Plan>
int launch(int64_t groups, const KernelParams& p, void*) {
  const int64_t blocks = (groups + Plan::GROUPS - 1) / Plan::GROUPS;
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX) return 9;  // cudaErrorInvalidConfiguration
  if (only_note) {
    launches.push_back({__PRETTY_FUNCTION__, blocks, Plan::THREADS, Plan::BYTES, p});
    return 0;
  }
  fibers::launch(blocks, Plan::THREADS, Plan::BYTES, [&p] { KERNEL(p); });
  return 0;
}

}  // namespace attnpool

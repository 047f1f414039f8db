// What one warp can do: types, conversions, copies to shared memory, barriers, matrix products.
// Every inline assembly statement of the kernels is one small function of this file, and nothing
// else touches the hardware, so the host test replaces this layer (tests/tools/host/host_shim.h, included
// first and defining ATTN_HOST_SHIM) and runs the kernels themselves on a CPU.
//
// Fragments follow the PTX manual: lane = 4 g + t holds, of a 16 x 8 accumulator, the elements
// (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once

#include "kernel_params.h"
#include "once_per_device.h"

#ifndef ATTN_HOST_SHIM
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ATTN_KERNEL __global__ void
#define ATTN_BOUNDS(...) __launch_bounds__(__VA_ARGS__, 1)
#define ATTN_BLOCKS_OF_SM(threads, blocks) __launch_bounds__(threads, blocks)
#define ATTN_GRID_CONSTANT const __grid_constant__
#define ATTN_DEVICE __device__ __forceinline__
#define ATTN_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define ATTN_UNROLL _Pragma("unroll")
#define ATTN_UNROLL_TWO _Pragma("unroll 2")
#define ATTN_ROLLED _Pragma("unroll 1")
#define ATTN_PRAGMA(text) _Pragma(#text)
#define ATTN_UNROLL_BY(copies) ATTN_PRAGMA(unroll copies)

namespace attnpool {

// Ends the launch with an error that the next call into CUDA reports.
ATTN_DEVICE void stop() { asm volatile("trap;"); }

using Half = __half;
using Bfloat16 = __nv_bfloat16;

ATTN_DEVICE float to_acc(Half x) { return __half2float(x); }
ATTN_DEVICE float to_acc(Bfloat16 x) { return __bfloat162float(x); }
ATTN_DEVICE void from_acc(float x, Half& out) { out = __float2half_rn(x); }
ATTN_DEVICE void from_acc(float x, Bfloat16& out) { out = __float2bfloat16_rn(x); }

ATTN_DEVICE uint32_t pack(float low, float high, Half) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
ATTN_DEVICE uint32_t pack(float low, float high, Bfloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// exp to 2 units in the last place of a half type, and to those of float and double.
ATTN_DEVICE float exp_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}

// 2^x, log2 x and 1 / x to 2 units in the last place of a float; tiny results are 0.
ATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTN_DEVICE float log2_fast(float x) {  // to 2^-22, absolute between 1/2 and 2
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTN_DEVICE float inverse_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// BYTES (4, 8 or 16) from or to global memory, in words; aligned to BYTES. What is read is written
// by nobody while the kernel runs.
template <int BYTES>
ATTN_DEVICE void load_words(uint32_t* x, const void* from) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  if constexpr (BYTES == 16)
    asm("ld.global.nc.v4.b32 {%0,%1,%2,%3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
        : "l"(from));
  else if constexpr (BYTES == 8)
    asm("ld.global.nc.v2.b32 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(from));
  else asm("ld.global.nc.b32 %0, [%1];" : "=r"(x[0]) : "l"(from));
}
template <int BYTES>
ATTN_DEVICE void store_words(void* to, const uint32_t* x) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  if constexpr (BYTES == 16) *static_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
  else if constexpr (BYTES == 8) *static_cast<uint2*>(to) = make_uint2(x[0], x[1]);
  else *static_cast<uint32_t*>(to) = x[0];
}

// The lower halves of two words side by side, or the upper ones.
ATTN_DEVICE uint32_t lower_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
ATTN_DEVICE uint32_t upper_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

// Barrier of the `threads` threads of one group; groups of a block use different numbers, 1 or 2.
// A number in a register would claim all 16 barriers of the block, and 64 is all that an SM has.
ATTN_DEVICE void group_barrier(int number, int threads) {
  if (number == 1) asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
  else asm volatile("bar.sync 2, %0;" ::"r"(threads) : "memory");
}

// What lanes of a warp write to shared memory before it, the others read after it.
ATTN_DEVICE void warp_barrier() { __syncwarp(); }

// 16 bytes from global to shared memory, or 16 zero bytes; done at the wait. Both 16-byte aligned.
ATTN_DEVICE void copy_async(void* shared, const void* global, bool wanted) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}
ATTN_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
ATTN_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lanes 8 i ... 8 i + 7 give the rows of matrix i.
ATTN_DEVICE void load_matrices(uint32_t (&x)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}
ATTN_DEVICE void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8)
ATTN_DEVICE void mma_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ATTN_DEVICE void mma_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        Bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16 x 8) += a (16 x 8) b (8 x 8): a holds (g, 2t) and (g, 2t + 1) in one word, (g + 8, ..) in the
// other, b holds (2t, g) and (2t + 1, g).
ATTN_DEVICE void mma_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b, Half) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
ATTN_DEVICE void mma_8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b, Bfloat16) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// c (16 x 8) += a (16 x 8) b (8 x 8) of floats, of which the tensor core reads the upper 19 bits: a
// holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4) and b holds (t, g), (t + 4, g).
ATTN_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (8 x 8) += a (8 x 4) b (4 x 8); lane 4 g + t holds a (g, t), b (t, g), c (g, 2t), (g, 2t + 1)
ATTN_DEVICE void mma_double(double& c0, double& c1, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
      : "+d"(c0), "+d"(c1)
      : "d"(a), "d"(b));
}

// Allows a kernel more than 48 KiB of shared memory on the current device.
template <void (*KERNEL)(KernelParams)>
int allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> allowed{0};
  int device = 0;
  const int status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return once_per_device(
      allowed, device,
      [&] {
        return cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      },
      [] { cudaGetLastError(); });
}

// Runs a kernel for so many groups of warps; returns 0 or a cudaError_t.
template <void (*KERNEL)(KernelParams), typename Plan>
int launch(int64_t groups, const KernelParams& p, void* stream) {
  static_assert(Plan::GROUPS <= 2, "group_barrier has two numbers");
  const int64_t blocks = (groups + Plan::GROUPS - 1) / Plan::GROUPS;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (Plan::BYTES > (48 << 10)) {
    const int status = allow_shared_memory<KERNEL>(Plan::BYTES);
    if (status != cudaSuccess) return status;
  }
  KERNEL<<<static_cast<unsigned>(blocks), Plan::THREADS, Plan::BYTES,
           static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

ATTN_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
ATTN_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
ATTN_DEVICE int lowest_zero(uint32_t x) { return __ffs(static_cast<int>(~x)) - 1; }

}  // namespace attnpool
#endif  // ATTN_HOST_SHIM

namespace attnpool {

constexpr uint32_t WARP = 0xffffffffu;

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulator<T>::type;

template <typename T>
constexpr bool IS_HALF = sizeof(T) == 2;

ATTN_DEVICE float to_acc(float x) { return x; }
ATTN_DEVICE double to_acc(double x) { return x; }
ATTN_DEVICE void from_acc(float x, float& out) { out = x; }
ATTN_DEVICE void from_acc(double x, double& out) { out = x; }

template <typename T>
ATTN_DEVICE Acc<T> exponential(Acc<T> x) {
  if constexpr (IS_HALF<T>) return exp_fast(x);
  else if constexpr (sizeof(T) == 4) return expf(x);
  else return exp(x);
}

ATTN_DEVICE float natural_log(float x) { return logf(x); }
ATTN_DEVICE double natural_log(double x) { return log(x); }

ATTN_DEVICE int lane_index() { return static_cast<int>(threadIdx.x % 32); }

// Over the four lanes that share rows g and g + 8, always in the same order.
template <typename A>
ATTN_DEVICE A quad_sum(A x) {
  x += __shfl_xor_sync(WARP, x, 1);
  return x + __shfl_xor_sync(WARP, x, 2);
}
template <typename A>
ATTN_DEVICE A quad_max(A x) {
  A other = __shfl_xor_sync(WARP, x, 1);
  x = other > x ? other : x;
  other = __shfl_xor_sync(WARP, x, 2);
  return other > x ? other : x;
}

// sum += x, where lost gathers what rounding takes from sum (Knuth's two-sum): however many x are
// added, whole_sum is as exact as one addition. double has digits enough without.
template <typename A>
ATTN_DEVICE void add_exactly(A& sum, A& lost, A x) {
  if constexpr (sizeof(A) == 8) {
    sum += x;
    return;
  }
  const A next = sum + x, part = next - sum;
  lost += (sum - (next - part)) + (x - part);
  sum = next;
}
// A sum that is not finite has lost nothing but NaN.
template <typename A>
ATTN_DEVICE A whole_sum(A sum, A lost) {
  return lost == lost ? sum + lost : sum;
}

// Two floats as three pairs of bfloat16 whose sums are the floats: 3 x 8 bits are all 24. The first
// parts are cut off, not rounded, so that the largest floats do not become infinite. Those of an
// infinity are itself and NaN, see mma_16.
struct Split {
  uint32_t part[3];
  ATTN_DEVICE Split() {}
  ATTN_DEVICE Split(float low, float high) {
    part[0] = float_bits(low) >> 16 | (float_bits(high) & 0xffff0000u);
    ATTN_UNROLL
    for (int i = 1; i < 3; ++i) {
      low -= bits_float(part[i - 1] << 16);
      high -= bits_float(part[i - 1] & 0xffff0000u);
      part[i] = pack(low, high, Bfloat16{});
    }
  }
};

// c (16 x 8) += a (16 x 16) b (16 x 8) with float32 accuracy: eight of the nine products of parts,
// the smallest first; the ninth is 2^-32 of a product. 1 * x is exact. Three TF32 products, the
// usual way, take 3/4 of the time but lose the last bit of both operands. Tensor cores truncate
// their sums, so the large product stands alone and joins by additions that round to nearest (after
// Ootomo and Yokota, 2022).
// SWAPPED: the roles of a and b are exchanged, the bits of the result are not.
template <bool SWAPPED>
ATTN_DEVICE void mma_16(float (&c)[4], const Split (&a)[4], const Split (&b)[2]) {
  float small[4] = {0, 0, 0, 0}, large[4] = {0, 0, 0, 0};
  const auto add = [&](float(&sum)[4], int i, int j) {
    const uint32_t x[4] = {a[0].part[i], a[1].part[i], a[2].part[i], a[3].part[i]};
    mma_16(sum, x, b[0].part[j], b[1].part[j], Bfloat16{});
  };
  constexpr int I = SWAPPED ? 0 : 1, J = 1 - I;  // the part of a that comes first, and of b
  add(small, 1 + I, 1 + J);
  add(small, 1 + J, 1 + I);
  add(small, 2 * I, 2 * J);
  add(small, 1, 1);
  add(small, 2 * J, 2 * I);
  add(small, I, J);
  add(small, J, I);
  add(large, 0, 0);
  // Where an operand is infinite, the large product says all, and the small ones are NaN.
  ATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const bool finite = large[i] - large[i] == 0;
    c[i] += large[i] + (finite ? small[i] : 0);
  }
}

// c (16 x 8) += a (16 x 8) b (8 x 8): a holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4) and
// b holds (t, g), (t + 4, g).
ATTN_DEVICE void mma_8(double (&c)[4], const double (&a)[4], double b0, double b1) {
  mma_double(c[0], c[1], a[0], b0);
  mma_double(c[2], c[3], a[1], b0);
  mma_double(c[0], c[1], a[2], b1);
  mma_double(c[2], c[3], a[3], b1);
}

}  // namespace attnpool

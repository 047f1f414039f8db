// Vectors of the width this file is compiled for, on GCC's and clang's vector extensions: the same
// source serves AVX-512, AVX2, and 128-bit vectors of any other machine. Everything in cpu/ that
// depends on the width lives in namespace ATTN_ISA, so that code for different machines never meets
// at link time; for the same reason these files use no standard library.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, inside its own AVX-512 header
#endif
#include <immintrin.h>
#endif

#include "../params.h"

#ifndef ATTN_ISA
#define ATTN_ISA baseline
#endif

namespace attnpool {
namespace ATTN_ISA {

#if defined(ATTN_VECTOR_BYTES)  // for tests: wider than the machine's, which the compiler splits
constexpr int VECTOR_BYTES = ATTN_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

#define ATTN_INLINE inline __attribute__((always_inline))

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
  using Bit = uint32_t;
  static constexpr int MANTISSA = 23, BIAS = 127;
  static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  static constexpr float ROUND = 12582912.f;  // 1.5 * 2^23
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Integers __attribute__((vector_size(VECTOR_BYTES)));
  using Bit = uint64_t;
  static constexpr int MANTISSA = 52, BIAS = 1023;
  static constexpr double LN2_HIGH = 6.93145751953125e-1, LN2_LOW = 1.42860682030941723212e-6;
  static constexpr double ROUND = 6755399441055744.;  // 1.5 * 2^52
};

template <typename T>
using Vector = typename Lanes<T>::Vector;
template <typename T>
constexpr int WIDTH = VECTOR_BYTES / sizeof(T);

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
template <typename T>
constexpr int64_t whole_vectors(int64_t count) {
  return blocks_of(count, WIDTH<T>) * WIDTH<T>;
}

template <typename T>
ATTN_INLINE Vector<T> load(const T* from) {
  Vector<T> x;
  memcpy(&x, from, sizeof(x));
  return x;
}

template <typename T>
ATTN_INLINE void store(T* to, Vector<T> x) {
  memcpy(to, &x, sizeof(x));
}

// Stores past the caches, to an aligned place; publish_streams() shows that to other threads.
template <typename T>
ATTN_INLINE void stream(T* to, Vector<T> x) {
#if defined(__clang__)
  __builtin_nontemporal_store(x, reinterpret_cast<Vector<T>*>(to));
#elif defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)x);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)x);
#elif defined(__x86_64__) && !defined(ATTN_VECTOR_BYTES)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)x);
#else
  store(to, x);
#endif
}
ATTN_INLINE void publish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename T>
ATTN_INLINE Vector<T> splat(T x) {
  return x - Vector<T>{};  // x - 0 is x for every x, unlike x + 0
}

// The larger lanes of a and b; b where a is NaN.
ATTN_INLINE Vector<float> larger_lanes(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
ATTN_INLINE Vector<double> larger_lanes(Vector<double> a, Vector<double> b) {
  return a > b ? a : b;
}

template <typename T>
ATTN_INLINE bool any_zero(Vector<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask((__m512)x, __m512{}, _CMP_EQ_OQ) != 0;
#endif
  bool any = false;
  for (int i = 0; i < WIDTH<T>; ++i) any |= x[i] == 0;
  return any;
}

// Over the lanes of a vector, in halves.
template <typename T>
ATTN_INLINE T sum_of_lanes(Vector<T> x) {
  T lanes[WIDTH<T>];
  memcpy(lanes, &x, sizeof(x));
#pragma GCC unroll 8
  for (int half = WIDTH<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
template <typename T>
ATTN_INLINE T largest_lane(Vector<T> x) {
  T largest = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < WIDTH<T>; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

// x to the nearest whole number, or within a few of it from 2^22 (float) on.
template <typename T>
ATTN_INLINE Vector<T> nearest_whole(Vector<T> x) {
  return (x + Lanes<T>::ROUND) - Lanes<T>::ROUND;
}

// sum += x, where lost gathers what rounding takes from sum (Knuth's two-sum): however many x are
// added, sum + lost is as exact as one addition.
template <typename T>
ATTN_INLINE void add_exactly(Vector<T>& sum, Vector<T>& lost, Vector<T> x) {
  const Vector<T> next = sum + x, part = next - sum;
  lost += (sum - (next - part)) + (x - part);
  sum = next;
}

// sum + lost; a sum that is not finite has lost nothing but NaN.
template <typename T>
ATTN_INLINE Vector<T> whole_sum(Vector<T> sum, Vector<T> lost) {
  return sum + (lost == lost ? lost : Vector<T>{});
}

// Logits are kept in units of log 2, so that a weight is a power of 2.
constexpr double LOG2_E = 1.44269504088896340736, LN_2 = 0.69314718055994530942;

// 2^f - 1 over f: minimax (relative) on [0, 1), and on [-1/2, 1/2]; Taylor for double.
constexpr float EXP2_ABOVE[] = {6.931470633e-1f, 2.402293086e-1f, 5.548528209e-2f,
                                9.675451554e-3f, 1.246784464e-3f, 2.161292120e-4f};
constexpr float EXP2_AROUND[] = {6.931471825e-1f, 2.402264774e-1f, 5.550332367e-2f,
                                 9.618436918e-3f, 1.339887502e-3f, 1.535336195e-4f};
constexpr double EXP2_TAYLOR[] = {
    6.9314718055994530942e-1,  2.4022650695910071233e-1,  5.5504108664821579953e-2,
    9.6181291076284771620e-3,  1.3333558146428443423e-3,  1.5403530393381609954e-4,
    1.5252733804059840280e-5,  1.3215486790144309488e-6,  1.0178086009239699728e-7,
    7.0549116208011233299e-9,  4.4455382718708114976e-10, 2.5678435993488205141e-11,
    1.3691488853904128881e-12, 6.7787263548225456335e-14};

template <int N, typename T>
ATTN_INLINE Vector<T> one_plus(Vector<T> f, const T (&c)[N]) {
  Vector<T> p = splat(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) p = p * f + c[i];
  return p * f + T(1);
}

// 2^x for x up to about 1; exactly 1 for 0, 0 below the smallest normal number, NaN for NaN.
// Relative error about 1e-7 (float), 2e-16 (double). REST: of x + rest, with a rest below 1e-5.
template <typename T, bool REST = false>
ATTN_INLINE Vector<T> exp2(Vector<T> x, Vector<T> rest = Vector<T>{}) {
  using L = Lanes<T>;
  using Bits = typename L::Bits;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 all = (__m512)x;
    const __mmask16 normal = _mm512_cmp_ps_mask(all, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    Vector<T> f = (Vector<T>)_mm512_maskz_reduce_ps(normal, all, _MM_FROUND_TO_NEG_INF |
                                                                     _MM_FROUND_NO_EXC);
    if (REST) f += rest;
    return (Vector<T>)_mm512_maskz_scalef_ps(normal, (__m512)one_plus(f, EXP2_ABOVE), all);
  }
#endif
  const Vector<T> shifted = x + L::ROUND;
  Vector<T> f = x - (shifted - L::ROUND);
  if (REST) f += rest;
  Vector<T> p;
  if constexpr (sizeof(T) == 4) p = one_plus(f, EXP2_AROUND);
  else p = one_plus(f, EXP2_TAYLOR);
  const Bits power = ((Bits)shifted << L::MANTISSA) +
                     (typename L::Bit(L::BIAS) << L::MANTISSA);
  return x < T(1 - L::BIAS) ? Vector<T>{} : p * (Vector<T>)power;
}

// log(x), -inf for 0, x for NaN. x = 2^e m with m in [sqrt(1/2), sqrt(2)),
// log m = 2 (f + f^3/3 + f^5/5 ...) with f = (m - 1)/(m + 1).
template <typename T>
ATTN_INLINE Vector<T> log(Vector<T> x) {
  using L = Lanes<T>;
  using Bits = typename L::Bits;
  using Integers = typename L::Integers;
  constexpr T SQRT_HALF = T(0.70710678118654752440);
  typename L::Bit half_bits;
  memcpy(&half_bits, &SQRT_HALF, sizeof(T));
  const Bits bits = (Bits)x;
  const Integers e = (Integers)(bits - half_bits) >> L::MANTISSA;
  const Bits m_bits = bits - ((Bits)e << L::MANTISSA);
  const Vector<T> m = (Vector<T>)m_bits;
  const Vector<T> f = (m - T(1)) / (m + T(1)), s = f * f;
  constexpr int TERMS = sizeof(T) == 4 ? 5 : 11;
  Vector<T> p = splat(T(1) / (2 * TERMS + 1));
  for (int i = TERMS - 1; i >= 1; --i) p = p * s + T(1) / (2 * i + 1);
  const Vector<T> n = __builtin_convertvector(e, Vector<T>);
  const Vector<T> y = n * L::LN2_HIGH + (n * L::LN2_LOW + (f + f) * (p * s + T(1)));
  const Vector<T> infinity = splat(T(__builtin_inf()));
  return x > T(0) ? y : (x == T(0) ? -infinity : x);
}

// Half types: bits only, converted to float on the way in and rounded to nearest even on the way
// out.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

ATTN_INLINE float to_float(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

ATTN_INLINE Bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

ATTN_INLINE float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = (rest << 13) + 0x70000000u;  // inf, NaN
  } else if (rest >= 0x0400u) {
    bits = (rest << 13) + 0x38000000u;
  } else {
    const float tiny = float(rest) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &tiny, 4);
  }
  bits |= sign;
  float y;
  memcpy(&y, &bits, 4);
  return y;
#endif
}

ATTN_INLINE Half to_half(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, 0))};
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded bits at the end
    float shifted;
    memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    memcpy(&bits, &shifted, 4);
    return {uint16_t(sign | (bits - 0x3f000000u))};
  }
  return {uint16_t(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13))};
#endif
}

// One vector of T from WIDTH<T> elements of the stored type, and back.
ATTN_INLINE Vector<float> load_as(const float* from) { return load(from); }
ATTN_INLINE Vector<double> load_as(const double* from) { return load(from); }
ATTN_INLINE Vector<float> load_as(const Bfloat16* from) {
  typedef uint16_t Short __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint32_t Word __attribute__((vector_size(VECTOR_BYTES)));
  Short x;
  memcpy(&x, from, sizeof(x));
  const Word bits = __builtin_convertvector(x, Word) << 16;
  return (Vector<float>)bits;
}
ATTN_INLINE Vector<float> load_as(const Half* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  float x[WIDTH<float>];
  for (int i = 0; i < WIDTH<float>; ++i) x[i] = to_float(from[i]);
  return load(x);
#endif
}

ATTN_INLINE void store_as(float* to, Vector<float> x) { store(to, x); }
ATTN_INLINE void store_as(double* to, Vector<double> x) { store(to, x); }
ATTN_INLINE void store_as(Bfloat16* to, Vector<float> x) {
  typedef uint16_t Short __attribute__((vector_size(VECTOR_BYTES / 2)));
  using Bits = Lanes<float>::Bits;
  const Bits bits = (Bits)x, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits nan = (Bits)((bits & 0x7fffffffu) > 0x7f800000u);
  const Short y = __builtin_convertvector(((rounded & ~nan) | (nan & 0x7fc00000u)) >> 16, Short);
  memcpy(to, &y, sizeof(y));
}
ATTN_INLINE void store_as(Half* to, Vector<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_maskz_cvtps_ph(0xffff, (__m512)x, 0));
#elif defined(__AVX2__) && defined(__F16C__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, 0));
#else
  float y[WIDTH<float>];
  store(y, x);
  for (int i = 0; i < WIDTH<float>; ++i) to[i] = to_half(y[i]);
#endif
}

// to[c * to_stride + r] = row(r)[c] for WIDTH x WIDTH elements.
template <typename T, typename Row>
ATTN_INLINE void transpose(Row row, T* to, int64_t to_stride) {
  constexpr int W = WIDTH<T>;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    // Inside quarters first: quarter q of y[r + c] has column 4 q + c of rows r ... r + 3.
    __m512 y[16];
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
      const __m512 x0 = (__m512)load(row(r)), x1 = (__m512)load(row(r + 1));
      const __m512 x2 = (__m512)load(row(r + 2)), x3 = (__m512)load(row(r + 3));
      const __m512 a = _mm512_unpacklo_ps(x0, x1), b = _mm512_unpackhi_ps(x0, x1);
      const __m512 d = _mm512_unpacklo_ps(x2, x3), e = _mm512_unpackhi_ps(x2, x3);
      y[r] = _mm512_shuffle_ps(a, d, 0x44);
      y[r + 1] = _mm512_shuffle_ps(a, d, 0xee);
      y[r + 2] = _mm512_shuffle_ps(b, e, 0x44);
      y[r + 3] = _mm512_shuffle_ps(b, e, 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {  // even quarters of all rows, odd ones, and these apart
      const __m512 a = _mm512_shuffle_f32x4(y[c], y[4 + c], 0x88);
      const __m512 b = _mm512_shuffle_f32x4(y[c], y[4 + c], 0xdd);
      const __m512 d = _mm512_shuffle_f32x4(y[8 + c], y[12 + c], 0x88);
      const __m512 e = _mm512_shuffle_f32x4(y[8 + c], y[12 + c], 0xdd);
      store(to + c * to_stride, (Vector<T>)_mm512_shuffle_f32x4(a, d, 0x88));
      store(to + (4 + c) * to_stride, (Vector<T>)_mm512_shuffle_f32x4(b, e, 0x88));
      store(to + (8 + c) * to_stride, (Vector<T>)_mm512_shuffle_f32x4(a, d, 0xdd));
      store(to + (12 + c) * to_stride, (Vector<T>)_mm512_shuffle_f32x4(b, e, 0xdd));
    }
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {  // halves of rows are gathered by the loads
#pragma GCC unroll 2
    for (int c = 0; c < W; c += 4) {
      __m256 x[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const __m256 half = _mm256_castps128_ps256(_mm_loadu_ps(row(r) + c));
        x[r] = _mm256_insertf128_ps(half, _mm_loadu_ps(row(r + 4) + c), 1);
      }
      const __m256 a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
      const __m256 d = _mm256_unpacklo_ps(x[2], x[3]), e = _mm256_unpackhi_ps(x[2], x[3]);
      store(to + c * to_stride, (Vector<T>)_mm256_shuffle_ps(a, d, 0x44));
      store(to + (c + 1) * to_stride, (Vector<T>)_mm256_shuffle_ps(a, d, 0xee));
      store(to + (c + 2) * to_stride, (Vector<T>)_mm256_shuffle_ps(b, e, 0x44));
      store(to + (c + 3) * to_stride, (Vector<T>)_mm256_shuffle_ps(b, e, 0xee));
    }
    return;
  }
#endif
  for (int r = 0; r < W; ++r)
    for (int c = 0; c < W; ++c) to[c * to_stride + r] = row(r)[c];
}

}  // namespace ATTN_ISA
}  // namespace attnpool

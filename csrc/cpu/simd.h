// Vectors of the width this file is compiled for, on GCC's and clang's vector extensions: the same
// source serves AVX-512, AVX2, and 128-bit vectors of any other machine. Everything in cpu/ that
// depends on the width lives in namespace ATTN_ISA, so that code for different machines never meets
// at link time; for the same reason these files use no standard library.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../params.h"

#ifndef ATTN_ISA
#define ATTN_ISA baseline
#endif

namespace attnpool {
namespace ATTN_ISA {

#if defined(__AVX512F__)
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
  typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
  using Integer = int32_t;
  static constexpr int MANTISSA = 23, BIAS = 127;
  static constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  static constexpr float ROUND = 12582912.f;        // 1.5 * 2^23
  static constexpr float EXP_LOWEST = -87.33f;      // below it exp is 0 here
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Integers __attribute__((vector_size(VECTOR_BYTES)));
  using Integer = int64_t;
  static constexpr int MANTISSA = 52, BIAS = 1023;
  static constexpr double LN2_HIGH = 6.93145751953125e-1, LN2_LOW = 1.42860682030941723212e-6;
  static constexpr double ROUND = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double EXP_LOWEST = -708.39;
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

template <typename T>
ATTN_INLINE Vector<T> splat(T x) {
  return x - Vector<T>{};  // x - 0 is x for every x, unlike x + 0
}

template <typename T, typename V = Vector<T>>
ATTN_INLINE V larger_lanes(V a, V b) {
  return a > b ? a : b;
}

// exp(x) for x <= 88 (float) or 709 (double), about 1 ulp; 0 below the smallest normal number,
// NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2; polynomial in r (Cephes; Taylor for double).
template <typename T>
ATTN_INLINE Vector<T> exp(Vector<T> x) {
  using L = Lanes<T>;
  using Integers = typename L::Integers;
  const Vector<T> shifted = x * T(1.44269504088896340736) + L::ROUND;
  const Vector<T> n = shifted - L::ROUND;
  const Vector<T> r = (x - n * L::LN2_HIGH) - n * L::LN2_LOW;
  Vector<T> p;
  if constexpr (sizeof(T) == 4) {
    p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.f);
  } else {
    p = r * T(1 / 6227020800.) + T(1 / 479001600.);
    p = p * r + T(1 / 39916800.);
    p = p * r + T(1 / 3628800.);
    p = p * r + T(1 / 362880.);
    p = p * r + T(1 / 40320.);
    p = p * r + T(1 / 5040.);
    p = p * r + T(1 / 720.);
    p = p * r + T(1 / 120.);
    p = p * r + T(1 / 24.);
    p = p * r + T(1 / 6.);
    p = p * r + T(0.5);
    p = p * (r * r) + (r + T(1));
  }
  const Integers bits = ((Integers)shifted << L::MANTISSA) +
                        (typename L::Integer(L::BIAS) << L::MANTISSA);
  const Vector<T> y = p * (Vector<T>)bits;
  return x < L::EXP_LOWEST ? Vector<T>{} : y;
}

// log(x), -inf for 0, x for NaN. x = 2^e m with m in [sqrt(1/2), sqrt(2)),
// log m = 2 (f + f^3/3 + f^5/5 ...) with f = (m - 1)/(m + 1).
template <typename T>
ATTN_INLINE Vector<T> log(Vector<T> x) {
  using L = Lanes<T>;
  using Integers = typename L::Integers;
  using Integer = typename L::Integer;
  constexpr T SQRT_HALF = T(0.70710678118654752440);
  Integer half_bits;
  memcpy(&half_bits, &SQRT_HALF, sizeof(T));
  const Integers bits = (Integers)x;
  const Integers e = (bits - half_bits) >> L::MANTISSA;
  const Integers m_bits = bits - (e << L::MANTISSA);
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
struct BFloat16 {
  uint16_t bits;
};

ATTN_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

ATTN_INLINE BFloat16 to_bfloat16(float x) {
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
ATTN_INLINE Vector<float> load_as(const BFloat16* from) {
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
ATTN_INLINE void store_as(BFloat16* to, Vector<float> x) {
  float y[WIDTH<float>];
  store(y, x);
  for (int i = 0; i < WIDTH<float>; ++i) to[i] = to_bfloat16(y[i]);
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

// Transposes WIDTH x WIDTH elements in registers.
template <typename T>
ATTN_INLINE void transpose(Vector<T> (&x)[WIDTH<T>]) {
  using Integers = typename Lanes<T>::Integers;
  constexpr int W = WIDTH<T>;
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    Integers low, high;
#pragma GCC unroll 16
    for (int lane = 0; lane < W; ++lane) {
      low[lane] = lane & step ? W + lane - step : lane;
      high[lane] = lane & step ? W + lane : lane + step;
    }
#pragma GCC unroll 16
    for (int row = 0; row < W; ++row) {
      if (row & step) continue;
      const Vector<T> a = x[row], b = x[row + step];
      x[row] = __builtin_shuffle(a, b, low);
      x[row + step] = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace ATTN_ISA
}  // namespace attnpool

/* Vector functions that several kernels use. */

#ifndef ATLAS_VECTORS_H
#define ATLAS_VECTORS_H

#include <immintrin.h>
#include <stdint.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")

/* Lanes of the vector at `i` that lie before `end`. */
static inline __mmask16 lanes(int64_t i, int64_t end) { return end - i >= 16 ? 0xffff : (__mmask16)((1u << (end - i)) - 1); }

/* A row of a vocabulary's scores is cut into strips of fixed length whose results are put together in order, so that they do
   not depend on the threads. */
enum { STRIP = 4096 };

static inline int64_t strips_of(int64_t vocab) { return (vocab + STRIP - 1) / STRIP; }

static inline int64_t strip_end(int64_t vocab, int64_t first) { return first + STRIP < vocab ? first + STRIP : vocab; }

/* Adds to every 32-bit lane of `sum` its four products of unsigned with signed bytes. GCC 12 copies the sum before and after
   its own intrinsic, and runs out of registers: 16 sums then wait for memory (gate and up of 64 terms, bytes, one core: 1.1 ms
   with the intrinsic, 0.8 without). */
static inline __attribute__((always_inline)) void add_dots(__m512i *sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

/* Sums of the 16 lanes of 16 vectors, as one vector. */
static inline __m512i lane_sums(const __m512i v[16]) {
  __m512i a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    b[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    c[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0x88),
                            _mm512_shuffle_i32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(c[0], c[1], 0x88), _mm512_shuffle_i32x4(c[0], c[1], 0xdd));
}

/* Rows and columns of a 16 × 16 matrix exchanged. */
static inline __attribute__((always_inline)) void transpose(__m512i v[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512i low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), high = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    __m512i low2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88), high2 = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    v[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    v[4 + i] = _mm512_shuffle_i32x4(high, high2, 0x88);
    v[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
}

/* max |x|, and at least 1e-30. */
static inline float peak_of(const float *x, int64_t count) {
  __m512 peak = _mm512_set1_ps(1e-30f), odd = peak; /* two, which do not wait for one another */
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    peak = _mm512_max_ps(peak, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    odd = _mm512_max_ps(odd, _mm512_abs_ps(_mm512_loadu_ps(x + i + 16)));
  }
  if (i < count) peak = _mm512_max_ps(peak, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  return _mm512_reduce_max_ps(_mm512_max_ps(peak, odd));
}

/* Rounds x to one int8 term; returns its unit. */
static inline float round_term(const float *x, int64_t count, int8_t *term) {
  const float peak = peak_of(x, count);
  const __m512 inverse = _mm512_set1_ps(127.0f / peak);
  for (int64_t i = 0; i < count; i += 16) {
    __m512 units = _mm512_mul_ps(_mm512_loadu_ps(x + i), inverse);
    _mm_storeu_si128((__m128i *)(term + i), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(units)));
  }
  return peak * (1.0f / 127.0f);
}

/* The unit of the whole numbers, 256 · high + low, that x is rounded to (`split_rows` in Python), and what x is multiplied by
   to have it in units. */
typedef struct {
  float unit, inverse;
} Unit;

/* Largest whole number: sums of them times weights stay in 32 bits, and upper terms in 8. */
static inline int32_t largest_of(int64_t count) {
  const int64_t fits = INT32_MAX / (128 * count);
  return fits < 127 * 256 ? (int32_t)fits : 127 * 256;
}

static inline Unit unit_of(const float *x, int64_t count) {
  const float peak = peak_of(x, count), largest = (float)largest_of(count), inverse = largest / peak;
  __m512i sum = _mm512_setzero_si512(); /* of whole numbers, and at most 2²⁴ */
  for (int64_t i = 0; i < count; i += 16) {
    __m512 size = _mm512_abs_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse)));
    sum = _mm512_add_epi32(sum, _mm512_cvtps_epi32(size));
  }
  const float most = (float)((largest_of(count) + 126) / 127), share = (float)(5.0 / (127.0 * (double)count));
  float coarse = (float)((int32_t)((float)_mm512_reduce_add_epi32(sum) * share) + 1);
  coarse = coarse < most ? coarse : most;
  const float unit = peak * (1.0f / largest) * coarse;
  return (Unit){.unit = unit, .inverse = 1.0f / unit};
}

/* The upper terms of 16 whole numbers; the lower ones are their lowest bytes. */
static inline __m128i upper_terms(__m512i whole) {
  return _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8));
}

/* Rounds x to two int8 terms; returns their unit, and Σ of the whole numbers. */
static inline float split_row(const float *x, int64_t count, int8_t *high, int8_t *low, int32_t *sum) {
  const Unit unit = unit_of(x, count);
  __m512i all = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(unit.inverse)));
    all = _mm512_add_epi32(all, whole);
    _mm_storeu_si128((__m128i *)(high + i), upper_terms(whole));
    _mm_storeu_si128((__m128i *)(low + i), _mm512_cvtepi32_epi8(whole));
  }
  *sum = _mm512_reduce_add_epi32(all);
  return unit.unit;
}

/* What unsigned weights, whose signs were flipped, add to a product with these terms. */
static inline int32_t offset_of(const int8_t *terms, int64_t size) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < size; i += 64)
    add_dots(&sum, _mm512_set1_epi8(1), _mm512_loadu_si512(terms + i));
  return 128 * _mm512_reduce_add_epi32(sum);
}

/* 1 / √(mean x² + eps), in every lane. */
static inline __m512 norm_factor(const float *x, float eps, int64_t count) {
  __m512 squares = _mm512_setzero_ps(), odd = squares; /* two, which do not wait for one another */
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m512 v = _mm512_loadu_ps(x + i), w = _mm512_loadu_ps(x + i + 16);
    squares = _mm512_fmadd_ps(v, v, squares);
    odd = _mm512_fmadd_ps(w, w, odd);
  }
  if (i < count) {
    __m512 v = _mm512_loadu_ps(x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(squares, odd)) / (float)count + eps);
  return _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(mean));
}

/* out = x / √(mean x² + eps) · gain */
static inline void norm_row(const float *x, const float *gain, float eps, int64_t count, float *out) {
  const __m512 factor = norm_factor(x, eps, count);
  for (int64_t i = 0; i < count; i += 16)
    _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor), _mm512_loadu_ps(gain + i)));
}

/* out = x + y, or with a gain x + rms_norm(y). */
static inline void sum_row(const float *x, const float *y, const float *gain, float eps, int64_t count, float *out) {
  const __m512 factor = gain ? norm_factor(y, eps, count) : _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    __m512 v = _mm512_loadu_ps(y + i);
    if (gain) v = _mm512_mul_ps(_mm512_mul_ps(v, factor), _mm512_loadu_ps(gain + i));
    _mm512_storeu_ps(out + i, _mm512_add_ps(_mm512_loadu_ps(x + i), v));
  }
}

/* e^x for x ≤ 0, exactly 0 below −87, where a float would soon be denormal. */
static inline __m512 exp_ps(__m512 x) {
  __mmask16 alive = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(alive, p, n);
}

/* Natural logarithm of a normal number > 0, to about 1e-7. */
static inline __m512 log_ps(__m512 x) {
  __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  __m512 n = _mm512_getexp_ps(x), one = _mm512_set1_ps(1.0f);
  __mmask16 large = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
  m = _mm512_mask_mul_ps(m, large, m, _mm512_set1_ps(0.5f));
  n = _mm512_mask_add_ps(n, large, n, one);
  __m512 f = _mm512_sub_ps(m, one), square = _mm512_mul_ps(f, f);
  __m512 p = _mm512_set1_ps(7.0376836292e-2f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-1.1514610310e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.1676998740e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-1.2420140846e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.4249322787e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-1.6668057665e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.0000714765e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-2.4999993993e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(3.3333331174e-1f));
  p = _mm512_mul_ps(_mm512_mul_ps(p, f), square);
  p = _mm512_fmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), p);
  p = _mm512_fnmadd_ps(square, _mm512_set1_ps(0.5f), p);
  return _mm512_fmadd_ps(n, _mm512_set1_ps(0.693359375f), _mm512_add_ps(f, p));
}

#endif

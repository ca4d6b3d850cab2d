/* What the kernels of attention share: pages of pairs in 8 bits or packed, and the scores of queries with a page's keys. */

#ifndef ATLAS_ATTENTION_H
#define ATLAS_ATTENTION_H

#include "common.h"
#include "vectors.h"

/* Queries that meet a page while its keys are repacked. */
enum { PAGE = 128, GROUPS = PAGE / 16, QUERIES = 32, MOST_SINKS = 16 };

/* What a number is stored in: the ring's, kept keys and kept values as `packed_pages.py` says. */
enum { RING_BITS = 8, KEY_BITS = 4, VALUE_BITS = 2 };

/* Keys or values [.., P, D]. */
typedef struct {
  const uint8_t *numbers;     /* [.., D · bits / 8] */
  const uint8_t *step;        /* of packed ones, [.., D / 32] */
  const int8_t *offset;       /* likewise */
  const uint16_t *half_scale; /* likewise, [..] */
  const float *scale;         /* [..] */
  int bits;
} Pairs;

/* The pairs from one of them on. */
static inline Pairs pairs_from(const Pairs *pairs, int64_t first, int64_t dim) {
  Pairs rest = *pairs;
  rest.numbers += first * dim * pairs->bits / 8;
  if (pairs->bits == RING_BITS) rest.scale += first;
  else rest.step += first * dim / 32, rest.offset += first * dim / 32, rest.half_scale += first;
  return rest;
}

static inline Pairs pairs_argument(const XLA_FFI_CallFrame *frame, int index, int bits) {
  Pairs pairs = {.numbers = argument(frame, index)->data, .bits = bits};
  if (bits == RING_BITS) pairs.scale = argument(frame, index + 1)->data;
  else {
    pairs.step = argument(frame, index + 1)->data;
    pairs.offset = argument(frame, index + 2)->data;
    pairs.half_scale = argument(frame, index + 3)->data;
  }
  return pairs;
}

/* Whether the numbers of an argument [B, M, K, P, bytes] have so many bits. */
static inline bool has_bits(const XLA_FFI_CallFrame *frame, int index, int64_t dim, int bits) {
  return argument(frame, index)->dims[4] * 8 == dim * bits;
}

/* Scales of a packed page's numbers; unfilled places may have any and get 0. */
static inline void page_scale(const Pairs *pairs, const uint8_t *filled, float *scale) {
  for (int p = 0; p < PAGE; p += 16) {
    const __m128i places = _mm_loadu_si128((const __m128i *)(filled + p));
    const __m512i half = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(pairs->half_scale + p)));
    const __m512i whole = _mm512_maskz_slli_epi32(_mm_test_epi8_mask(places, places), half, 16);
    _mm512_storeu_ps(scale + p, _mm512_castsi512_ps(whole));
  }
}

/* What n = 0 … 15 of a group with each step are above its offset. To make that of the step would be nine instructions for two
   groups instead of two. */
#define ABOVE(step, n) (((n) * (step) + 4) >> 3 > 255 ? 255 : ((n) * (step) + 4) >> 3)
#define ABOVE_4(step, n) ABOVE(step, n), ABOVE(step, n + 1), ABOVE(step, n + 2), ABOVE(step, n + 3)
#define STEPS_1(step) {ABOVE_4(step, 0), ABOVE_4(step, 4), ABOVE_4(step, 8), ABOVE_4(step, 12)}
#define STEPS_4(step) STEPS_1(step), STEPS_1(step + 1), STEPS_1(step + 2), STEPS_1(step + 3)
#define STEPS_16(step) STEPS_4(step), STEPS_4(step + 4), STEPS_4(step + 8), STEPS_4(step + 12)
#define STEPS_64(step) STEPS_16(step), STEPS_16(step + 16), STEPS_16(step + 32), STEPS_16(step + 48)
static const uint8_t above[256][16] __attribute__((aligned(64))) = {STEPS_64(0), STEPS_64(64), STEPS_64(128), STEPS_64(192)};

/* 64 numbers of a pair as 8 bits, the top bits flipped: from 1, −127, to 255, 127. */
static inline __attribute__((always_inline)) __m512i flipped_numbers(const Pairs *pairs, int64_t place, int bits) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  if (bits == RING_BITS) return _mm512_xor_si512(_mm512_loadu_si512(pairs->numbers + place), flip);
  const uint8_t *step = pairs->step + place / 32;
  int16_t both;
  memcpy(&both, pairs->offset + place / 32, sizeof both);
  const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(1), 1);
  const uint8_t *numbers = pairs->numbers + place * bits / 8;
  __m512i n;
  if (bits == 4) {
    const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    n = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)numbers));
    n = _mm512_and_si512(_mm512_srlv_epi16(n, shift), _mm512_set1_epi8(15));
  } else {
    const __m256i low = _mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi16(2), 1);
    const __m512i shift = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_add_epi16(low, _mm256_set1_epi16(4)), 1);
    n = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)numbers));
    n = _mm512_and_si512(_mm512_srlv_epi16(n, shift), _mm512_set1_epi8(3));
    n = _mm512_add_epi8(n, _mm512_slli_epi16(n, 2)); /* 0, 5, 10 or 15 */
  }
  __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)above[step[0]]));
  table = _mm512_mask_broadcast_i32x4(table, 0xff00, _mm_load_si128((const __m128i *)above[step[1]]));
  const __m512i offset = _mm512_xor_si512(_mm512_shuffle_epi8(_mm512_set1_epi16(both), second), flip);
  return _mm512_max_epu8(_mm512_adds_epu8(offset, _mm512_shuffle_epi8(table, n)), _mm512_set1_epi8(1));
}

/* The keys of a page that any query of some sees, in groups of 16: `count` of them, an even number, from `first` on. At the
   borders of a window and in a token's own page the others need no work (128 tokens with a window of 512, four queries of 256
   numbers, both cores: 0.36 ms instead of 0.42). */
typedef struct {
  int first, count;
} Seen;

static inline Seen seen_of(__m512i lower, __m512i upper) {
  const uint64_t found[2] = {_mm512_test_epi8_mask(lower, lower), _mm512_test_epi8_mask(upper, upper)};
  if (!found[0] && !found[1]) return (Seen){0};
  int first = found[0] ? __builtin_ctzll(found[0]) / 16 : 4 + __builtin_ctzll(found[1]) / 16;
  int last = found[1] ? 7 - __builtin_clzll(found[1]) / 16 : 3 - __builtin_clzll(found[0]) / 16;
  if ((last - first) % 2 == 0) last < GROUPS - 1 ? last++ : first--;
  return (Seen){.first = first, .count = last + 1 - first};
}

/* How many pages a row's kept pairs fill, of all that there are. */
static inline int64_t filled_pages(int32_t kept, int64_t pages) {
  const int64_t filled = kept < 0 ? 0 : ((int64_t)kept + PAGE - 1) / PAGE;
  return filled < pages ? filled : pages;
}

/* A byte for each place of kept page `page`: whether it is filled. */
static inline const uint8_t *filled_places(int32_t kept, int64_t page) {
  static const uint8_t filled[2 * PAGE] = {[0 ... PAGE - 1] = 1};
  const int64_t count = kept - page * PAGE;
  return filled + PAGE - (count < PAGE ? count : PAGE);
}

static inline Seen seen_places(const uint8_t *places) {
  return seen_of(_mm512_loadu_si512(places), _mm512_loadu_si512(places + PAGE / 2));
}

/* A query in 8 bits. */
typedef struct {
  int8_t *terms; /* [D] */
  float unit;    /* times the factor on scores */
  int32_t offset;
} Terms;

static inline Terms query_terms(const float *q, int64_t dim, float scale, int8_t *room) {
  const float unit = quantize_term(q, dim, room) * scale;
  return (Terms){.terms = room, .unit = unit, .offset = offset_of(room, dim)};
}

/* A page's keys as [D / 4, P] of four bytes each, the top bits flipped: a vector has what 16 keys multiply with the same four
   numbers of a query, so that sums need not be added up across lanes (128 tokens over 8 pages, one core: 2.3 ms instead of
   3.0). The page's values and the next page's keys are prefetched meanwhile (one token over 64 pages: 335 µs instead of 400). */
static inline __attribute__((always_inline)) void repack_keys_of(const Pairs *keys, int bits, const uint8_t *values,
                                                                 const uint8_t *next, int64_t dim, Seen seen,
                                                                 __m512i *packed) {
  for (int64_t d = 0; d < dim; d += 64)
    for (int g = seen.first; g < seen.first + seen.count; g++) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const int64_t place = (g * 16 + i) * dim + d;
        _mm_prefetch((const char *)values + place * (bits == RING_BITS ? RING_BITS : VALUE_BITS) / 8, _MM_HINT_T1);
        _mm_prefetch((const char *)next + place * bits / 8, _MM_HINT_T1);
        v[i] = flipped_numbers(keys, place, bits);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_store_si512(packed + (d / 4 + i) * GROUPS + g, v[i]);
    }
}

static inline void repack_keys(const Pairs *keys, const uint8_t *values, const uint8_t *next, int64_t dim, Seen seen,
                               __m512i *packed) {
  if (keys->bits == KEY_BITS) repack_keys_of(keys, KEY_BITS, values, next, dim, seen, packed);
  else repack_keys_of(keys, RING_BITS, values, next, dim, seen, packed);
}

/* Scores of `count` groups of a page's keys, the largest of them, and −1e30 for those not seen. */
static inline __attribute__((always_inline)) __m512 score_groups(const Terms *query, const __m512i *packed, const float *scale,
                                                                 const uint8_t *places, int64_t dim, int first, int count,
                                                                 float *score, __m512 peak) {
  __m512i dots[GROUPS];
#pragma GCC unroll 8
  for (int g = 0; g < count; g++) dots[g] = _mm512_set1_epi32(-query->offset);
  packed += first;
  for (int64_t d = 0; d < dim; d += 4, packed += GROUPS) {
    int32_t four;
    memcpy(&four, query->terms + d, sizeof four);
    const __m512i q = _mm512_set1_epi32(four);
#pragma GCC unroll 8
    for (int g = 0; g < count; g++) add_dots(&dots[g], packed[g], q);
  }
#pragma GCC unroll 8
  for (int g = 0; g < count; g++) {
    const int64_t p = (first + g) * 16;
    __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[g]), _mm512_set1_ps(query->unit));
    found = _mm512_mul_ps(found, _mm512_loadu_ps(scale + p));
    __m128i mask = _mm_loadu_si128((const __m128i *)(places + p));
    found = _mm512_mask_blend_ps(_mm_test_epi8_mask(mask, mask), _mm512_set1_ps(-1e30f), found);
    peak = _mm512_max_ps(peak, found);
    _mm512_storeu_ps(score + p, found);
  }
  return peak;
}

/* The same of a page; `places` says which of its places the query sees, `score` has room for all. */
static inline __m512 score_page(const Terms *query, const __m512i *packed, const float *scale, const uint8_t *places,
                                int64_t dim, Seen seen, float *score, __m512 peak) {
  switch (seen.count) {
    case 2: return score_groups(query, packed, scale, places, dim, seen.first, 2, score, peak);
    case 4: return score_groups(query, packed, scale, places, dim, seen.first, 4, score, peak);
    case 6: return score_groups(query, packed, scale, places, dim, seen.first, 6, score, peak);
    default: return score_groups(query, packed, scale, places, dim, seen.first, 8, score, peak);
  }
}

/* Scores of the sinks, which are numbers as they are; returns the larger of their largest and `peak`. */
static inline float score_sinks(const float *q, const float *sink_k, int64_t sinks, int64_t dim, float scale, float *score,
                                float peak) {
  for (int64_t s = 0; s < sinks; s++) {
    __m512 dot = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += 16)
      dot = _mm512_fmadd_ps(_mm512_loadu_ps(q + d), _mm512_loadu_ps(sink_k + s * dim + d), dot);
    score[s] = _mm512_reduce_add_ps(dot) * scale;
    peak = score[s] > peak ? score[s] : peak;
  }
  return peak;
}

/* The score of one head that has no value, if it has one; else none weighs anything. */
static inline float null_score(const float *null_logit, int64_t head) { return null_logit ? null_logit[head] : -1e30f; }

#endif

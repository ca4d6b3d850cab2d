/* Products on AVX-512 VNNI, which multiplies unsigned by signed bytes: see linear.c. */

#include "linear.h"

/* Terms up to which weights are read once, packed ones decoded in registers alone; outputs and terms of a block of few; terms
   of a block of many. */
enum { ONCE = 8, OUTPUTS = 4, ROWS = 4, BLOCK = 8 };

void round_rows(const void *data, int64_t part) {
  const Linear *task = data;
  int64_t m = part / task->rows, row = part % task->rows;
  round_row(task, m, row);
  for (int64_t term = row; term <= row + task->low; term += task->low) {
    task->offset[m * task->padded + term] = offset_of(task->terms + (m * task->padded + term) * task->inner, task->inner);
    if (!task->low) break;
  }
}

/* ---- few rows --------------------------------------------------------------------------------------------------- */

/* Sums of 16 outputs of a few terms, one output after the other, so that weights are read in the order they lie (a head of
   65 536 outputs in 8 bits, one row, both cores: 2.0 ms; 4.5 with four outputs side by side). */
static inline __attribute__((always_inline)) void row_by_row(const Linear *task, const Product *p, const int8_t *weight,
                                                             int terms, bool coded, int32_t sums[][2 * TILE]) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  __m512i found[ONCE][TILE];
  for (int o = 0; o < TILE; o++) {
    __m512i sum[ONCE];
#pragma GCC unroll 8
    for (int r = 0; r < terms; r++) sum[r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < task->inner; i += 64, weight += coded ? RECORD : 64) {
      _mm_prefetch((const char *)weight + AHEAD, _MM_HINT_T1);
      const __m512i w = _mm512_xor_si512(coded ? decode((const uint8_t *)weight) : _mm512_loadu_si512(weight), flip);
#pragma GCC unroll 8
      for (int r = 0; r < terms; r++) add_dots(&sum[r], w, _mm512_loadu_si512(p->terms + r * task->inner + i));
    }
#pragma GCC unroll 8
    for (int r = 0; r < terms; r++) found[r][o] = sum[r];
  }
  for (int r = 0; r < terms; r++)
    _mm512_store_si512(sums[r], _mm512_sub_epi32(lane_sums(found[r]), _mm512_set1_epi32(p->offset[r])));
}

/* `row_by_row`, made for each number of terms. */
static inline __attribute__((always_inline)) void few_terms(const Linear *task, const Product *p, const int8_t *weight,
                                                            bool coded, int32_t sums[][2 * TILE]) {
#define CASE(TERMS) \
  case TERMS: row_by_row(task, p, weight, TERMS, coded, sums); break
  switch (task->padded) {
    CASE(1);
    CASE(2);
    CASE(3);
    CASE(4);
    CASE(5);
    CASE(6);
    CASE(7);
    CASE(8);
  }
#undef CASE
}

/* Sums of four outputs of up to four terms. */
static inline __attribute__((always_inline)) void block(const int8_t *terms, const int32_t *offset, const int8_t *weight,
                                                        int64_t inner, int rows, int32_t *sums) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  __m512i sum[ROWS * OUTPUTS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS * OUTPUTS; i++) sum[i] = _mm512_setzero_si512();
  for (int64_t i = 0; i < inner; i += 64) {
    __m512i w[OUTPUTS];
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; o++) {
      _mm_prefetch((const char *)weight + o * inner + i + AHEAD, _MM_HINT_T1);
      w[o] = _mm512_xor_si512(_mm512_loadu_si512(weight + o * inner + i), flip);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      __m512i x = _mm512_loadu_si512(terms + r * inner + i);
#pragma GCC unroll 4
      for (int o = 0; o < OUTPUTS; o++) add_dots(&sum[r * OUTPUTS + o], w[o], x);
    }
  }
  int32_t found[ROWS][OUTPUTS] __attribute__((aligned(64)));
  _mm512_store_si512(found, lane_sums(sum));
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; o++) sums[r * 2 * TILE + o] = found[r][o] - offset[r];
}

void multiply_few(const void *data, int64_t part) {
  const Linear *task = data;
  Product p = product_of(task, part);
  const int64_t inner = task->inner;
  const bool coded = task->width != inner;
  int32_t sums[MAX_TERMS][2 * TILE] __attribute__((aligned(64)));
  for (int64_t o = p.first; o < p.last; o += TILE) {
    const int8_t *weight = p.weight + o * task->width;
    if (task->padded <= ONCE && coded) {
      few_terms(task, &p, weight, true, sums);
    } else if (task->padded <= ONCE) {
      few_terms(task, &p, weight, false, sums);
    } else {
      if (!(weight = as_bytes(task, weight, TILE))) return;
      for (int j = 0; j < TILE; j += OUTPUTS) {
        const int8_t *four = weight + j * inner;
        int64_t r = 0;
        for (; r + ROWS <= task->padded; r += ROWS) block(p.terms + r * inner, p.offset + r, four, inner, ROWS, sums[r] + j);
        switch (task->padded - r) {
          case 1: block(p.terms + r * inner, p.offset + r, four, inner, 1, sums[r] + j); break;
          case 2: block(p.terms + r * inner, p.offset + r, four, inner, 2, sums[r] + j); break;
          case 3: block(p.terms + r * inner, p.offset + r, four, inner, 3, sums[r] + j); break;
        }
      }
    }
    finish(task, &p, o, 1, sums);
  }
}

/* ---- many rows -------------------------------------------------------------------------------------------------- */

/* The weights of `width` times 16 outputs, [inner / 4, width · 16] of four bytes each: a vector has what 16 outputs multiply
   with the same four numbers of a term, so that sums need not be added up across lanes. */
static const int8_t *laid_out(const Linear *task, const int8_t *weight, int width) {
  const bool coded = task->width != task->inner;
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  int8_t *room = room_for(task, width * TILE);
  if (!room) return NULL;
  for (int w = 0; w < width; w++)
    for (int64_t i = 0; i < task->inner; i += 64) {
      __m512i v[TILE];
      for (int j = 0; j < TILE; j++) {
        const int8_t *next = weight + (w * TILE + j) * task->width + (coded ? i / 64 * RECORD : i);
        _mm_prefetch((const char *)next + width * TILE * task->width, _MM_HINT_T1); /* those of the next call */
        v[j] = _mm512_xor_si512(coded ? decode((const uint8_t *)next) : _mm512_loadu_si512(next), flip);
      }
      transpose(v);
      for (int j = 0; j < TILE; j++) _mm512_store_si512(room + ((i / 4 + j) * width + w) * 64, v[j]);
    }
  return room;
}

/* `width` times 16 outputs of eight terms. */
static inline __attribute__((always_inline)) void wide_block(const int8_t *terms, const int8_t *weight, int64_t inner,
                                                             int width, __m512i sum[2 * BLOCK]) {
#pragma GCC unroll 16
  for (int i = 0; i < 2 * BLOCK; i++) sum[i] = _mm512_setzero_si512();
  for (int64_t k = 0; k < inner; k += 4, weight += 64 * width) {
    __m512i w = _mm512_load_si512(weight), w2 = width > 1 ? _mm512_load_si512(weight + 64) : w;
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; r++) {
      int32_t four;
      memcpy(&four, terms + r * inner + k, sizeof four);
      __m512i x = _mm512_set1_epi32(four);
      add_dots(&sum[2 * r], w, x);
      if (width > 1) add_dots(&sum[2 * r + 1], w2, x);
    }
  }
}

void multiply_many(const void *data, int64_t part) {
  const Linear *task = data;
  Product p = product_of(task, part);
  int32_t sums[MAX_TERMS][2 * TILE] __attribute__((aligned(64)));
  for (int64_t o = p.first; o < p.last; o += 2 * TILE) {
    int width = p.last - o > TILE ? 2 : 1;
    const int8_t *weight = laid_out(task, p.weight + o * task->width, width);
    if (!weight) return;
    for (int64_t r = 0; r < task->padded; r += BLOCK) {
      int64_t first = r < task->padded - BLOCK ? r : task->padded - BLOCK;
      const int8_t *terms = p.terms + first * task->inner;
      __m512i sum[2 * BLOCK];
      if (width > 1)
        wide_block(terms, weight, task->inner, 2, sum);
      else
        wide_block(terms, weight, task->inner, 1, sum);
      for (int i = 0; i < BLOCK; i++) {
        const __m512i offset = _mm512_set1_epi32(p.offset[first + i]);
        _mm512_store_si512(sums[first + i], _mm512_sub_epi32(sum[2 * i], offset));
        _mm512_store_si512(sums[first + i] + TILE, _mm512_sub_epi32(sum[2 * i + 1], offset));
      }
    }
    finish(task, &p, o, width, sums);
  }
}

/* Products on AVX-512 VNNI, which multiplies unsigned by signed bytes: see linear.c. */

#include "linear.h"

/* Outputs and terms of a block of few; terms up to which packed weights are decoded in registers alone; terms of a block of
   many. */
enum { OUTPUTS = 4, ROWS = 4, ONCE = 8, BLOCK = 8 };

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

/* `outputs` outputs of `rows` terms, at most 16 sums; a row's lie 2 · TILE after those of the row before. */
static inline __attribute__((always_inline)) void block(const int8_t *terms, const int32_t *offset, const int8_t *weight,
                                                        int64_t inner, int rows, int outputs, bool coded,
                                                        int32_t *sums) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  const int64_t width = coded ? inner / 64 * RECORD : inner;
  __m512i sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int i = 0; i < rows * outputs; i++) sum[i] = _mm512_zextsi128_si512(_mm_cvtsi32_si128(-offset[i / outputs]));
  for (int64_t i = 0; i < inner; i += 64) {
    __m512i w[OUTPUTS];
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++) {
      const int8_t *next = weight + o * width + (coded ? i / 64 * RECORD : i);
      _mm_prefetch((const char *)next + AHEAD, _MM_HINT_T0);
      w[o] = _mm512_xor_si512(coded ? decode((const uint8_t *)next) : _mm512_loadu_si512(next), flip);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      __m512i x = _mm512_loadu_si512(terms + r * inner + i);
#pragma GCC unroll 4
      for (int o = 0; o < outputs; o++) add_dots(&sum[r * outputs + o], w[o], x);
    }
  }
  int32_t found[16] __attribute__((aligned(64)));
  _mm512_store_si512(found, lane_sums(sum));
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) memcpy(sums + r * 2 * TILE, found + r * outputs, sizeof(int32_t) * (size_t)outputs);
}

/* `block`, made for each number of rows. */
static inline __attribute__((always_inline)) void block_of(const int8_t *terms, const int32_t *offset, const int8_t *weight,
                                                           int64_t inner, int64_t rows, bool coded, int32_t *sums) {
#define CASE(ROWS, OUTPUTS) \
  case ROWS: block(terms, offset, weight, inner, ROWS, OUTPUTS, coded, sums); break
  switch (rows) {
    CASE(1, 4);
    CASE(2, 4);
    CASE(3, 4);
    CASE(4, 4);
    CASE(5, 2);
    CASE(6, 2);
    CASE(7, 2);
    CASE(8, 2);
  }
#undef CASE
}

void multiply_few(const void *data, int64_t part) {
  const Linear *task = data;
  Product p = product_of(task, part);
  const int64_t inner = task->inner;
  int32_t sums[MAX_TERMS][2 * TILE] __attribute__((aligned(64)));
  const bool once = task->width != inner && task->padded <= ONCE; /* nothing decoded is read twice */
  for (int64_t o = p.first; o < p.last; o += TILE) {
    const int8_t *weight = p.weight + o * task->width;
    if (once) {
      int step = task->padded > ROWS ? 2 : OUTPUTS;
      for (int j = 0; j < TILE; j += step)
        block_of(p.terms, p.offset, weight + j * task->width, inner, task->padded, true, sums[0] + j);
    } else {
      if (!(weight = as_bytes(task, weight, TILE))) return;
      for (int j = 0; j < TILE; j += OUTPUTS)
        for (int64_t r = 0; r < task->padded; r += ROWS) {
          int64_t rows = task->padded - r < ROWS ? task->padded - r : ROWS;
          block_of(p.terms + r * inner, p.offset + r, weight + j * inner, inner, rows, false, sums[r] + j);
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

/* Products on AVX-512 VNNI, which multiplies unsigned by signed bytes: see linear.c. */

#include "linear.h"

enum { OUTPUTS = 4, ROWS = 4, BLOCK = 8 };

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

/* Four outputs of up to four rows of terms; the sums lie at [row · 4 + output]. */
static inline __attribute__((always_inline)) __m512i block(const int8_t *terms, const int8_t *weight, int64_t inner,
                                                           int rows, bool coded) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  const int64_t width = coded ? inner / 64 * RECORD : inner;
  __m512i sum[16];
  for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_si512();
  for (int64_t i = 0; i < inner; i += 64) {
    __m512i w[OUTPUTS];
    for (int o = 0; o < OUTPUTS; o++) {
      const int8_t *next = weight + o * width + (coded ? i / 64 * RECORD : i);
      _mm_prefetch((const char *)next + AHEAD, _MM_HINT_T0);
      w[o] = _mm512_xor_si512(coded ? decode((const uint8_t *)next) : _mm512_loadu_si512(next), flip);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      __m512i x = _mm512_loadu_si512(terms + r * inner + i);
#pragma GCC unroll 4
      for (int o = 0; o < OUTPUTS; o++) sum[r * OUTPUTS + o] = _mm512_dpbusd_epi32(sum[r * OUTPUTS + o], w[o], x);
    }
  }
  return lane_sums(sum);
}

/* `block`, made for each number of rows. */
static inline __attribute__((always_inline)) __m512i block_of(const int8_t *terms, const int8_t *weight, int64_t inner,
                                                              int64_t rows, bool coded) {
  return rows == 4   ? block(terms, weight, inner, 4, coded)
         : rows == 3 ? block(terms, weight, inner, 3, coded)
         : rows == 2 ? block(terms, weight, inner, 2, coded)
                     : block(terms, weight, inner, 1, coded);
}

void multiply_few(const void *data, int64_t part) {
  const Linear *task = data;
  Product p = product_of(task, part);
  int32_t sums[ROWS * OUTPUTS] __attribute__((aligned(64)));
  int32_t held[MAX_TERMS * OUTPUTS];
  const bool once = task->width != task->inner && task->padded <= ROWS; /* nothing decoded is read twice */
  for (int64_t o = p.first; o < p.last; o += OUTPUTS) {
    const int8_t *weight = p.weight + o * task->width;
    if (!once && !(weight = as_bytes(task, weight, OUTPUTS))) return;
    for (int64_t r = 0; r < task->padded; r += ROWS) {
      const int8_t *terms = p.terms + r * task->inner;
      int64_t rows = task->padded - r < ROWS ? task->padded - r : ROWS;
      __m512i found = once ? block_of(terms, weight, task->inner, rows, true)
                           : block_of(terms, weight, task->inner, rows, false);
      _mm512_store_si512(sums, found);
      for (int64_t i = 0; i < rows; i++)
        for (int j = 0; j < OUTPUTS; j++) held[(r + i) * OUTPUTS + j] = sums[i * OUTPUTS + j] - p.offset[r + i];
    }
    for (int64_t r = 0; r < task->rows; r++)
      for (int j = 0; j < OUTPUTS; j++) {
        float total = (float)held[r * OUTPUTS + j];
        if (task->low) total = __builtin_fmaf((float)held[(task->low + r) * OUTPUTS + j], 1.0f / 254.0f, total);
        p.out[r * task->outputs + o + j] = total * (p.unit[r] * p.scale[o + j]);
      }
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
  for (int i = 0; i < 2 * BLOCK; i++) sum[i] = _mm512_setzero_si512();
  for (int64_t k = 0; k < inner; k += 4, weight += 64 * width) {
    __m512i w = _mm512_load_si512(weight), w2 = width > 1 ? _mm512_load_si512(weight + 64) : w;
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; r++) {
      int32_t four;
      memcpy(&four, terms + r * inner + k, sizeof four);
      __m512i x = _mm512_set1_epi32(four);
      sum[2 * r] = _mm512_dpbusd_epi32(sum[2 * r], w, x);
      if (width > 1) sum[2 * r + 1] = _mm512_dpbusd_epi32(sum[2 * r + 1], w2, x);
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

/* GEMM on AVX-512 VNNI, which multiplies unsigned by signed bytes: see linear.c. */

#include "linear.h"

void quantize_few(const void *data, int64_t part) {
  const Linear *task = data;
  int64_t m = part / task->rows, row = part % task->rows;
  int8_t *high = task->terms + (m * task->padded + row) * task->inner;
  quantize_row(task, m, row, high, high + task->rows * task->inner);
}

void quantize_many(const void *data, int64_t part) {
  const Linear *task = data;
  int64_t m = part / task->rows, row = part % task->rows;
  quantize_row(task, m, row, NULL, task->terms + (m * task->padded + row) * task->inner);
}

/* ---- few rows --------------------------------------------------------------------------------------------------- */

/* 16 outputs of a few rows, one output after the other, so that weights are read in the order they lie (a head of
   65 536 outputs in 8 bits, one row, both cores: 2.0 ms; 4.5 with four outputs side by side). */
static inline __attribute__((always_inline)) void row_by_row(const Linear *task, const Gemm *p, int64_t output,
                                                             const int8_t *weight, int rows, Form form) {
  const int terms = 2 * rows, record = form;
  const int64_t span = span_of(form);
  /* two sums of every term take turns, for one alone waits for its last product */
  const int turns = span > 64 && rows <= 2 ? 2 : 1;
  __m512i found[BLOCK][TILE];
  for (int o = 0; o < TILE; o++) {
    __m512i sum[2 * BLOCK];
#pragma GCC unroll 14
    for (int r = 0; r < turns * terms; r++) sum[r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < task->inner; i += span, weight += record) {
#pragma GCC unroll 4
      for (int line = 0; line < record; line += 64) _mm_prefetch((const char *)weight + AHEAD + line, _MM_HINT_T1);
      const Record opening = opened((const uint8_t *)weight, form, true);
#pragma GCC unroll 4
      for (int part = 0; part < span / 64; part++) {
        const __m512i w = decoded((const uint8_t *)weight, form, &opening, part, true);
#pragma GCC unroll 14
        for (int r = 0; r < terms; r++)
          add_dots(&sum[part % turns * terms + r], w, _mm512_loadu_si512(p->terms + r * task->inner + i + 64 * part));
      }
    }
    if (turns > 1)
#pragma GCC unroll 14
      for (int r = 0; r < terms; r++) sum[r] = _mm512_add_epi32(sum[r], sum[terms + r]);
#pragma GCC unroll 7
    for (int r = 0; r < rows; r++) found[r][o] = _mm512_add_epi32(_mm512_slli_epi32(sum[r], 8), sum[rows + r]);
  }
  for (int r = 0; r < rows; r++)
    finish(task, p, r, output, _mm512_sub_epi32(lane_sums(found[r]), _mm512_set1_epi32(p->offset[r])));
}

/* `row_by_row`, made for each number of rows. */
static inline __attribute__((always_inline)) void few_rows(const Linear *task, const Gemm *p, int64_t output,
                                                           const int8_t *weight, Form form) {
  switch (task->rows) {
    case 1: row_by_row(task, p, output, weight, 1, form); break;
    case 2: row_by_row(task, p, output, weight, 2, form); break;
    case 3: row_by_row(task, p, output, weight, 3, form); break;
    case 4: row_by_row(task, p, output, weight, 4, form); break;
    case 5: row_by_row(task, p, output, weight, 5, form); break;
    case 6: row_by_row(task, p, output, weight, 6, form); break;
    case 7: row_by_row(task, p, output, weight, 7, form); break;
  }
}

/* A form's own code, which is made for it. */
typedef void FewRows(const Linear *task, const Gemm *p, int64_t output, const int8_t *weight);

static void few_bytes(const Linear *t, const Gemm *p, int64_t o, const int8_t *w) { few_rows(t, p, o, w, BYTES); }
static void few_floats(const Linear *t, const Gemm *p, int64_t o, const int8_t *w) { few_rows(t, p, o, w, FLOATS); }
static void few_levels(const Linear *t, const Gemm *p, int64_t o, const int8_t *w) { few_rows(t, p, o, w, LEVELS); }
static void few_pairs(const Linear *t, const Gemm *p, int64_t o, const int8_t *w) { few_rows(t, p, o, w, PAIRS); }
static void few_four(const Linear *t, const Gemm *p, int64_t o, const int8_t *w) { few_rows(t, p, o, w, FOUR); }
static void few_five(const Linear *t, const Gemm *p, int64_t o, const int8_t *w) { few_rows(t, p, o, w, FIVE); }
static void few_six(const Linear *t, const Gemm *p, int64_t o, const int8_t *w) { few_rows(t, p, o, w, SIX); }

void multiply_few(const void *data, int64_t part) {
  const Linear *task = data;
  Gemm p = gemm_of(task, part);
  FewRows *run = NULL;
  switch (task->form) {
    case BYTES: run = few_bytes; break;
    case FLOATS: run = few_floats; break;
    case LEVELS: run = few_levels; break;
    case PAIRS: run = few_pairs; break;
    case FOUR: run = few_four; break;
    case FIVE: run = few_five; break;
    case SIX: run = few_six; break;
  }
  for (int64_t o = p.first; o < p.last; o += TILE) run(task, &p, o, p.weight + o * task->width);
}

/* ---- many rows -------------------------------------------------------------------------------------------------- */

/* The weights of `width` times 16 outputs, [inner / 4, width · 16] of four bytes each: a vector has what 16 outputs multiply
   with the same four numbers of a term, so that sums need not be added up across lanes. */
static inline __attribute__((always_inline)) void lay_out(const Linear *task, const int8_t *weight, int width, Form form,
                                                          int8_t *room) {
  const int64_t span = span_of(form);
  const int parts = (int)(span / 64);
  __m512i v[4][TILE];
  for (int w = 0; w < width; w++)
    for (int64_t i = 0; i < task->inner; i += span) {
      for (int j = 0; j < TILE; j++) {
        const uint8_t *next = (const uint8_t *)weight + (w * TILE + j) * task->width + i / span * (int64_t)form;
        const Record opening = opened(next, form, true);
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++) v[part][j] = decoded(next, form, &opening, part, true);
      }
      for (int part = 0; part < parts; part++) {
        transpose(v[part]);
        for (int j = 0; j < TILE; j++)
          _mm512_store_si512(room + (((i + 64 * part) / 4 + j) * width + w) * 64, v[part][j]);
      }
    }
}

static const int8_t *laid_out(const Linear *task, const int8_t *weight, int width) {
  int8_t *room = room_for(task, width * TILE);
  if (!room) return NULL;
  switch (task->form) {
    case BYTES: lay_out(task, weight, width, BYTES, room); break;
    case FLOATS: lay_out(task, weight, width, FLOATS, room); break;
    case LEVELS: lay_out(task, weight, width, LEVELS, room); break;
    case PAIRS: lay_out(task, weight, width, PAIRS, room); break;
    case FOUR: lay_out(task, weight, width, FOUR, room); break;
    case FIVE: lay_out(task, weight, width, FIVE, room); break;
    case SIX: lay_out(task, weight, width, SIX, room); break;
  }
  return room;
}

/* Where the weights that are repacked next lie, and how far on with every step: they are prefetched bit by bit, in two halves,
   while these are multiplied. All at once while repacking, each core waited for memory and then left it idle (Gemma 3 270M,
   16 rows: 1.3 times as long; a prompt: 1.05). */
typedef struct {
  const char *next;
  int64_t half, step;
} Ahead;

static inline Ahead ahead_of(const Linear *task, const Gemm *p, int64_t o, int width) {
  /* parts are taken in turns: the next one is most likely another thread's, whose cache is not this one */
  const int64_t own = o + width * TILE < p->last ? o + width * TILE : p->first + task->threads * task->strip;
  const int64_t half = width * TILE / 2 * task->width, steps = (task->padded + BLOCK - 1) / BLOCK * task->inner / 4;
  return (Ahead){.next = (const char *)p->weight + own * task->width, .half = half, .step = (half + steps - 1) / steps};
}

/* Sums of `width` times 16 outputs of eight rows. Rows take their upper terms side by side, as many as the one that has most:
   the others' lists end in zeros. */
static inline __attribute__((always_inline)) void wide_block(const Linear *task, const Gemm *p, const int8_t *weight,
                                                             int64_t first, int width, Ahead *ahead, __m512i sum[2 * BLOCK]) {
  const int64_t inner = task->inner;
  const int8_t *low = p->terms + first * inner;
  const int64_t next_row = fours_size(inner);
  const Fours fours = fours_of(task, p->matrix, first);
  int32_t most = 0;
  for (int r = 0; r < BLOCK; r++) most = fours.count[r * next_row] > most ? fours.count[r * next_row] : most;
#pragma GCC unroll 16
  for (int i = 0; i < 2 * BLOCK; i++) sum[i] = _mm512_setzero_si512();
  for (int32_t i = 0; i < most; i++) {
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; r++) {
      const int8_t *w = weight + (int64_t)fours.at[r * next_row + i] * 64 * width;
      const __m512i x = _mm512_set1_epi32(fours.four[r * next_row + i]);
      add_dots(&sum[2 * r], _mm512_load_si512(w), x);
      if (width > 1) add_dots(&sum[2 * r + 1], _mm512_load_si512(w + 64), x);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2 * BLOCK; i++) sum[i] = _mm512_slli_epi32(sum[i], 8);
  for (int64_t k = 0; k < inner; k += 4, weight += 64 * width) {
    _mm_prefetch(ahead->next, _MM_HINT_T1);
    _mm_prefetch(ahead->next + ahead->half, _MM_HINT_T1);
    ahead->next += ahead->step;
    __m512i w = _mm512_load_si512(weight), w2 = width > 1 ? _mm512_load_si512(weight + 64) : w;
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; r++) {
      int32_t four;
      memcpy(&four, low + r * inner + k, sizeof four);
      __m512i x = _mm512_set1_epi32(four);
      add_dots(&sum[2 * r], w, x);
      if (width > 1) add_dots(&sum[2 * r + 1], w2, x);
    }
  }
}

void multiply_many(const void *data, int64_t part) {
  const Linear *task = data;
  Gemm p = gemm_of(task, part);
  for (int64_t o = p.first; o < p.last; o += 2 * TILE) {
    int width = p.last - o > TILE ? 2 : 1;
    const int8_t *weight = laid_out(task, p.weight + o * task->width, width);
    if (!weight) return;
    Ahead ahead = ahead_of(task, &p, o, width);
    for (int64_t r = 0; r < task->padded; r += BLOCK) {
      int64_t first = r < task->padded - BLOCK ? r : task->padded - BLOCK;
      __m512i sum[2 * BLOCK];
      if (width > 1)
        wide_block(task, &p, weight, first, 2, &ahead, sum);
      else
        wide_block(task, &p, weight, first, 1, &ahead, sum);
#pragma GCC unroll 8
      for (int i = 0; i < BLOCK; i++) {
        if (first + i >= task->rows) break;
        const __m512i offset = _mm512_set1_epi32(p.offset[first + i]);
        finish(task, &p, first + i, o, _mm512_sub_epi32(sum[2 * i], offset));
        if (width > 1) finish(task, &p, first + i, o + TILE, _mm512_sub_epi32(sum[2 * i + 1], offset));
      }
    }
  }
}

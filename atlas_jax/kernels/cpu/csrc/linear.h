/* GEMM of float rows with 8-bit weights: what its parts for AVX-512 VNNI and for AMX share. */

#ifndef ATLAS_LINEAR_H
#define ATLAS_LINEAR_H

#include "common.h"
#include "forms.h"

#include <stdatomic.h>

/* Outputs, or terms, of one tile; rows of one call; rows of a block where there are many (VNNI). */
enum { TILE = 16, MAX_ROWS = 128, BLOCK = 8 };
/* Bytes ahead of the reader that are prefetched, as far as the second cache (65 536 outputs of 640 weights in 8 bits, two rows,
   one core: 1.5 ms; 2.2 with 4096 bytes, 3.3 with 8192 as far as the first cache, 3.7 without). */
enum { AHEAD = 32768 };

/* Of a gate; swiglu_oai: gate · σ(1.702 · gate) · (up + 1), with the gate cut at 7 and up at ±7. */
typedef enum { SILU, GELU_TANH, SWIGLU_OAI } Activation;

typedef struct {
  const float *x;       /* [matrices, rows, inner]; gated: [rows, inner / block, 2, block] */
  const int8_t *weight; /* [matrices, outputs, inner], or coded: [outputs, records, bytes of one] */
  Form form;
  const float *weight_scale;
  float *out; /* [matrices, rows, outputs] */
  const float *gain; /* [inner], if rows are normed first */
  float eps;
  const float *added;     /* [rows, inner], if it is added to x before the norm */
  const float *post_gain; /* [inner], if what is added is normed itself */
  float *sum;             /* [rows, inner]: the sums */
  int64_t block; /* columns of a gate that lie together; 0: rows are not gated */
  Activation activation; /* the gate's */
  int64_t rows, inner, outputs;
  int64_t width;  /* bytes of one output's weights */
  int64_t strip, strips; /* outputs of one part, and parts of one matrix */
  int64_t threads;       /* that take parts */
  int64_t groups;        /* AMX: groups of eight rows, 16 terms, of one matrix */
  int64_t padded;        /* terms of one matrix */
  int8_t *terms;         /* [matrices, padded, inner] */
  int32_t *packed; /* AMX: the terms as it reads them, [matrices, groups, inner / 4, 16], four bytes each */
  float *unit;     /* [matrices, rows] */
  int32_t *offset; /* VNNI: 128 · Σ of each row's whole numbers, [matrices, rows] */
  int32_t *fours;  /* VNNI, many rows: where upper terms are not all 0, see `Fours` */
  atomic_bool *no_room; /* set when there was no room to work in */
} Linear;

/* The upper terms of a row, four by four, those that are not all 0: how many, which of the row's fours, and their bytes; then
   zeros, so that rows of different counts can be read side by side. */
typedef struct {
  int32_t *count, *at, *four;
} Fours;

/* Numbers that the upper terms of one row take at most; fours are written 16 at a time. */
static inline int64_t fours_size(int64_t inner) { return 1 + 2 * (inner / 4 + TILE); }

static inline Fours fours_of(const Linear *task, int64_t m, int64_t row) {
  int32_t *first = task->fours + (m * task->padded + row) * fours_size(task->inner);
  return (Fours){.count = first, .at = first + 1, .four = first + 1 + task->inner / 4 + TILE};
}

/* A GEMM as part of a call: which matrix, and where its rows' results go. */
typedef struct {
  const int8_t *weight, *terms;
  const int32_t *packed, *offset;
  const float *scale, *unit;
  float *out;
  int64_t matrix, first, last;
} Gemm;

static inline Gemm gemm_of(const Linear *task, int64_t part) {
  int64_t m = part / task->strips, first = part % task->strips * task->strip, last = first + task->strip;
  return (Gemm){.weight = task->weight + m * task->outputs * task->width,
                   .terms = task->terms + m * task->padded * task->inner,
                   .packed = task->packed + m * task->padded * task->inner / 4,
                   .offset = task->offset + m * task->rows,
                   .scale = task->weight_scale + m * task->outputs,
                   .unit = task->unit + m * task->rows,
                   .out = task->out + m * task->rows * task->outputs,
                   .matrix = m,
                   .first = first,
                   .last = last < task->outputs ? last : task->outputs};
}

/* Quantises a row to whole numbers, 256 · high + low: writes `low`, and `high` or, if that is NULL, the row's `fours`. */
void quantize_row(const Linear *task, int64_t m, int64_t row, int8_t *high, int8_t *low);

/* Room of this thread's own for the weights of `outputs` outputs as bytes; NULL if there is none. */
int8_t *room_for(const Linear *task, int64_t outputs);

/* Parts of a call: quantising rows and multiplying them, few and many (VNNI), and with AMX. */
Part quantize_few, quantize_many, multiply_few, multiply_many, pack_terms, multiply_tiles;

/* Results of 16 outputs of a row, from their sums. */
static inline __attribute__((always_inline)) void finish(const Linear *task, const Gemm *p, int64_t row, int64_t o,
                                                         __m512i sum) {
  const __m512 unit = _mm512_mul_ps(_mm512_set1_ps(p->unit[row]), _mm512_loadu_ps(p->scale + o));
  _mm512_storeu_ps(p->out + row * task->outputs + o, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), unit));
}

#endif

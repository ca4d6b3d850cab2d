/* Products of float rows with 8-bit weights.

   A row is rounded to one 8-bit term or two, x ≈ (high + low / 254) · unit, and

     y[r, o] = (Σ high[r]·w[o] + Σ low[r]·w[o] / 254) · unit[r] · weight_scale[o]

   with exact sums, so the result has the bits of the same function in Python. On AVX-512 VNNI the processor multiplies
   unsigned by signed bytes: a weight w is read as w + 128 (its top bit flipped), and 128 · Σ x is taken off the sum.

   Weights may lie coded, in 5 bits instead of 8 (`PackedArray`). Then a few outputs' weights are decoded to where the
   caches keep them, just before they are multiplied: for few rows a product takes as long as its weights take to come from
   memory. */

#include "common.h"
#include "vectors.h"

#include <stdatomic.h>

enum { OUTPUTS = 4, ROWS = 4, TILE = 16, MAX_TERMS = 256, RECORD = 40 };
/* Terms up to which VNNI is ahead of AMX, which multiplies by 16 of them or none (packed weights of SmolLM2-135M, all layers:
   8.7 against 7.0 ms for one row, 12.9 against 8.0 for two; for four rows AMX, 8.8 against 10.2). */
enum { FEW = 4 };
/* Bytes ahead of the reader that are asked for (one core, from memory: 4.4 ns a record, without 7.8). */
enum { AHEAD = 2048 };

typedef struct {
  const float *x;       /* [matrices, rows, inner] */
  const int8_t *weight; /* [matrices, outputs, inner], or coded: [outputs, inner / 64, RECORD] */
  const float *weight_scale;
  float *out; /* [matrices, rows, outputs] */
  int64_t rows, inner, outputs;
  int64_t width; /* bytes of one output's weights */
  int64_t strip, strips; /* outputs of one part, and parts of one matrix */
  int64_t low;           /* distance of a row's second term from its first; 0: there is none */
  int64_t group, groups; /* rows whose terms are one group of 16, and such groups of one matrix */
  int64_t padded;        /* terms of one matrix */
  int8_t *terms;         /* [matrices, padded, inner] */
  int32_t *packed; /* the terms as AMX reads them, [matrices, groups, inner / 4, 16], four bytes each; none on VNNI */
  float *unit;     /* [matrices, rows] */
  atomic_bool *no_room; /* set when coded weights could not be decoded */
  int32_t *offset; /* VNNI: 128 · Σ of each term, [matrices, padded] */
} Linear;

/* Where a row's first term lies among those of its matrix. On AMX, both terms of a row are in one group. */
static inline int64_t place(const Linear *task, int64_t row) { return row / task->group * TILE + row % task->group; }

/* A product as part of a call: which matrix, and where its rows' results go. */
typedef struct {
  const int8_t *weight, *terms;
  const int32_t *packed, *offset;
  const float *scale, *unit;
  float *out;
  int64_t first, last;
} Product;

static Product product_of(const Linear *task, int64_t part) {
  int64_t m = part / task->strips, first = part % task->strips * task->strip, last = first + task->strip;
  return (Product){.weight = task->weight + m * task->outputs * task->width,
                   .terms = task->terms + m * task->padded * task->inner,
                   .packed = task->packed + m * task->padded * task->inner / 4,
                   .offset = task->offset + m * task->padded,
                   .scale = task->weight_scale + m * task->outputs,
                   .unit = task->unit + m * task->rows,
                   .out = task->out + m * task->rows * task->outputs,
                   .first = first,
                   .last = last < task->outputs ? last : task->outputs};
}

static void round_row(const Linear *task, int64_t m, int64_t row) {
  const float *x = task->x + (m * task->rows + row) * task->inner;
  int8_t *high = task->terms + (m * task->padded + place(task, row)) * task->inner;
  task->unit[m * task->rows + row] = round_terms(x, task->inner, high, task->low ? high + task->low * task->inner : NULL);
}

/* ---- coded weights ----------------------------------------------------------------------------------------------- */

/* 64 weights of one output from their record: step and base of either half in 16 bits, then a byte for every two codes. A
   weight is the upper byte of code · step + base. */
static inline __attribute__((always_inline)) __m512i decode(const uint8_t *record) {
  int64_t halves;
  memcpy(&halves, record, sizeof halves);
  const __m512i both = _mm512_set1_epi64(halves);
  const __m512i of_step = _mm512_inserti64x4(_mm512_set1_epi16(0x0504), _mm256_set1_epi16(0x0100), 0);
  const __m512i of_base = _mm512_add_epi8(of_step, _mm512_set1_epi8(2));
  __m512i step = _mm512_shuffle_epi8(both, of_step), base = _mm512_shuffle_epi8(both, of_base);
  __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(record + sizeof halves)));
  __m512i even = _mm512_and_si512(codes, _mm512_set1_epi16(15)), odd = _mm512_srli_epi16(codes, 4);
  even = _mm512_add_epi16(_mm512_mullo_epi16(even, step), base);
  odd = _mm512_add_epi16(_mm512_mullo_epi16(odd, step), base);
  return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, _mm512_srli_epi16(even, 8), odd);
}

/* The weights of `outputs` outputs as bytes: as they lie, or decoded into room of this thread's own; NULL if there is none. */
static const int8_t *as_bytes(const Linear *task, const int8_t *weight, int64_t outputs) {
  static _Thread_local int8_t *room;
  static _Thread_local int64_t size;
  if (task->width == task->inner) return weight;
  int64_t needed = outputs * task->inner;
  if (size < needed) { /* kept: these are threads of a pool, and fresh pages cost more than the product */
    free(room);
    room = aligned_alloc(64, (size_t)needed);
    size = room ? needed : 0;
    if (!room) {
      *task->no_room = true;
      return NULL;
    }
  }
  const uint8_t *record = (const uint8_t *)weight;
  for (int64_t i = 0; i < needed; i += 64, record += RECORD) {
    _mm_prefetch((const char *)record + AHEAD, _MM_HINT_T0);
    _mm512_store_si512(room + i, decode(record));
  }
  return room;
}

/* ---- AVX-512 VNNI ---------------------------------------------------------------------------------------------- */

static void round_rows(const void *data, int64_t part) {
  const Linear *task = data;
  int64_t m = part / task->rows, row = part % task->rows;
  round_row(task, m, row);
  for (int64_t term = row; term <= row + task->low; term += task->low) {
    task->offset[m * task->padded + term] = offset_of(task->terms + (m * task->padded + term) * task->inner, task->inner);
    if (!task->low) break;
  }
}

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

static void multiply(const void *data, int64_t part) {
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

/* ---- AMX ------------------------------------------------------------------------------------------------------- */

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

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
} TileShapes;

/* Two tiles of outputs by two of rows of terms, so that every tile read takes part in two products; `width` and `height`
   say how many of them there are. */
static inline __attribute__((always_inline)) void tile_block(const int8_t *weight, const int32_t *terms, int64_t inner,
                                                             int64_t group, int width, int height, bool ahead) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int8_t *weight2 = weight + TILE * inner;
  for (int64_t i = 0; i < inner; i += 64) {
    _tile_loadd(4, weight + i, inner);
    _tile_loadd(6, terms + i / 4 * TILE, 64);
    _tile_dpbssd(0, 4, 6);
    if (width > 1) {
      _tile_loadd(5, weight2 + i, inner);
      _tile_dpbssd(1, 5, 6);
    }
    if (height > 1) {
      _tile_loadd(7, terms + group + i / 4 * TILE, 64);
      _tile_dpbssd(2, 4, 7);
      if (width > 1) _tile_dpbssd(3, 5, 7);
    }
    if (ahead) /* the next outputs' weights, while these are in the works */
      for (int j = 0; j < width * TILE; j++)
        _mm_prefetch((const char *)(weight + (width * TILE + j) * inner + i), _MM_HINT_T0);
  }
}

/* Rounds the rows of a group of 16 terms, and lays them out as AMX reads them. */
static void pack_terms(const void *data, int64_t part) {
  const Linear *task = data;
  int64_t words = task->inner / 4, m = part / task->groups, group = part % task->groups, first = group * task->group;
  int64_t rows = task->rows - first < task->group ? task->rows - first : task->group;
  for (int64_t r = 0; r < rows; r++) round_row(task, m, first + r);
  const int32_t *given = (const int32_t *)(task->terms + part * TILE * task->inner);
  int32_t *packed = task->packed + part * TILE * words;
  bool used[TILE] = {false};
  for (int64_t r = 0; r < rows; r++) used[r] = used[r + task->low] = true;
  for (int64_t i = 0; i < words; i += TILE) {
    __m512i block[TILE];
#pragma GCC unroll 16
    for (int j = 0; j < TILE; j++)
      block[j] = used[j] ? _mm512_loadu_si512(given + j * words + i) : _mm512_setzero_si512();
    transpose(block);
#pragma GCC unroll 16
    for (int j = 0; j < TILE; j++) _mm512_store_si512(packed + (i + j) * TILE, block[j]);
  }
}

static void multiply_tiles(const void *data, int64_t part) {
  const Linear *task = data;
  Product p = product_of(task, part);
  int64_t inner = task->inner;
  TileShapes shapes = {.palette = 1};
  for (int i = 0; i < 8; i++) shapes.column_bytes[i] = 64, shapes.rows[i] = TILE;
  _tile_loadconfig(&shapes);
  int32_t sums[MAX_TERMS][2 * TILE] __attribute__((aligned(64)));
  int32_t found[4][TILE][TILE] __attribute__((aligned(64)));
  const int64_t group = inner / 4 * TILE;
  const bool ahead = task->width == inner; /* decoding looks ahead by itself */
  for (int64_t o = p.first; o < p.last; o += 2 * TILE) {
    int width = p.last - o > TILE ? 2 : 1;
    const int8_t *weight = as_bytes(task, p.weight + o * task->width, width * TILE);
    if (!weight) break;
    for (int64_t r = 0; r < task->padded; r += 2 * TILE) {
      const int32_t *terms = p.packed + r / TILE * group;
      int height = task->padded - r > TILE ? 2 : 1;
      if (width == 2 && height == 2)
        tile_block(weight, terms, inner, group, 2, 2, ahead && r == 0);
      else if (width == 2)
        tile_block(weight, terms, inner, group, 2, 1, ahead && r == 0);
      else if (height == 2)
        tile_block(weight, terms, inner, group, 1, 2, ahead && r == 0);
      else
        tile_block(weight, terms, inner, group, 1, 1, ahead && r == 0);
      _tile_stored(0, found[0], 64);
      _tile_stored(1, found[1], 64);
      _tile_stored(2, found[2], 64);
      _tile_stored(3, found[3], 64);
      for (int i = 0; i < 2 * height; i++) {
        __m512i block[TILE];
        for (int j = 0; j < TILE; j++) block[j] = _mm512_load_si512(found[i][j]);
        transpose(block);
        for (int j = 0; j < TILE; j++) _mm512_store_si512(sums[r + i / 2 * TILE + j] + i % 2 * TILE, block[j]);
      }
    }
    for (int64_t r = 0; r < task->rows; r++)
      for (int j = 0; j < width * TILE; j += TILE) {
        __m512 total = _mm512_cvtepi32_ps(_mm512_load_si512(sums[place(task, r)] + j));
        if (task->low) {
          __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(sums[place(task, r) + task->low] + j));
          total = _mm512_fmadd_ps(low, _mm512_set1_ps(1.0f / 254.0f), total);
        }
        __m512 unit = _mm512_mul_ps(_mm512_set1_ps(p.unit[r]), _mm512_loadu_ps(p.scale + o + j));
        _mm512_storeu_ps(p.out + r * task->outputs + o + j, _mm512_mul_ps(total, unit));
      }
  }
  _tile_release();
}

/* ---- calls ----------------------------------------------------------------------------------------------------- */

/* (x f32 [R, in], weight int8 [out, in], its scale f32 [out]) -> f32 [R, out], in `terms` terms, or the same with one
   leading axis on all of them; in a multiple of 64, out of 16, at most MAX_TERMS rows of terms. The weight may be coded
   instead, uint8 [out, in / 64, RECORD], without such an axis. */
static XLA_FFI_Error *product(XLA_FFI_CallFrame *frame, int terms) {
  XLA_FFI_Buffer *x = argument(frame, 0), *weight = argument(frame, 1), *scale = argument(frame, 2), *out = result(frame, 0);
  bool coded = weight->dtype == XLA_FFI_DataType_U8;
  int64_t each = x->rank - 2, matrices = each ? weight->dims[0] : 1;
  Linear task = {.x = x->data,
                 .weight = weight->data,
                 .weight_scale = scale->data,
                 .out = out->data,
                 .rows = x->dims[each],
                 .inner = x->dims[each + 1],
                 .outputs = weight->dims[each]};
  task.width = coded ? task.inner / 64 * RECORD : task.inner;
  bool tiles = atlas_has_tiles && terms * task.rows > FEW;
  task.group = tiles ? TILE / terms : TILE;
  task.groups = (task.rows + task.group - 1) / task.group;
  task.low = terms == 1 ? 0 : tiles ? TILE / 2 : task.rows;
  task.padded = tiles ? task.groups * TILE : terms * task.rows;
  if (task.padded > MAX_TERMS || task.inner % 64 || task.outputs % TILE || each < 0 || each > 1 ||
      weight->rank != 2 + each + coded || (coded && (each || weight->dims[1] * 64 != task.inner || weight->dims[2] != RECORD)))
    return failed(frame, "atlas_linear: shape");
  /* a few parts a thread, so that one that starts late does not hold up the others */
  int64_t share = task.outputs * matrices / (4 * pool_threads(frame)) / (2 * TILE) * (2 * TILE);
  task.strip = share < 4 * TILE ? 4 * TILE : share > task.outputs ? task.outputs : share;
  task.strips = (task.outputs + task.strip - 1) / task.strip;
  int64_t bytes = in_lines(matrices * task.padded * task.inner), units = in_lines(matrices * task.rows * 4);
  int64_t offsets = in_lines(matrices * task.padded * 4);
  char *room = aligned_alloc(64, (size_t)(bytes * (tiles ? 2 : 1) + units + offsets));
  if (!room) return failed(frame, "atlas_linear: out of memory");
  atomic_bool no_room = false;
  task.no_room = &no_room;
  task.unit = (float *)room;
  task.offset = (int32_t *)(room + units);
  task.terms = (int8_t *)(room + units + offsets);
  task.packed = (int32_t *)(room + units + offsets + bytes);
  if (tiles)
    run_parts(frame, pack_terms, &task, matrices * task.groups);
  else
    run_parts(frame, round_rows, &task, matrices * task.rows);
  run_parts(frame, tiles ? multiply_tiles : multiply, &task, matrices * task.strips);
  free(room);
  return no_room ? failed(frame, "atlas_linear: out of memory") : NULL;
}

EXPORT XLA_FFI_Error *atlas_linear(XLA_FFI_CallFrame *frame) {
  return asked_for_version(frame) ? NULL : product(frame, 1);
}

EXPORT XLA_FFI_Error *atlas_precise_linear(XLA_FFI_CallFrame *frame) {
  return asked_for_version(frame) ? NULL : product(frame, 2);
}

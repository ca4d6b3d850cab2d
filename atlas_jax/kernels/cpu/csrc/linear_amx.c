/* GEMM on AMX, 16 outputs by 16 terms at a time: see linear.c. */

#include "linear.h"

/* Rows of a group: 16 terms, the upper ones before the lower. */
enum { ROWS = TILE / 2 };

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
} TileShapes;

/* Two tiles of outputs by two of rows of terms, so that every tile read takes part in two multiplications; `width` and `height`
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
    if (ahead) /* the next outputs' weights are prefetched while these are multiplied */
      for (int j = 0; j < width * TILE; j++)
        _mm_prefetch((const char *)(weight + (width * TILE + j) * inner + i), _MM_HINT_T0);
  }
}

/* Rounds the rows of a group of 16 terms, and lays them out as AMX reads them. */
void pack_terms(const void *data, int64_t part) {
  const Linear *task = data;
  int64_t words = task->inner / 4, m = part / task->groups, first = part % task->groups * ROWS;
  int64_t rows = task->rows - first < ROWS ? task->rows - first : ROWS;
  int8_t *terms = task->terms + part * TILE * task->inner;
  for (int64_t r = 0; r < rows; r++)
    quantize_row(task, m, first + r, terms + r * task->inner, terms + (ROWS + r) * task->inner);
  const int32_t *given = (const int32_t *)terms;
  int32_t *packed = task->packed + part * TILE * words;
  bool used[TILE] = {false};
  for (int64_t r = 0; r < rows; r++) used[r] = used[r + ROWS] = true;
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

static inline __attribute__((always_inline)) void decode_all(const Linear *task, const uint8_t *record, int64_t outputs,
                                                             Form form, int8_t *room) {
  const int64_t needed = outputs * task->inner, span = span_of(form);
  for (int64_t i = 0; i < needed; i += span, record += form) {
#pragma GCC unroll 4
    for (int line = 0; line < (int)form; line += 64)
      _mm_prefetch((const char *)record + outputs * task->width + line, _MM_HINT_T1); /* those of the next call */
    const Record opening = opened(record, form, false);
#pragma GCC unroll 4
    for (int part = 0; part < span / 64; part++)
      _mm512_store_si512(room + i + 64 * part, decoded(record, form, &opening, part, false));
  }
}

/* The weights of `outputs` outputs as bytes: as they lie, or decoded; NULL if there is no room. */
static const int8_t *as_bytes(const Linear *task, const int8_t *weight, int64_t outputs) {
  if (task->form == BYTES) return weight;
  int8_t *room = room_for(task, outputs);
  if (!room) return NULL;
  const uint8_t *record = (const uint8_t *)weight;
  switch (task->form) {
    case BYTES: break;
    case FLOATS: decode_all(task, record, outputs, FLOATS, room); break;
    case LEVELS: decode_all(task, record, outputs, LEVELS, room); break;
    case PAIRS: decode_all(task, record, outputs, PAIRS, room); break;
    case FOUR: decode_all(task, record, outputs, FOUR, room); break;
    case FIVE: decode_all(task, record, outputs, FIVE, room); break;
    case SIX: decode_all(task, record, outputs, SIX, room); break;
  }
  return room;
}

void multiply_tiles(const void *data, int64_t part) {
  const Linear *task = data;
  Gemm p = gemm_of(task, part);
  int64_t inner = task->inner;
  TileShapes shapes = {.palette = 1};
  for (int i = 0; i < 8; i++) shapes.column_bytes[i] = 64, shapes.rows[i] = TILE;
  _tile_loadconfig(&shapes);
  int32_t found[4][TILE][TILE] __attribute__((aligned(64)));
  const int64_t group = inner / 4 * TILE;
  const bool ahead = task->form == BYTES; /* decoding looks ahead by itself */
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
        if (i % 2 >= width) continue;
        __m512i block[TILE];
        for (int j = 0; j < TILE; j++) block[j] = _mm512_load_si512(found[i][j]);
        transpose(block);
        const int64_t row = r / 2 + i / 2 * ROWS;
        for (int j = 0; j < ROWS && row + j < task->rows; j++)
          finish(task, &p, row + j, o + i % 2 * TILE, _mm512_add_epi32(_mm512_slli_epi32(block[j], 8), block[j + ROWS]));
      }
    }
  }
  _tile_release();
}

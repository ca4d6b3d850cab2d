/* CPU kernels of a decode step, called from compiled JAX functions through XLA's foreign function interface.

   XLA's own int8 products took 1.3 to 4 times as long for 2 to 256 rows of SmolLM2-135M's weights (medians, two shared cores
   with AMX). These read weights, keys and values once, as they lie. Sums of products are exact integers, and what a row
   gets depends on that row alone, so results are the same for any batch, any number of threads, and with or without
   drafts. The definitions are `linear` and `ref_window_attention` in Python; the tests compare. */

#define _GNU_SOURCE
#include <cpuid.h>
#include <immintrin.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "xla/ffi/api/c_api.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")

static bool has_tiles;

/* What this processor runs: 0 nothing, 1 AVX-512 VNNI, 2 AMX tiles too. To be asked before anything else. */
int atlas_supported(void) {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")))
    return 0;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return 1; /* amx-tile, amx-int8 */
#ifdef __linux__
  const long request_permission = 0x1023, tile_data = 18; /* the kernel saves tiles only for processes that asked */
  has_tiles = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#endif
  return has_tiles ? 2 : 1;
}

/* ---- threads -------------------------------------------------------------------------------------------------------

   A call cuts its work into parts and offers them to XLA's own pool. The caller takes parts too, until none is left, and
   then waits only for parts that somebody has begun: with every thread of the pool in a call of its own, nobody waits for
   a part that never starts. */

typedef void Part(const void *task, int64_t part);

typedef struct {
  Part *run;
  const void *task;
  int64_t parts;
  atomic_long next, finished, holders;
} Job;

static void take_parts(Job *job) {
  for (;;) {
    long part = atomic_fetch_add(&job->next, 1);
    if (part >= job->parts) return;
    job->run(job->task, part);
    atomic_fetch_add(&job->finished, 1);
  }
}

static void release(Job *job) {
  if (atomic_fetch_sub(&job->holders, 1) == 1) free(job);
}

static void help(void *data) {
  take_parts(data);
  release(data);
}

static int64_t pool_threads(const XLA_FFI_CallFrame *frame) {
  int64_t count = 1;
  XLA_FFI_ThreadPool_NumThreads_Args args = {.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
                                             .ctx = frame->ctx,
                                             .num_threads = &count};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&args);
  if (error) {
    XLA_FFI_Error_Destroy_Args destroy = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
    frame->api->XLA_FFI_Error_Destroy(&destroy);
    return 1;
  }
  return count;
}

static void run_parts(const XLA_FFI_CallFrame *frame, Part *run, const void *task, int64_t parts) {
  int64_t helpers = pool_threads(frame) - 1;
  if (helpers > parts - 1) helpers = parts - 1;
  Job *job = helpers > 0 ? malloc(sizeof(Job)) : NULL;
  if (!job) {
    for (int64_t part = 0; part < parts; part++) run(task, part);
    return;
  }
  *job = (Job){.run = run, .task = task, .parts = parts};
  atomic_init(&job->next, 0);
  atomic_init(&job->finished, 0);
  atomic_init(&job->holders, 1);
  for (int64_t i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args args = {.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
                                             .ctx = frame->ctx,
                                             .task = help,
                                             .data = job};
    atomic_fetch_add(&job->holders, 1);
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&args);
    if (error) {
      XLA_FFI_Error_Destroy_Args destroy = {.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
      frame->api->XLA_FFI_Error_Destroy(&destroy);
      release(job);
    }
  }
  take_parts(job);
  while (atomic_load(&job->finished) < parts) _mm_pause();
  release(job);
}

/* ---- calling convention ---------------------------------------------------------------------------------------- */

static XLA_FFI_Error *failed(const XLA_FFI_CallFrame *frame, const char *message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = message,
                                    .errc = XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

/* XLA first asks every handler for the version it was built for. */
static bool asked_for_version(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return true;
}

static XLA_FFI_Buffer *argument(const XLA_FFI_CallFrame *frame, int index) { return frame->args.args[index]; }

static XLA_FFI_Buffer *result(const XLA_FFI_CallFrame *frame, int index) { return frame->rets.rets[index]; }

/* ---- linear --------------------------------------------------------------------------------------------------------

   y[r, o] = (Σ high[r]·w[o] + Σ low[r]·w[o] / 254) · scale[r] · weight_scale[o], rows of `low` after those of `high`,
   or without them. The processor multiplies unsigned by signed bytes: a weight w is read as w + 128 (its top bit
   flipped), and 128 · Σ x is taken off the sum. */

enum { OUTPUTS = 4, ROWS = 4, TILE = 16, MAX_TERMS = 256 };

typedef struct {
  const int8_t *terms;  /* [2·rows or rows, inner] */
  const int8_t *weight; /* [outputs, inner] */
  const float *row_scale, *weight_scale;
  const int32_t *offset; /* 128 · Σ of each row of terms */
  const int32_t *packed; /* the terms as AMX reads them, [groups of 16 rows, inner / 4, 16], four bytes each */
  float *out;            /* [rows, outputs] */
  int64_t rows, term_rows, inner, outputs, strip;
} Linear;

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

/* Four outputs of up to four rows of terms; the sums lie at [row · 4 + output]. */
static inline __attribute__((always_inline)) __m512i block(const int8_t *terms, const int8_t *weight, int64_t inner,
                                                           int rows) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  __m512i sum[16];
  for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_si512();
  for (int64_t i = 0; i < inner; i += 64) {
    __m512i w[OUTPUTS];
    for (int o = 0; o < OUTPUTS; o++) w[o] = _mm512_xor_si512(_mm512_loadu_si512(weight + o * inner + i), flip);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      __m512i x = _mm512_loadu_si512(terms + r * inner + i);
#pragma GCC unroll 4
      for (int o = 0; o < OUTPUTS; o++) sum[r * OUTPUTS + o] = _mm512_dpbusd_epi32(sum[r * OUTPUTS + o], w[o], x);
    }
  }
  return lane_sums(sum);
}

static void linear_part(const void *data, int64_t part) {
  const Linear *task = data;
  int64_t first = part * task->strip, last = first + task->strip;
  if (last > task->outputs) last = task->outputs;
  int32_t sums[ROWS * OUTPUTS] __attribute__((aligned(64)));
  int32_t held[MAX_TERMS * OUTPUTS];
  for (int64_t o = first; o < last; o += OUTPUTS) {
    const int8_t *weight = task->weight + o * task->inner;
    for (int64_t r = 0; r < task->term_rows; r += ROWS) {
      const int8_t *terms = task->terms + r * task->inner;
      int64_t rows = task->term_rows - r < ROWS ? task->term_rows - r : ROWS;
      __m512i found = rows == 4   ? block(terms, weight, task->inner, 4)
                      : rows == 3 ? block(terms, weight, task->inner, 3)
                      : rows == 2 ? block(terms, weight, task->inner, 2)
                                  : block(terms, weight, task->inner, 1);
      _mm512_store_si512(sums, found);
      for (int64_t i = 0; i < rows; i++)
        for (int j = 0; j < OUTPUTS; j++) held[(r + i) * OUTPUTS + j] = sums[i * OUTPUTS + j] - task->offset[r + i];
    }
    for (int64_t r = 0; r < task->rows; r++)
      for (int j = 0; j < OUTPUTS; j++) {
        float total = (float)held[r * OUTPUTS + j];
        if (task->term_rows > task->rows) total += (float)held[(task->rows + r) * OUTPUTS + j] * (1.0f / 254.0f);
        task->out[r * task->outputs + o + j] = total * (task->row_scale[r] * task->weight_scale[o + j]);
      }
  }
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

/* The same on AMX, signed by signed. */
static void linear_tiles(const void *data, int64_t part) {
  const Linear *task = data;
  int64_t first = part * task->strip, last = first + task->strip, inner = task->inner;
  if (last > task->outputs) last = task->outputs;
  int64_t padded = (task->term_rows + TILE - 1) / TILE * TILE;
  TileShapes shapes = {.palette = 1};
  for (int i = 0; i < 8; i++) shapes.column_bytes[i] = 64, shapes.rows[i] = TILE;
  _tile_loadconfig(&shapes);
  int32_t sums[MAX_TERMS][2 * TILE] __attribute__((aligned(64)));
  int32_t found[4][TILE][TILE] __attribute__((aligned(64)));
  const int64_t group = inner / 4 * TILE;
  for (int64_t o = first; o < last; o += 2 * TILE) {
    const int8_t *weight = task->weight + o * inner;
    int width = last - o > TILE ? 2 : 1;
    for (int64_t r = 0; r < padded; r += 2 * TILE) {
      const int32_t *terms = task->packed + r / TILE * group;
      int height = padded - r > TILE ? 2 : 1;
      if (width == 2 && height == 2)
        tile_block(weight, terms, inner, group, 2, 2, r == 0);
      else if (width == 2)
        tile_block(weight, terms, inner, group, 2, 1, r == 0);
      else if (height == 2)
        tile_block(weight, terms, inner, group, 1, 2, r == 0);
      else
        tile_block(weight, terms, inner, group, 1, 1, r == 0);
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
        __m512 total = _mm512_cvtepi32_ps(_mm512_load_si512(sums[r] + j));
        if (task->term_rows > task->rows) {
          __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(sums[task->rows + r] + j));
          total = _mm512_fmadd_ps(low, _mm512_set1_ps(1.0f / 254.0f), total);
        }
        __m512 unit = _mm512_mul_ps(_mm512_set1_ps(task->row_scale[r]), _mm512_loadu_ps(task->weight_scale + o + j));
        _mm512_storeu_ps(task->out + r * task->outputs + o + j, _mm512_mul_ps(total, unit));
      }
  }
  _tile_release();
}

/* (terms int8 [R or 2R, in], scale f32 [R, 1], weight int8 [out, in], its scale f32 [out]) -> f32 [R, out];
   at most MAX_TERMS rows of terms, in a multiple of 64, out of 16. */
XLA_FFI_Error *atlas_linear(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *terms = argument(frame, 0), *scale = argument(frame, 1), *weight = argument(frame, 2);
  XLA_FFI_Buffer *weight_scale = argument(frame, 3), *out = result(frame, 0);
  int32_t offset[MAX_TERMS];
  Linear task = {.terms = terms->data,
                 .weight = weight->data,
                 .row_scale = scale->data,
                 .weight_scale = weight_scale->data,
                 .offset = offset,
                 .out = out->data,
                 .rows = out->dims[0],
                 .term_rows = terms->dims[0],
                 .inner = weight->dims[1],
                 .outputs = weight->dims[0]};
  if (task.term_rows > MAX_TERMS || task.inner % 64 || task.outputs % TILE) return failed(frame, "atlas_linear: shape");
  /* a few parts a thread, so that one that starts late does not hold up the others */
  int64_t share = task.outputs / (4 * pool_threads(frame)) / (2 * TILE) * (2 * TILE);
  task.strip = share < 4 * TILE ? 4 * TILE : share;
  int64_t parts = (task.outputs + task.strip - 1) / task.strip;
  int32_t *packed = NULL;
  if (has_tiles) {
    int64_t words = task.inner / 4, padded = (task.term_rows + TILE - 1) / TILE * TILE;
    packed = aligned_alloc(64, (size_t)(padded * words) * 4);
    if (!packed) return failed(frame, "atlas_linear: out of memory");
    task.packed = packed;
    const int32_t *given = terms->data;
    for (int64_t r = 0; r < padded; r += TILE)
      for (int64_t i = 0; i < words; i += TILE) {
        __m512i block[TILE];
        for (int64_t j = 0; j < TILE; j++)
          block[j] = r + j < task.term_rows ? _mm512_loadu_si512(given + (r + j) * words + i) : _mm512_setzero_si512();
        transpose(block);
        for (int64_t j = 0; j < TILE; j++) _mm512_store_si512(packed + r * words + (i + j) * TILE, block[j]);
      }
  } else {
    for (int64_t r = 0; r < task.term_rows; r++) {
      int32_t sum = 0;
      for (int64_t i = 0; i < task.inner; i++) sum += task.terms[r * task.inner + i];
      offset[r] = 128 * sum;
    }
  }
  run_parts(frame, has_tiles ? linear_tiles : linear_part, &task, parts);
  free(packed);
  return NULL;
}

/* ---- attention -----------------------------------------------------------------------------------------------------

   Softmax over a row's pages and sinks, for each row and KV head on its own: one page's scores at a time, then the
   weighted sum of values in float32. A key that is not seen weighs exactly 0; a page nobody sees is not read. */

enum { PAGE = 128 };

typedef struct {
  const float *q, *q_sink;         /* [B, T, H, D] */
  const int8_t *k, *v;             /* [B, N, K, P, D] */
  const float *k_scale, *v_scale;  /* [B, N, K, P] */
  const float *sink_k, *sink_v;    /* [B, K, S, D] */
  const uint8_t *seen, *sinks_seen; /* [B, T, N, P], [B, T] */
  const float *scale;
  float *out; /* [B, T, H, D] */
  int64_t tokens, heads, kv_heads, dim, pages, sinks;
} Attention;

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

/* One query of one head. */
typedef struct {
  const float *q_sink;
  float *out;
  const uint8_t *seen;
  int8_t *rounded; /* [D] */
  float *score;    /* [N · P], later the weights */
  float *total;    /* [D] */
  float unit, peak, mass, sink_score[16];
  int32_t offset;
  int64_t sinks;
} Query;

enum { TOGETHER = 4, TOKENS = 8 };

static void round_query(Query *query, const float *q, int64_t dim, float scale) {
  float largest = 1e-30f;
  for (int64_t d = 0; d < dim; d++) largest = __builtin_fabsf(q[d]) > largest ? __builtin_fabsf(q[d]) : largest;
  int32_t sum = 0;
  for (int64_t d = 0; d < dim; d++) {
    query->rounded[d] = (int8_t)__builtin_rintf(q[d] * (127.0f / largest));
    sum += query->rounded[d];
  }
  query->offset = 128 * sum;
  query->unit = largest * (1.0f / 127.0f) * scale;
  memset(query->total, 0, sizeof(float) * (size_t)dim);
}

/* Scores of a page's keys, the largest of them, and −1e30 for those not seen. */
static inline __attribute__((always_inline)) __m512 score_page_of(const Query *query, const int8_t *keys,
                                                                  const float *scale, int64_t n, int64_t dim,
                                                                  __m512 peak) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  for (int64_t p = 0; p < PAGE; p += 16) {
    __m512i dots[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) dots[i] = _mm512_setzero_si512();
    for (int64_t d = 0; d < dim; d += 64) {
      __m512i q = _mm512_loadu_si512(query->rounded + d);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        dots[i] = _mm512_dpbusd_epi32(dots[i], _mm512_xor_si512(_mm512_loadu_si512(keys + (p + i) * dim + d), flip), q);
    }
    __m512i whole = _mm512_sub_epi32(lane_sums(dots), _mm512_set1_epi32(query->offset));
    __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(query->unit));
    found = _mm512_mul_ps(found, _mm512_loadu_ps(scale + p));
    __m128i mask = _mm_loadu_si128((const __m128i *)(query->seen + n * PAGE + p));
    found = _mm512_mask_blend_ps(_mm_test_epi8_mask(mask, mask), _mm512_set1_ps(-1e30f), found);
    peak = _mm512_max_ps(peak, found);
    _mm512_storeu_ps(query->score + n * PAGE + p, found);
  }
  return peak;
}

/* For the common size the loop over dimensions is gone, and all sums stay in registers. */
static __m512 score_page(const Query *query, const int8_t *keys, const float *scale, int64_t n, int64_t dim, __m512 peak) {
  return dim == 64 ? score_page_of(query, keys, scale, n, 64, peak) : score_page_of(query, keys, scale, n, dim, peak);
}

/* Adds a page's values to the totals of all queries, each by its weights. */
static void add_values(Query *query, const int8_t *values, int64_t n, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64) {
    __m512 sum[TOGETHER * 4];
#pragma GCC unroll 16
    for (int i = 0; i < TOGETHER * 4; i++) sum[i] = _mm512_loadu_ps(query[i / 4].total + d + i % 4 * 16);
    const float *weight[TOGETHER];
#pragma GCC unroll 4
    for (int j = 0; j < TOGETHER; j++) weight[j] = query[j].score + n * PAGE;
    for (int64_t p = 0; p < PAGE; p++) {
      const int8_t *value = values + p * dim + d;
      __m512 v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        v[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(value + 16 * i))));
#pragma GCC unroll 16
      for (int i = 0; i < TOGETHER * 4; i++) sum[i] = _mm512_fmadd_ps(_mm512_set1_ps(weight[i / 4][p]), v[i % 4], sum[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < TOGETHER * 4; i++) _mm512_storeu_ps(query[i / 4].total + d + i % 4 * 16, sum[i]);
  }
}

/* Some tokens of one row and KV head, a few queries at a time. */
static void attention_part(const void *data, int64_t part) {
  const Attention *task = data;
  int64_t blocks = (task->tokens + TOKENS - 1) / TOKENS;
  int64_t first = part % blocks * TOKENS, row = part / blocks, b = row / task->kv_heads, kv = row % task->kv_heads;
  int64_t tokens = task->tokens - first < TOKENS ? task->tokens - first : TOKENS;
  int64_t groups = task->heads / task->kv_heads, dim = task->dim, keys = task->pages * PAGE;
  const float *sink_k = task->sink_k + row * task->sinks * dim, *sink_v = task->sink_v + row * task->sinks * dim;
  size_t room = (size_t)(keys + dim) * sizeof(float) + (size_t)dim;
  char *memory = malloc(room * TOGETHER);
  if (!memory) abort();
  for (int64_t i = 0; i < tokens * groups; i += TOGETHER) {
    Query query[TOGETHER];
    int count = tokens * groups - i < TOGETHER ? (int)(tokens * groups - i) : TOGETHER;
    for (int j = 0; j < TOGETHER; j++) {
      query[j].score = (float *)(memory + room * (size_t)j);
      query[j].total = query[j].score + keys;
      query[j].rounded = (int8_t *)(query[j].total + dim);
      if (j >= count) { /* nobody: weights of 0 */
        memset(query[j].score, 0, sizeof(float) * (size_t)(keys + dim));
        continue;
      }
      int64_t t = b * task->tokens + first + (i + j) / groups;
      int64_t place = (t * task->heads + kv * groups + (i + j) % groups) * dim;
      query[j].out = task->out + place;
      query[j].q_sink = task->q_sink + place;
      query[j].seen = task->seen + t * keys;
      query[j].sinks = task->sinks_seen[t] ? task->sinks : 0;
      round_query(&query[j], task->q + place, dim, *task->scale);
    }
    bool used[task->pages];
    for (int64_t n = 0; n < task->pages; n++) {
      __m512i any = _mm512_setzero_si512();
      for (int j = 0; j < count; j++)
        for (int64_t p = 0; p < PAGE; p += 64) any = _mm512_or_si512(any, _mm512_loadu_si512(query[j].seen + n * PAGE + p));
      used[n] = _mm512_test_epi8_mask(any, any) != 0;
    }
    for (int j = 0; j < count; j++) {
      __m512 peak = _mm512_set1_ps(-1e30f);
      for (int64_t n = 0; n < task->pages; n++) {
        int64_t page = ((b * task->pages + n) * task->kv_heads + kv) * PAGE;
        if (used[n]) peak = score_page(&query[j], task->k + page * dim, task->k_scale + page, n, dim, peak);
      }
      query[j].peak = _mm512_reduce_max_ps(peak);
      for (int64_t s = 0; s < query[j].sinks; s++) {
        __m512 dot = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += 16)
          dot = _mm512_fmadd_ps(_mm512_loadu_ps(query[j].q_sink + d), _mm512_loadu_ps(sink_k + s * dim + d), dot);
        float score = _mm512_reduce_add_ps(dot) * *task->scale;
        query[j].sink_score[s] = score;
        query[j].peak = score > query[j].peak ? score : query[j].peak;
      }
      __m512 mass = _mm512_setzero_ps();
      for (int64_t n = 0; n < task->pages; n++) {
        int64_t page = ((b * task->pages + n) * task->kv_heads + kv) * PAGE;
        float *weight = query[j].score + n * PAGE;
        for (int64_t p = 0; used[n] && p < PAGE; p += 16) {
          __m512 w = exp_ps(_mm512_sub_ps(_mm512_loadu_ps(weight + p), _mm512_set1_ps(query[j].peak)));
          mass = _mm512_add_ps(mass, w);
          _mm512_storeu_ps(weight + p, _mm512_mul_ps(w, _mm512_loadu_ps(task->v_scale + page + p)));
        }
      }
      query[j].mass = _mm512_reduce_add_ps(mass);
    }
    for (int64_t n = 0; n < task->pages; n++)
      if (used[n]) add_values(query, task->v + ((b * task->pages + n) * task->kv_heads + kv) * PAGE * dim, n, dim);
    for (int j = 0; j < count; j++) {
      float *total = query[j].total;
      for (int64_t s = 0; s < query[j].sinks; s++) {
        __m512 w = exp_ps(_mm512_set1_ps(query[j].sink_score[s] - query[j].peak));
        query[j].mass += _mm512_cvtss_f32(w);
        for (int64_t d = 0; d < dim; d += 16)
          _mm512_storeu_ps(total + d, _mm512_fmadd_ps(w, _mm512_loadu_ps(sink_v + s * dim + d), _mm512_loadu_ps(total + d)));
      }
      for (int64_t d = 0; d < dim; d++) query[j].out[d] = total[d] / query[j].mass;
    }
  }
  free(memory);
}

/* (q, q_sink f32 [B, T, H, D]; k int8 [B, N, K, P, D], its scale f32 [B, N, K, P]; v and its scale; sink_k, sink_v f32
   [B, K, S, D]; seen bool [B, T, N, P]; sinks_seen bool [B, T]; scale f32 []) -> f32 [B, T, H, D];
   D a multiple of 64, P = 128, S ≤ 16. */
XLA_FFI_Error *atlas_attention(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *q = argument(frame, 0), *k = argument(frame, 2), *sink_k = argument(frame, 6);
  Attention task = {.q = q->data,
                    .q_sink = argument(frame, 1)->data,
                    .k = k->data,
                    .k_scale = argument(frame, 3)->data,
                    .v = argument(frame, 4)->data,
                    .v_scale = argument(frame, 5)->data,
                    .sink_k = sink_k->data,
                    .sink_v = argument(frame, 7)->data,
                    .seen = argument(frame, 8)->data,
                    .sinks_seen = argument(frame, 9)->data,
                    .scale = argument(frame, 10)->data,
                    .out = result(frame, 0)->data,
                    .tokens = q->dims[1],
                    .heads = q->dims[2],
                    .kv_heads = k->dims[2],
                    .dim = q->dims[3],
                    .pages = k->dims[1],
                    .sinks = sink_k->dims[2]};
  if (task.dim % 64 || k->dims[3] != PAGE || task.sinks > 16) return failed(frame, "atlas_attention: shape");
  run_parts(frame, attention_part, &task, q->dims[0] * task.kv_heads * ((task.tokens + TOKENS - 1) / TOKENS));
  return NULL;
}

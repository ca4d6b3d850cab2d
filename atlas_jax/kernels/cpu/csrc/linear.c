/* GEMM and GEMV of float rows with 8-bit weights.

   A row is quantised to whole numbers of two 8-bit terms, x ≈ (256 · high + low) · unit, and

     y[r, o] = (256 · Σ high[r]·w[o] + Σ low[r]·w[o]) · unit[r] · weight_scale[o]

   with exact sums, so the result has the bits of the same function in Python. On AVX-512 VNNI the processor multiplies
   unsigned by signed bytes: a weight w is read as w + 128 (its top bit flipped), and 128 · Σ x is taken off the sum.

   The unit is such that most numbers of a row fit the lower term, and those that stand out take the upper one: for many
   rows it is multiplied only where four of them are not all 0.

   What usually comes just before, a residual sum, a norm or a gate, is done while a row is quantised: by all threads and
   without a trip through memory (SmolLM2-135M, 128 tokens: 0.33 ms a layer for the gate alone as an XLA program, which
   takes one thread).

   Weights may lie coded, in fewer bits than 8 (`PackedArray`, forms.h). Then a few outputs' weights are decoded to where the
   caches keep them, just before they are multiplied: for few rows a GEMM takes as long as its weights take to come from
   memory. */

#include "linear.h"

/* Rows up to which VNNI is ahead of AMX, which multiplies by 16 terms or none (packed weights of SmolLM2-135M, all layers:
   8.7 against 7.0 ms for one term, 12.9 against 8.0 for two; for four terms AMX, 8.8 against 10.2). */
enum { FEW = 2 };

/* out = x · σ(z) · up, where z = x for SiLU, for GELU (by tanh) z = 2 √(2 / π) (x + 0.044715 x³), and for swiglu_oai
   z = 1.702 x, of x and up that are cut, and up one more */
static inline __attribute__((always_inline)) void gate_by(const float *x, int64_t block, Activation activation, int64_t count,
                                                          float *out) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t b = 0; b < count; b += block)
    for (int64_t i = b; i < b + block; i += 16) {
      __m512 v = _mm512_loadu_ps(x + b + i), up = _mm512_loadu_ps(x + b + i + block), z = v;
      if (activation == SWIGLU_OAI) {
        const __m512 limit = _mm512_set1_ps(7.0f);
        v = _mm512_min_ps(v, limit);
        up = _mm512_add_ps(_mm512_max_ps(_mm512_min_ps(up, limit), _mm512_set1_ps(-7.0f)), one);
        z = _mm512_mul_ps(v, _mm512_set1_ps(1.702f));
      } else if (activation == GELU_TANH) {
        __m512 square = _mm512_mul_ps(v, v);
        z = _mm512_mul_ps(v, _mm512_fmadd_ps(square, _mm512_set1_ps(0.0713548163f), _mm512_set1_ps(1.59576912f)));
      }
      __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(z)));
      __m512 share = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_GE_OQ), e, one);
      v = _mm512_mul_ps(v, _mm512_div_ps(share, _mm512_add_ps(one, e)));
      _mm512_storeu_ps(out + i, _mm512_mul_ps(v, up));
    }
}

/* `gate_by`, made for each activation. */
static void gate(const float *x, int64_t block, Activation activation, int64_t count, float *out) {
  switch (activation) {
    case SILU: gate_by(x, block, SILU, count, out); break;
    case GELU_TANH: gate_by(x, block, GELU_TANH, count, out); break;
    case SWIGLU_OAI: gate_by(x, block, SWIGLU_OAI, count, out); break;
  }
}

/* Quantises x to its lower terms and the list of the upper ones that are not 0; returns their unit, and Σ of the numbers. */
static float split_sparsely(const float *x, int64_t count, const Fours *fours, int8_t *low, int32_t *sum) {
  const Unit unit = unit_of(x, count);
  const __m512i sixteen = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i all = _mm512_setzero_si512();
  int32_t listed = 0;
  for (int64_t i = 0; i < count; i += 64) {
    __m128i upper[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * j), _mm512_set1_ps(unit.inverse)));
      all = _mm512_add_epi32(all, whole);
      _mm_storeu_si128((__m128i *)(low + i + 16 * j), _mm512_cvtepi32_epi8(whole));
      upper[j] = upper_terms(whole);
    }
    __m512i uppers = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(upper[1], upper[0])),
                                        _mm256_set_m128i(upper[3], upper[2]), 1);
    __m512i at = _mm512_add_epi32(sixteen, _mm512_set1_epi32((int32_t)(i / 4)));
    __mmask16 used = _mm512_test_epi32_mask(uppers, uppers);
    _mm512_storeu_si512(fours->at + listed, _mm512_maskz_compress_epi32(used, at));
    _mm512_storeu_si512(fours->four + listed, _mm512_maskz_compress_epi32(used, uppers));
    listed += __builtin_popcount(used);
  }
  *fours->count = listed;
  const size_t rest = (size_t)(count / 4 - listed) * 4;
  memset(fours->at + listed, 0, rest);
  memset(fours->four + listed, 0, rest);
  *sum = _mm512_reduce_add_epi32(all);
  return unit.unit;
}

void quantize_row(const Linear *task, int64_t m, int64_t row, int8_t *high, int8_t *low) {
  static _Thread_local Room room;
  const float *x = task->x + (m * task->rows + row) * task->inner * (task->block ? 2 : 1);
  if (task->added) {
    float *sum = task->sum + row * task->inner;
    sum_row(x, task->added + row * task->inner, task->post_gain, task->eps, task->inner, sum);
    x = sum;
  }
  if (task->gain || task->block) {
    float *made = (float *)grown(&room, task->inner * (int64_t)sizeof(float));
    if (!made) {
      *task->no_room = true;
      return;
    }
    if (task->block)
      gate(x, task->block, task->activation, task->inner, made);
    else
      norm_row(x, task->gain, task->eps, task->inner, made);
    x = made;
  }
  const Fours fours = fours_of(task, m, row);
  int32_t sum;
  task->unit[m * task->rows + row] = high ? split_row(x, task->inner, high, low, &sum)
                                          : split_sparsely(x, task->inner, &fours, low, &sum);
  task->offset[m * task->rows + row] = (int32_t)(128u * (uint32_t)sum);
}

int8_t *room_for(const Linear *task, int64_t outputs) {
  static _Thread_local Room room;
  char *bytes = grown(&room, outputs * task->inner);
  if (!bytes) *task->no_room = true;
  return (int8_t *)bytes;
}

/* What is done to a row before it is quantised. */
typedef enum { NOTHING, NORM, SUM_NORM, GATE } Before;

/* (x f32 [R, in], weight int8 [out, in], its scale f32 [out]) -> f32 [R, out], or the same with one leading axis on all of
   them; in a multiple of 64, out of 16, at most MAX_ROWS rows. The weight may be coded instead, uint8 [out, records,
   bytes of one], without such an axis. With NORM, a fourth argument is the gain, f32 [in], and an attribute `eps`; with SUM_NORM,
   a fifth is what is added to x first, f32 [R, in], a sixth, if there is one, the gain of its own norm, and a second result
   is the sum, f32 [R, in]. With GATE, x is f32 [R, 2 · in], and attributes are `block` and `activation`. */
static XLA_FFI_Error *matmul(XLA_FFI_CallFrame *frame, Before before) {
  XLA_FFI_Buffer *x = argument(frame, 0), *weight = argument(frame, 1), *scale = argument(frame, 2), *out = result(frame, 0);
  bool coded = weight->dtype == XLA_FFI_DataType_U8;
  int64_t each = x->rank - 2, matrices = each ? weight->dims[0] : 1, given = x->dims[each + 1];
  Linear task = {.x = x->data,
                 .weight = weight->data,
                 .weight_scale = scale->data,
                 .out = out->data,
                 .rows = x->dims[each],
                 .inner = before == GATE ? given / 2 : given,
                 .outputs = weight->dims[each]};
  if (before == NORM || before == SUM_NORM) {
    task.gain = argument(frame, 3)->data;
    task.eps = *(const float *)attribute(frame, "eps");
  }
  if (before == SUM_NORM) {
    task.added = argument(frame, 4)->data;
    task.post_gain = frame->args.size > 5 ? argument(frame, 5)->data : NULL;
    task.sum = result(frame, 1)->data;
  } else if (before == GATE) {
    task.block = *(const int64_t *)attribute(frame, "block");
    const int64_t activation = *(const int64_t *)attribute(frame, "activation");
    if (activation < SILU || activation > SWIGLU_OAI) return failed(frame, "atlas_linear: activation");
    task.activation = (Activation)activation;
    if (task.block <= 0 || task.block % TILE || task.inner % task.block) return failed(frame, "atlas_linear: gate");
  }
  const int64_t record = !coded ? BYTES : weight->rank == 3 ? weight->dims[2] : 0;
  if (coded && !is_coded(record)) return failed(frame, "atlas_linear: record");
  task.form = (Form)record;
  const int64_t span = span_of(task.form);
  task.width = task.inner / span * record;
  bool tiles = atlas_has_tiles && task.rows > FEW, few = !tiles && task.rows < BLOCK;
  task.groups = (task.rows + TILE / 2 - 1) / (TILE / 2);
  task.padded = tiles ? task.groups * TILE : few ? 2 * task.rows : task.rows;
  if (task.rows > MAX_ROWS || largest_of(task.inner) < 127 || task.inner % 64 || task.outputs % TILE || each < 0 || each > (before == NOTHING) ||
      weight->rank != 2 + each + coded || (coded && (each || weight->dims[1] * span != task.inner)))
    return failed(frame, "atlas_linear: shape");
  /* a few parts a thread, so that one that starts late does not hold up the others; more where a part takes long */
  task.threads = pool_threads(frame);
  const int64_t parts = (few || tiles ? 4 : 16) * task.threads, least = (few || tiles ? 4 : 2) * TILE;
  int64_t share = task.outputs * matrices / parts / (2 * TILE) * (2 * TILE);
  task.strip = share < least ? least : share > task.outputs ? task.outputs : share;
  task.strips = (task.outputs + task.strip - 1) / task.strip;
  int64_t bytes = in_lines(matrices * task.padded * task.inner), units = in_lines(matrices * task.rows * 4);
  int64_t listed = tiles ? bytes : few ? 0 : matrices * task.padded * fours_size(task.inner) * 4;
  static _Thread_local Room kept;
  char *room = grown(&kept, 2 * units + bytes + listed);
  if (!room) return failed(frame, "atlas_linear: out of memory");
  atomic_bool no_room = false;
  task.no_room = &no_room;
  task.unit = (float *)room;
  task.offset = (int32_t *)(room + units);
  task.terms = (int8_t *)(room + 2 * units);
  task.packed = task.fours = (int32_t *)(room + 2 * units + bytes);
  run_parts(frame, tiles ? pack_terms : few ? quantize_few : quantize_many, &task, matrices * (tiles ? task.groups : task.rows));
  run_parts(frame, tiles ? multiply_tiles : few ? multiply_few : multiply_many, &task, matrices * task.strips);
  return no_room ? failed(frame, "atlas_linear: out of memory") : NULL;
}

EXPORT XLA_FFI_Error *atlas_linear(XLA_FFI_CallFrame *frame) {
  return asked_for_version(frame) ? NULL : matmul(frame, NOTHING);
}

EXPORT XLA_FFI_Error *atlas_normed_linear(XLA_FFI_CallFrame *frame) {
  return asked_for_version(frame) ? NULL : matmul(frame, NORM);
}

EXPORT XLA_FFI_Error *atlas_summed_linear(XLA_FFI_CallFrame *frame) {
  return asked_for_version(frame) ? NULL : matmul(frame, SUM_NORM);
}

EXPORT XLA_FFI_Error *atlas_gated_linear(XLA_FFI_CallFrame *frame) {
  return asked_for_version(frame) ? NULL : matmul(frame, GATE);
}

/* What is done with the scores of a whole vocabulary: the greedy choice, and the memory's part in it. A row is cut into
   strips of fixed length whose results are put together in order, so that they do not depend on the threads. */

#include "common.h"
#include "vectors.h"

enum { STRIP = 4096 };

static inline int64_t strips_of(int64_t vocab) { return (vocab + STRIP - 1) / STRIP; }

static inline int64_t strip_end(int64_t vocab, int64_t first) { return first + STRIP < vocab ? first + STRIP : vocab; }

/* ---- greedy ---------------------------------------------------------------------------------------------------- */

typedef struct {
  const float *scores; /* [rows, vocab] */
  float *peak, *mass;  /* [rows, strips] */
  int64_t vocab;
} Greedy;

static void greedy_part(const void *data, int64_t part) {
  const Greedy *task = data;
  int64_t strips = strips_of(task->vocab), first = part % strips * STRIP, end = strip_end(task->vocab, first);
  const float *scores = task->scores + part / strips * task->vocab;
  const __m512 least = _mm512_set1_ps(-3e38f);
  __m512 peak = least;
  for (int64_t i = first; i < end; i += 16)
    peak = _mm512_max_ps(peak, _mm512_mask_loadu_ps(least, lanes(i, end), scores + i));
  task->peak[part] = _mm512_reduce_max_ps(peak);
  peak = _mm512_set1_ps(task->peak[part]);
  __m512 mass = _mm512_setzero_ps();
  for (int64_t i = first; i < end; i += 16) {
    __m512 score = _mm512_mask_loadu_ps(least, lanes(i, end), scores + i);
    mass = _mm512_add_ps(mass, exp_ps(_mm512_sub_ps(score, peak)));
  }
  task->mass[part] = _mm512_reduce_add_ps(mass);
}

/* scores f32 [R, V] -> the first of the best tokens s32 [R], and the logarithm of Σ exp(score) f32 [R]. */
EXPORT XLA_FFI_Error *atlas_greedy(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *scores = argument(frame, 0);
  int64_t rows = scores->dims[0], vocab = scores->dims[1], strips = strips_of(vocab);
  int32_t *token = result(frame, 0)->data;
  float *log_mass = result(frame, 1)->data, *room = malloc((size_t)(2 * rows * strips) * sizeof(float));
  if (!room) return failed(frame, "atlas_greedy: out of memory");
  Greedy task = {.scores = scores->data, .peak = room, .mass = room + rows * strips, .vocab = vocab};
  run_parts(frame, greedy_part, &task, rows * strips);
  for (int64_t r = 0; r < rows; r++) {
    const float *peak = task.peak + r * strips, *mass = task.mass + r * strips, *row = task.scores + r * vocab;
    int64_t best = 0;
    for (int64_t s = 1; s < strips; s++)
      if (peak[s] > peak[best]) best = s;
    __m512 total = _mm512_setzero_ps();
    for (int64_t s = 0; s < strips; s++) {
      __m512 factor = exp_ps(_mm512_set1_ps(peak[s] - peak[best]));
      total = _mm512_fmadd_ps(factor, _mm512_set1_ps(mass[s]), total);
    }
    log_mass[r] = peak[best] + _mm512_cvtss_f32(log_ps(total));
    token[r] = (int32_t)(best * STRIP);
    for (int64_t i = best * STRIP, end = strip_end(vocab, i); i < end; i += 16) {
      __mmask16 found = _mm512_mask_cmp_ps_mask(lanes(i, end), _mm512_maskz_loadu_ps(lanes(i, end), row + i),
                                                _mm512_set1_ps(peak[best]), _CMP_EQ_OQ);
      if (!found) continue;
      token[r] = (int32_t)(i + __builtin_ctz(found));
      break;
    }
  }
  free(room);
  return NULL;
}

/* ---- blend ----------------------------------------------------------------------------------------------------- */

/* What a strip, and later a row, has to say. */
typedef struct {
  float peak, mass, moment; /* of the logits: the largest l, Σ exp(l − peak), Σ exp(l − peak)·(l − peak) */
  float best, second, sixth; /* of the memory's scores: the largest, the next smaller one, Σ max(s, 0)⁶ */
} Facts;

typedef struct {
  const float *logits, *scores; /* [rows, vocab] */
  const int8_t *seen;           /* [rows / tokens, vocab] */
  const uint8_t *active;        /* [rows] */
  float *mixed;                 /* [rows, vocab] */
  Facts *facts;                 /* [rows, strips] */
  const float *model, *memory, *peak; /* [rows]: factors on exp(l − peak) and on max(s, 0)⁶; no factor on an inactive row */
  int64_t vocab, tokens;
} Blend;

static const float unseen = -2.0f;

/* A score, or what stands for one where the token was never seen or the lane lies past the end. */
static inline __m512 score_at(const Blend *task, int64_t row, int64_t i, __mmask16 used) {
  __m128i seen = _mm_maskz_loadu_epi8(used, task->seen + row / task->tokens * task->vocab + i);
  return _mm512_mask_loadu_ps(_mm512_set1_ps(unseen), _mm_cmpgt_epi8_mask(seen, _mm_setzero_si128()),
                              task->scores + row * task->vocab + i);
}

static inline __m512 sixth_power(__m512 score) {
  score = _mm512_max_ps(score, _mm512_setzero_ps());
  __m512 cube = _mm512_mul_ps(_mm512_mul_ps(score, score), score);
  return _mm512_mul_ps(cube, cube);
}

static void facts_part(const void *data, int64_t part) {
  const Blend *task = data;
  int64_t strips = strips_of(task->vocab), row = part / strips, first = part % strips * STRIP;
  int64_t end = strip_end(task->vocab, first);
  if (!task->active[row]) return;
  const float *logits = task->logits + row * task->vocab;
  const __m512 least = _mm512_set1_ps(-3e38f);
  __m512 peak = least, best = _mm512_set1_ps(unseen), second = best, sixth = _mm512_setzero_ps();
  for (int64_t i = first; i < end; i += 16) {
    __mmask16 used = lanes(i, end);
    peak = _mm512_max_ps(peak, _mm512_mask_loadu_ps(least, used, logits + i));
    __m512 score = score_at(task, row, i, used);
    __mmask16 more = _mm512_cmp_ps_mask(score, best, _CMP_GT_OQ), less = _mm512_cmp_ps_mask(score, best, _CMP_LT_OQ);
    second = _mm512_mask_max_ps(second, less, second, score);
    second = _mm512_mask_mov_ps(second, more, best);
    best = _mm512_max_ps(best, score);
    sixth = _mm512_add_ps(sixth, sixth_power(score));
  }
  Facts *facts = task->facts + part;
  facts->peak = _mm512_reduce_max_ps(peak);
  facts->best = _mm512_reduce_max_ps(best);
  __mmask16 others = _mm512_cmp_ps_mask(best, _mm512_set1_ps(facts->best), _CMP_LT_OQ);
  facts->second = _mm512_reduce_max_ps(_mm512_mask_mov_ps(second, others, best));
  facts->sixth = _mm512_reduce_add_ps(sixth);
  peak = _mm512_set1_ps(facts->peak);
  __m512 mass = _mm512_setzero_ps(), moment = mass;
  for (int64_t i = first; i < end; i += 16) {
    __m512 shifted = _mm512_sub_ps(_mm512_mask_loadu_ps(least, lanes(i, end), logits + i), peak);
    __m512 weight = exp_ps(shifted);
    mass = _mm512_add_ps(mass, weight);
    moment = _mm512_mask_add_ps(moment, _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_GT_OQ), moment,
                                _mm512_mul_ps(weight, shifted));
  }
  facts->mass = _mm512_reduce_add_ps(mass);
  facts->moment = _mm512_reduce_add_ps(moment);
}

static float exp_of(float x) { return _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(x))); }

static Facts whole_row(const Facts *strip, int64_t strips) {
  Facts all = {.peak = -3e38f, .best = unseen, .second = unseen};
  for (int64_t s = 0; s < strips; s++) {
    all.peak = strip[s].peak > all.peak ? strip[s].peak : all.peak;
    all.best = strip[s].best > all.best ? strip[s].best : all.best;
  }
  for (int64_t s = 0; s < strips; s++) {
    float factor = exp_of(strip[s].peak - all.peak), other = strip[s].best < all.best ? strip[s].best : strip[s].second;
    all.mass += factor * strip[s].mass;
    if (factor > 0) all.moment += factor * (strip[s].moment + strip[s].mass * (strip[s].peak - all.peak));
    all.second = other > all.second ? other : all.second;
    all.sixth += strip[s].sixth;
  }
  return all;
}

static void mix_part(const void *data, int64_t part) {
  const Blend *task = data;
  int64_t strips = strips_of(task->vocab), row = part / strips, first = part % strips * STRIP;
  int64_t end = strip_end(task->vocab, first);
  const float *logits = task->logits + row * task->vocab;
  float *mixed = task->mixed + row * task->vocab;
  if (task->memory[row] < 0) {
    memcpy(mixed + first, logits + first, (size_t)(end - first) * sizeof(float));
    return;
  }
  const __m512 peak = _mm512_set1_ps(task->peak[row]), model = _mm512_set1_ps(task->model[row]);
  const __m512 memory = _mm512_set1_ps(task->memory[row]), least = _mm512_set1_ps(1e-37f);
  for (int64_t i = first; i < end; i += 16) {
    __mmask16 used = lanes(i, end);
    __m512 weight = exp_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(used, logits + i), peak));
    __m512 p = _mm512_fmadd_ps(memory, sixth_power(score_at(task, row, i, used)), _mm512_mul_ps(model, weight));
    _mm512_mask_storeu_ps(mixed + i, used, log_ps(_mm512_max_ps(p, least)));
  }
}

/* (logits f32 [B, T, V], scores f32 [B, T, V], seen int8 [B, V], active bool [B, T], log odds f32 [B], gate f32 [4])
   -> the mixture's logits f32 [B, T, V], and the gate f32 [B, T]; an inactive row's logits as they came, and 0. */
EXPORT XLA_FFI_Error *atlas_blend(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *logits = argument(frame, 0);
  int64_t tokens = logits->dims[1], rows = logits->dims[0] * tokens, vocab = logits->dims[2], strips = strips_of(vocab);
  const uint8_t *active = argument(frame, 3)->data;
  const float *log_odds = argument(frame, 4)->data, *gate = argument(frame, 5)->data;
  float *passed = result(frame, 1)->data;
  char *room = malloc((size_t)(rows * strips) * sizeof(Facts) + (size_t)(3 * rows) * sizeof(float));
  if (!room) return failed(frame, "atlas_blend: out of memory");
  float *model = (float *)(room + (size_t)(rows * strips) * sizeof(Facts)), *memory = model + rows, *peak = memory + rows;
  Blend task = {.logits = logits->data,
                .scores = argument(frame, 1)->data,
                .seen = argument(frame, 2)->data,
                .active = active,
                .mixed = result(frame, 0)->data,
                .facts = (Facts *)room,
                .model = model,
                .memory = memory,
                .peak = peak,
                .vocab = vocab,
                .tokens = tokens};
  run_parts(frame, facts_part, &task, rows * strips);
  for (int64_t r = 0; r < rows; r++) {
    Facts all = active[r] ? whole_row(task.facts + r * strips, strips) : (Facts){.best = unseen};
    passed[r] = 0.0f;
    memory[r] = -1.0f;
    if (all.best <= 0) continue;
    float entropy = _mm512_cvtss_f32(log_ps(_mm512_set1_ps(all.mass))) - all.moment / all.mass;
    float odds = gate[0] + gate[1] * all.best + gate[2] * (all.best - all.second) + gate[3] * entropy;
    float g = 1.0f / (1.0f + exp_of(-(odds + log_odds[r / tokens])));
    passed[r] = g;
    model[r] = (1.0f - g) / all.mass;
    memory[r] = g / (all.sixth > 1e-30f ? all.sixth : 1e-30f);
    peak[r] = all.peak;
  }
  run_parts(frame, mix_part, &task, rows * strips);
  free(room);
  return NULL;
}

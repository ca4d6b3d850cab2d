/* The greedy choice from the scores of a whole vocabulary. */

#include "common.h"
#include "vectors.h"

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

/* Draws from filtered distributions: top-k, typical-p, top-p and min-p in this order, then one number decides.

   A filter keeps the tokens up to a threshold that is found exactly, by counting in three rounds of some bits of the number
   each, instead of by sorting. A row is the work of one thread, so what it gets depends on that row alone. */

#include "common.h"
#include "vectors.h"

enum { HIGH = 11, MIDDLE = 11, LOW = 10, BLOCK = 128 };

typedef struct {
  const float *scores;                                        /* [rows, vocab] */
  const float *temperature, *top_p, *min_p, *typical_p, *uniform; /* [rows] */
  const int32_t *top_k;                                       /* [rows] */
  int32_t *token;                                             /* [rows] */
  int64_t vocab;
} Draw;

/* How a search orders numbers ≥ 0, and what each weighs. */
typedef struct {
  const float *cost, *mass; /* [vocab]; `mass` NULL: 1 for every token of a cost other than 0 */
  uint32_t flip;            /* all bits for an order from the largest number down */
  int64_t vocab;
} Order;

static inline uint32_t key_at(const Order *order, int64_t i) {
  uint32_t bits;
  memcpy(&bits, order->cost + i, sizeof bits);
  return bits ^ order->flip;
}

/* The first key, in order, with which all keys up to it weigh `target`, and more than nothing; the last there is if all
   together weigh less. */
static uint32_t threshold(const Order *order, double target) {
  const int shifts[] = {MIDDLE + LOW, LOW, 0}, widths[] = {HIGH, MIDDLE, LOW};
  uint32_t prefix = 0;
  double before = 0;
  for (int round = 0; round < 3; round++) {
    double weight[1 << HIGH] = {0};
    const int shift = shifts[round], above = shift + widths[round];
    const uint32_t mask = (1u << widths[round]) - 1;
    for (int64_t i = 0; i < order->vocab; i++) {
      uint32_t key = key_at(order, i);
      if (round && key >> above != prefix) continue;
      weight[key >> shift & mask] += order->mass ? order->mass[i] : order->cost[i] > 0;
    }
    uint32_t bucket = 0, last = 0;
    for (uint32_t b = 0; b <= mask; b++)
      if (weight[b] > 0) last = b;
    while (bucket < last && (before + weight[bucket] < target || before + weight[bucket] <= 0)) before += weight[bucket++];
    prefix = prefix << widths[round] | bucket;
  }
  return prefix;
}

/* Leaves a token its weight if its key is at most `limit`. */
static void keep(const Order *order, uint32_t limit, float *weight) {
  for (int64_t i = 0; i < order->vocab; i++)
    if (key_at(order, i) > limit) weight[i] = 0.0f;
}

static double total_of(const float *weight, int64_t vocab) {
  double total = 0;
  for (int64_t i = 0; i < vocab; i += BLOCK) {
    int64_t end = i + BLOCK < vocab ? i + BLOCK : vocab;
    float block = 0;
    for (int64_t j = i; j < end; j++) block += weight[j];
    total += block;
  }
  return total;
}

/* Distance of each token's surprise from the mean surprise; far away for tokens without a weight. */
static void distances(const float *weight, float *distance, int64_t vocab) {
  const __m512 inverse = _mm512_set1_ps((float)(1.0 / total_of(weight, vocab))), zero = _mm512_setzero_ps();
  const __m512 least = _mm512_set1_ps(1.2e-38f), far = _mm512_set1_ps(1e30f);
  __m512d low = _mm512_setzero_pd(), high = low;
  for (int64_t i = 0; i < vocab; i += 16) {
    __mmask16 used = lanes(i, vocab);
    __m512 p = _mm512_mul_ps(_mm512_maskz_loadu_ps(used, weight + i), inverse);
    __m512 surprise = _mm512_sub_ps(zero, log_ps(_mm512_max_ps(p, least)));
    __m512 part = _mm512_mul_ps(p, surprise);
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(part)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(part, 1)));
    _mm512_mask_storeu_ps(distance + i, used, _mm512_mask_mov_ps(surprise, _mm512_cmp_ps_mask(p, zero, _CMP_LE_OQ), far));
  }
  const __m512 mean = _mm512_set1_ps((float)_mm512_reduce_add_pd(_mm512_add_pd(low, high)));
  for (int64_t i = 0; i < vocab; i += 16) {
    __mmask16 used = lanes(i, vocab);
    __m512 surprise = _mm512_maskz_loadu_ps(used, distance + i);
    __mmask16 near = _mm512_cmp_ps_mask(surprise, far, _CMP_LT_OQ);
    _mm512_mask_storeu_ps(distance + i, used, _mm512_mask_abs_ps(surprise, near, _mm512_sub_ps(surprise, mean)));
  }
}

/* The token at which the running sum of weights passes `uniform` of the total; never one of weight zero. */
static int32_t pick(const float *weight, int64_t vocab, float uniform) {
  double target = uniform * total_of(weight, vocab), running = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < vocab; i += BLOCK) {
    int64_t end = i + BLOCK < vocab ? i + BLOCK : vocab;
    double block = total_of(weight + i, end - i), inside = running;
    if (block <= 0) continue;
    for (int64_t j = i; running + block > target && j < end; j++) {
      inside += weight[j];
      if (weight[j] > 0 && inside > target) return (int32_t)j;
    }
    for (int64_t j = i; j < end; j++) last = weight[j] > 0 ? j : last;
    if (running + block > target) break; /* rounding left the target a hair past the block's own sum */
    running += block;
  }
  return (int32_t)last;
}

static void draw_part(const void *data, int64_t row) {
  const Draw *task = data;
  const float temperature = task->temperature[row], *scores = task->scores + row * task->vocab;
  const int64_t vocab = task->vocab;
  task->token[row] = 0;
  if (!(temperature > 0)) return;
  float *weight = malloc((size_t)(2 * vocab) * sizeof(float)), *distance = weight + vocab;
  if (!weight) abort();
  const __m512 least = _mm512_set1_ps(-3e38f);
  __m512 peak = least;
  for (int64_t i = 0; i < vocab; i += 16) {
    __mmask16 used = lanes(i, vocab);
    peak = _mm512_max_ps(peak, _mm512_mask_loadu_ps(least, used, scores + i));
  }
  peak = _mm512_set1_ps(_mm512_reduce_max_ps(peak));
  for (int64_t i = 0; i < vocab; i += 16) {
    __mmask16 used = lanes(i, vocab);
    /* the best token's exponent is exactly 0 however small the temperature: there is always a weight to draw from */
    __m512 x = _mm512_sub_ps(_mm512_mask_loadu_ps(least, used, scores + i), peak);
    _mm512_mask_storeu_ps(weight + i, used, exp_ps(_mm512_div_ps(x, _mm512_set1_ps(temperature))));
  }
  const Order largest = {.cost = weight, .flip = ~0u, .vocab = vocab};
  if (task->top_k[row] > 0) keep(&largest, threshold(&largest, task->top_k[row]), weight);
  if (task->typical_p[row] < 1) {
    distances(weight, distance, vocab);
    const Order nearest = {.cost = distance, .mass = weight, .vocab = vocab};
    keep(&nearest, threshold(&nearest, task->typical_p[row] * total_of(weight, vocab)), weight);
  }
  if (task->top_p[row] < 1) {
    const Order likeliest = {.cost = weight, .mass = weight, .flip = ~0u, .vocab = vocab};
    keep(&likeliest, threshold(&likeliest, task->top_p[row] * total_of(weight, vocab)), weight);
  }
  if (task->min_p[row] > 0) {
    float best = 0;
    for (int64_t i = 0; i < vocab; i++) best = weight[i] > best ? weight[i] : best;
    for (int64_t i = 0; i < vocab; i++) weight[i] = weight[i] >= task->min_p[row] * best ? weight[i] : 0.0f;
  }
  task->token[row] = pick(weight, vocab, task->uniform[row]);
  free(weight);
}

/* (scores f32 [R, V]; temperature, top_p, min_p, typical_p, uniform f32 [R]; top_k s32 [R]) -> tokens s32 [R], 0 for rows of
   temperature 0. */
EXPORT XLA_FFI_Error *atlas_draw(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *scores = argument(frame, 0);
  Draw task = {.scores = scores->data,
               .temperature = argument(frame, 1)->data,
               .top_p = argument(frame, 2)->data,
               .min_p = argument(frame, 3)->data,
               .typical_p = argument(frame, 4)->data,
               .uniform = argument(frame, 5)->data,
               .top_k = argument(frame, 6)->data,
               .token = result(frame, 0)->data,
               .vocab = scores->dims[1]};
  run_parts(frame, draw_part, &task, scores->dims[0]);
  return NULL;
}

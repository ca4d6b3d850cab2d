/* The memory's next-token distribution: scores of the tokens it has seen, and their mixture with the model's logits, which
   is written over them. Only the codes of tokens a session has seen are read. */

#include "common.h"
#include "vectors.h"

enum { GROUP = 16 };

/* What a strip, and later a row, has to say. */
typedef struct {
  float peak, mass, moment; /* of the logits: the largest l, Σ exp(l − peak), Σ exp(l − peak)·(l − peak) */
  float best, second, sixth; /* of the memory's scores: the largest, the next smaller one, Σ max(s, 0)⁶ */
} Facts;

/* What was read out of the memory, as terms of 8 bits; `offset` is what flipping the codes' signs to unsigned adds. */
typedef struct {
  const int8_t *high, *low;
  int32_t offset;
  float unit;
} Asked;

/* How a row is mixed: factors on exp(l − peak) and on max(s, 0)⁶. */
typedef struct {
  float peak, model, memory;
  bool mixed;
} Mixture;

typedef struct {
  float *logits, *scores;   /* [rows, vocab] */
  const int8_t *codes;      /* [vocab, size] */
  const float *code_scale;  /* [vocab] */
  const int8_t *seen;       /* [rows / tokens, vocab] */
  const uint8_t *active;    /* [rows] */
  const Asked *asked;       /* [rows] */
  const Mixture *mixture;   /* [rows] */
  Facts *facts;             /* [rows, strips] */
  int64_t rows, tokens, vocab, size;
} Blend;

static const float unseen = -2.0f;

static inline __mmask16 seen_at(const Blend *task, int64_t row, int64_t i, int64_t end) {
  return _mm_test_epi8_mask(_mm_maskz_loadu_epi8(lanes(i, end), task->seen + row / task->tokens * task->vocab + i),
                            _mm_set1_epi8(-1));
}

static inline __attribute__((always_inline)) __m512i dot_products(const int8_t *const codes[GROUP], int64_t size,
                                                              const int8_t *terms) {
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  __m512i sum[GROUP];
#pragma GCC unroll 16
  for (int j = 0; j < GROUP; j++) sum[j] = _mm512_setzero_si512();
  for (int64_t i = 0; i < size; i += 64) {
    __m512i x = _mm512_loadu_si512(terms + i);
#pragma GCC unroll 16
    for (int j = 0; j < GROUP; j++) add_dots(&sum[j], _mm512_xor_si512(_mm512_loadu_si512(codes[j] + i), flip), x);
  }
  return lane_sums(sum);
}

/* Scores of 16 tokens, the same bits as `linear`'s. */
static __m512 scores_of(const Blend *task, const Asked *asked, const int32_t tokens[GROUP]) {
  const int8_t *codes[GROUP];
  for (int j = 0; j < GROUP; j++) codes[j] = task->codes + tokens[j] * task->size;
  __m512i high = dot_products(codes, task->size, asked->high), low = dot_products(codes, task->size, asked->low);
  const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  const __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(whole, _mm512_set1_epi32(asked->offset)));
  __m512 scale = _mm512_i32gather_ps(_mm512_loadu_si512(tokens), task->code_scale, sizeof(float));
  return _mm512_mul_ps(total, _mm512_mul_ps(_mm512_set1_ps(asked->unit), scale));
}

/* The tokens of a strip that the row's session has seen; how many. */
static int64_t list_seen(const Blend *task, int64_t row, int64_t first, int64_t end, int32_t *tokens) {
  const __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int64_t count = 0;
  for (int64_t i = first; i < end; i += GROUP) {
    __mmask16 seen = seen_at(task, row, i, end);
    if (!seen) continue;
    _mm512_mask_compressstoreu_epi32(tokens + count, seen, _mm512_add_epi32(places, _mm512_set1_epi32((int32_t)i)));
    count += __builtin_popcount(seen);
  }
  return count;
}

static inline __m512 sixth_power(__m512 score) {
  score = _mm512_max_ps(score, _mm512_setzero_ps());
  __m512 cube = _mm512_mul_ps(_mm512_mul_ps(score, score), score);
  return _mm512_mul_ps(cube, cube);
}

/* Rows of one strip are neighbours, so that its codes are still in the cache for the next row. */
static void facts_part(const void *data, int64_t part) {
  const Blend *task = data;
  int64_t row = part % task->rows, strip = part / task->rows, first = strip * STRIP, end = strip_end(task->vocab, first);
  if (!task->active[row]) return;
  const float *logits = task->logits + row * task->vocab;
  float *scores = task->scores + row * task->vocab;
  const __m512 least = _mm512_set1_ps(-3e38f), nothing = _mm512_set1_ps(unseen);
  int32_t tokens[STRIP + GROUP];
  int64_t count = list_seen(task, row, first, end, tokens);
  for (int j = 0; count && j < GROUP; j++) tokens[count + j] = tokens[0];
  __m512 peak = least, best = nothing, second = nothing, sixth = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += GROUP) {
    __mmask16 listed = lanes(i, count);
    __m512 score = _mm512_mask_mov_ps(nothing, listed, scores_of(task, task->asked + row, tokens + i));
    _mm512_mask_i32scatter_ps(scores, listed, _mm512_loadu_si512(tokens + i), score, sizeof(float));
    __mmask16 more = _mm512_cmp_ps_mask(score, best, _CMP_GT_OQ), less = _mm512_cmp_ps_mask(score, best, _CMP_LT_OQ);
    second = _mm512_mask_max_ps(second, less, second, score);
    second = _mm512_mask_mov_ps(second, more, best);
    best = _mm512_max_ps(best, score);
    sixth = _mm512_add_ps(sixth, sixth_power(score));
  }
  for (int64_t i = first; i < end; i += GROUP)
    peak = _mm512_max_ps(peak, _mm512_mask_loadu_ps(least, lanes(i, end), logits + i));
  Facts *facts = task->facts + row * strips_of(task->vocab) + strip;
  facts->peak = _mm512_reduce_max_ps(peak);
  facts->best = _mm512_reduce_max_ps(best);
  __mmask16 others = _mm512_cmp_ps_mask(best, _mm512_set1_ps(facts->best), _CMP_LT_OQ);
  facts->second = _mm512_reduce_max_ps(_mm512_mask_mov_ps(second, others, best));
  facts->sixth = _mm512_reduce_add_ps(sixth);
  peak = _mm512_set1_ps(facts->peak);
  __m512 mass = _mm512_setzero_ps(), moment = mass;
  for (int64_t i = first; i < end; i += GROUP) {
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

static float log_of(float x) { return _mm512_cvtss_f32(log_ps(_mm512_set1_ps(x))); }

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

/* Where the memory says nothing, the mixture's logarithm is the model's and a constant. */
static void mix_part(const void *data, int64_t part) {
  const Blend *task = data;
  int64_t row = part % task->rows, first = part / task->rows * STRIP, end = strip_end(task->vocab, first);
  const Mixture *mixture = task->mixture + row;
  if (!mixture->mixed) return;
  float *logits = task->logits + row * task->vocab, *scores = task->scores + row * task->vocab;
  const float floor_of_p = 1e-37f, share = mixture->model > floor_of_p ? mixture->model : floor_of_p;
  const __m512 peak = _mm512_set1_ps(mixture->peak), log_share = _mm512_set1_ps(log_of(share));
  const __m512 model = _mm512_set1_ps(mixture->model), memory = _mm512_set1_ps(mixture->memory);
  const __m512 least = _mm512_set1_ps(floor_of_p), log_least = _mm512_set1_ps(log_of(floor_of_p));
  for (int64_t i = first; i < end; i += GROUP) {
    __mmask16 used = lanes(i, end), seen = seen_at(task, row, i, end);
    __m512 shifted = _mm512_sub_ps(_mm512_maskz_loadu_ps(used, logits + i), peak);
    __m512 mixed = _mm512_max_ps(_mm512_add_ps(shifted, log_share), log_least);
    if (seen) {
      __m512 score = _mm512_maskz_loadu_ps(seen, scores + i);
      __m512 p = _mm512_fmadd_ps(memory, sixth_power(score), _mm512_mul_ps(model, exp_ps(shifted)));
      __mmask16 heard = _mm512_cmp_ps_mask(score, _mm512_setzero_ps(), _CMP_GT_OQ);
      mixed = _mm512_mask_mov_ps(mixed, heard, log_ps(_mm512_max_ps(p, least)));
    }
    _mm512_mask_storeu_ps(logits + i, used, mixed);
  }
}

/* (logits f32 [B · T, V], what was read out f32 [B, T, C], codes int8 [V, C], their scale f32 [V], seen int8 [B, V],
   active bool [B, T], log odds f32 [B, T], gate f32 [4]) -> the mixture's logits f32 [B · T, V] in the place of the model's,
   the gate f32 [B, T], and room for scores f32 [B · T, V]; an inactive row's logits stay as they came, and its gate is 0. */
EXPORT XLA_FFI_Error *atlas_blend(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *logits = argument(frame, 0), *codes = argument(frame, 2);
  int64_t rows = logits->dims[0], vocab = logits->dims[1], strips = strips_of(vocab), size = codes->dims[1];
  int64_t tokens = rows / argument(frame, 4)->dims[0];
  if (size % 64) return failed(frame, "atlas_blend: shape");
  const uint8_t *active = argument(frame, 5)->data;
  const float *found = argument(frame, 1)->data, *log_odds = argument(frame, 6)->data, *gate = argument(frame, 7)->data;
  float *mixed = result(frame, 0)->data, *passed = result(frame, 1)->data;
  if (mixed != logits->data) memcpy(mixed, logits->data, (size_t)(rows * vocab) * sizeof(float));
  int64_t for_terms = in_lines(2 * rows * size), for_facts = in_lines(rows * strips * (int64_t)sizeof(Facts));
  int64_t for_asked = in_lines(rows * (int64_t)sizeof(Asked)), for_mixtures = in_lines(rows * (int64_t)sizeof(Mixture));
  char *room = aligned_alloc(64, (size_t)(for_terms + for_facts + for_asked + for_mixtures));
  if (!room) return failed(frame, "atlas_blend: out of memory");
  int8_t *terms = (int8_t *)room;
  Asked *asked = (Asked *)(room + for_terms + for_facts);
  Mixture *mixture = (Mixture *)(room + for_terms + for_facts + for_asked);
  Blend task = {.logits = mixed,
                .scores = result(frame, 2)->data,
                .codes = codes->data,
                .code_scale = argument(frame, 3)->data,
                .seen = argument(frame, 4)->data,
                .active = active,
                .asked = asked,
                .mixture = mixture,
                .facts = (Facts *)(room + for_terms),
                .rows = rows,
                .tokens = tokens,
                .vocab = vocab,
                .size = size};
  for (int64_t r = 0; r < rows; r++) {
    if (!active[r]) continue;
    int8_t *high = terms + 2 * r * size, *low = high + size;
    int32_t sum;
    float unit = split_row(found + r * size, size, high, low, &sum);
    asked[r] = (Asked){high, low, (int32_t)(128u * (uint32_t)sum), unit};
  }
  run_parts(frame, facts_part, &task, rows * strips);
  for (int64_t r = 0; r < rows; r++) {
    passed[r] = 0.0f;
    mixture[r].mixed = false;
    if (!active[r]) continue;
    Facts all = whole_row(task.facts + r * strips, strips);
    if (all.best <= 0) continue;
    float entropy = log_of(all.mass) - all.moment / all.mass;
    float odds = gate[0] + gate[1] * all.best + gate[2] * (all.best - all.second) + gate[3] * entropy;
    float g = 1.0f / (1.0f + exp_of(-(odds + log_odds[r])));
    passed[r] = g;
    mixture[r] = (Mixture){
        .peak = all.peak, .model = (1.0f - g) / all.mass, .memory = g / (all.sixth > 1e-30f ? all.sixth : 1e-30f), .mixed = true};
  }
  run_parts(frame, mix_part, &task, rows * strips);
  free(room);
  return NULL;
}

/* Weights of a model's file in the forms of forms.h: rows are rounded to 8 bits with a scale of their own, and each is coded
   again as the file has it, with the file's own codes, and its factors in units of that scale.

   Called from Python on as many threads as there are cores, each with rows of its own (8 billion weights of Q4_K and Q6_K in
   NumPy: a minute). */

#include "forms.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

/* The types of a file that are taken, by their number in GGML. */
enum { Q4_K = 12, Q5_K = 13, Q6_K = 14 };

enum { SUPER = 256, Q4_K_BYTES = 144, Q5_K_BYTES = 176, Q6_K_BYTES = 210 };

/* 256 weights of a file: `d · factor · code − least · below`, by blocks of 32; of Q6_K `d · factor · (code − 32)`, by 16. */
typedef struct {
  float d, least;
  int8_t factor[16];
  uint8_t below[8], codes[SUPER];
} Super;

static float half_to_float(const uint8_t *at) {
  uint16_t half;
  memcpy(&half, at, sizeof half);
  return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(half))));
}

static void read_super(int type, const uint8_t *block, Super *out) {
  if (type == Q6_K) {
    const uint8_t *low = block, *high = block + 128;
    for (int n = 0; n < 2; n++, low += 64, high += 32)
      for (int i = 0; i < 32; i++) {
        uint8_t *codes = out->codes + 128 * n + i;
        codes[0] = (uint8_t)((low[i] & 15) | (high[i] & 3) << 4);
        codes[32] = (uint8_t)((low[i + 32] & 15) | (high[i] >> 2 & 3) << 4);
        codes[64] = (uint8_t)(low[i] >> 4 | (high[i] >> 4 & 3) << 4);
        codes[96] = (uint8_t)(low[i + 32] >> 4 | high[i] >> 6 << 4);
      }
    memcpy(out->factor, block + 192, 16);
    out->d = half_to_float(block + 208);
    out->least = 0;
    return;
  }
  out->d = half_to_float(block);
  out->least = half_to_float(block + 2);
  const uint8_t *packed = block + 4;
  for (int j = 0; j < 4; j++) {
    out->factor[j] = (int8_t)(packed[j] & 63);
    out->below[j] = packed[j + 4] & 63;
    out->factor[j + 4] = (int8_t)((packed[j + 8] & 15) | packed[j] >> 6 << 4);
    out->below[j + 4] = (uint8_t)(packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4);
  }
  const uint8_t *high = block + 16, *low = type == Q5_K ? block + 48 : block + 16;
  for (int j = 0; j < 4; j++, low += 32)
    for (int i = 0; i < 32; i++) {
      uint8_t first = 0, second = 0;
      if (type == Q5_K) {
        first = (uint8_t)((high[i] >> 2 * j & 1) << 4);
        second = (uint8_t)((high[i] >> (2 * j + 1) & 1) << 4);
      }
      out->codes[64 * j + i] = (uint8_t)((low[i] & 15) | first);
      out->codes[64 * j + 32 + i] = (uint8_t)(low[i] >> 4 | second);
    }
}

/* The weights as floats, and the largest of them. */
static float weights_of(int type, const Super *super, float *out) {
  const int size = type == Q6_K ? 16 : 32;
  __m512 peak = _mm512_setzero_ps();
  for (int b = 0; b < SUPER / size; b++) {
    const float step = super->d * (float)super->factor[b];
    const float base = type == Q6_K ? -32.0f * step : -super->least * (float)super->below[b];
    for (int i = b * size; i < (b + 1) * size; i += 16) {
      __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(super->codes + i))));
      __m512 w = _mm512_add_ps(_mm512_mul_ps(code, _mm512_set1_ps(step)), _mm512_set1_ps(base));
      _mm512_storeu_ps(out + i, w);
      peak = _mm512_max_ps(peak, _mm512_abs_ps(w));
    }
  }
  return _mm512_reduce_max_ps(peak);
}

static float ratio(float a, float b) { return b != 0 ? a / b : 0; }

/* The nearest code; with one more, a weight that is its row's largest could leave 8 bits. */
static uint8_t code_of(float weight, float base, float step, float most) {
  const float code = rintf(ratio(weight - base, step)), top = floorf(ratio(127.0f * 256.0f - base, step));
  return (uint8_t)fmaxf(fminf(code, fminf(top, most)), 0);
}

/* Codes for weights that are given as floats, in units of 1/256 of the scale: of another type than the form's, or with factors
   that have no room in it (only where no block of 256 weights uses its codes). */
static void fit_super(Form form, const float *weights, Super *out) {
  float low[16], step[16], widest = 0, lowest = 0;
  const int size = form == SIX ? 16 : 32, blocks = SUPER / size;
  const float most = form == FOUR ? 15 : form == FIVE ? 31 : 63;
  for (int b = 0; b < blocks; b++) {
    float least = 0, top = 0;
    for (int i = b * size; i < (b + 1) * size; i++) {
      least = fminf(least, weights[i]);
      top = fmaxf(top, weights[i]);
    }
    low[b] = least;
    step[b] = form == SIX ? fmaxf(-least, top) / 31 : (top - least) / most;
    widest = fmaxf(widest, step[b]);
    lowest = fminf(lowest, least);
  }
  const float largest = form == SIX ? 127 : 63;
  out->d = widest / largest;
  out->least = form == SIX ? 0 : -lowest / 63;
  for (int b = 0; b < blocks; b++) {
    out->factor[b] = (int8_t)fminf(ceilf(ratio(step[b], out->d)), largest);
    if (form != SIX) out->below[b] = (uint8_t)fminf(rintf(ratio(-low[b], out->least)), 63);
    const float made = out->d * (float)out->factor[b], base = form == SIX ? -32 * made : -out->least * (float)out->below[b];
    for (int i = b * size; i < (b + 1) * size; i++) out->codes[i] = code_of(weights[i], base, made, most);
    if (made == 0 && form == SIX) memset(out->codes + b * size, 32, (size_t)size);
  }
}

/* Factors as whole numbers of the record's units; whether they have room. */
static bool write_units(Form form, const Super *super, uint8_t *record) {
  const float step = rintf(super->d * (form == SIX ? 2048.0f : 256.0f)), base = rintf(super->least * 64.0f);
  if (!(fabsf(step) <= 32767) || !(base >= 0 && base <= 65535)) return false;
  const int16_t whole_step = (int16_t)step;
  memcpy(record, &whole_step, sizeof whole_step);
  if (form == SIX) {
    memcpy(record + 2, super->factor, 16);
    return true;
  }
  const uint16_t whole_base = (uint16_t)base;
  memcpy(record + 2, &whole_base, sizeof whole_base);
  for (int b = 0; b < 8; b++) record[4 + b] = (uint8_t)(super->factor[b] | super->below[b] >> 4 << 6);
  for (int b = 0; b < 4; b++) record[12 + b] = (uint8_t)((super->below[2 * b] & 15) | (super->below[2 * b + 1] & 15) << 4);
  return true;
}

static void write_codes(Form form, const uint8_t *codes, uint8_t *record) {
  if (form == FOUR) {
    for (int half = 0; half < 2; half++, codes += 128) {
      const __m512i upper = _mm512_slli_epi16(_mm512_loadu_si512(codes + 64), 4);
      _mm512_storeu_si512(record + 16 + 64 * half, _mm512_or_si512(_mm512_loadu_si512(codes), upper));
    }
    return;
  }
  uint8_t *low = record + (form == FIVE ? 48 : 82);
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i high = _mm512_setzero_si512();
  for (int part = 0; part < 4; part++) {
    const __m512i code = _mm512_loadu_si512(codes + 64 * part), lower = _mm512_and_si512(code, nibble);
    const __m512i pairs = _mm512_or_si512(lower, _mm512_srli_epi16(lower, 4));
    _mm256_storeu_si256((__m256i *)(low + 32 * part), _mm512_cvtepi16_epi8(pairs));
    const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(code, 4), nibble);
    const __m512i both = _mm512_or_si512(upper, _mm512_srlv_epi16(upper, _mm512_set1_epi16(form == SIX ? 6 : 7)));
    const __m512i bits = _mm512_and_si512(both, _mm512_set1_epi16(form == SIX ? 15 : 3));
    high = _mm512_or_si512(high, _mm512_sllv_epi16(bits, _mm512_set1_epi16((short)((form == SIX ? 4 : 2) * part))));
  }
  if (form == FIVE) _mm256_storeu_si256((__m256i *)(record + 16), _mm512_cvtepi16_epi8(high));
  if (form == SIX) _mm512_storeu_si512(record + 18, high);
}

static Form own_form(int type) { return type == Q4_K ? FOUR : type == Q5_K ? FIVE : SIX; }

/* Codes `count` rows of `inner` weights, a multiple of 256, of these types, whose bytes in the file lie at `rows`: records
   [count, inner / 256, form], scale [count]. Returns 0, 1 if a weight is not finite, 2 if there is no room to work in, 3 for
   what is not known. */
EXPORT int atlas_pack(int form, const uint8_t *types, const uint8_t *const *rows, int64_t count, int64_t inner, float factor,
                      uint8_t *records, float *scale) {
  if ((form != FOUR && form != FIVE && form != SIX) || inner % SUPER) return 3;
  const int64_t supers = inner / SUPER;
  Super *read = malloc((size_t)supers * sizeof(Super));
  float *weights = malloc((size_t)inner * sizeof(float));
  int outcome = read && weights ? 0 : 2;
  for (int64_t r = 0; r < count && !outcome; r++) {
    const int type = types[r];
    if (type != Q4_K && type != Q5_K && type != Q6_K) {
      outcome = 3;
      break;
    }
    const int64_t bytes = type == Q4_K ? Q4_K_BYTES : type == Q5_K ? Q5_K_BYTES : Q6_K_BYTES;
    float peak = 0;
    for (int64_t s = 0; s < supers; s++) {
      read_super(type, rows[r] + s * bytes, &read[s]);
      if (!isfinite(read[s].d) || !isfinite(read[s].least)) outcome = 1;
      peak = fmaxf(peak, weights_of(type, &read[s], weights + s * SUPER));
    }
    const float inverse = ratio(127.0f * 256.0f, peak);
    scale[r] = peak / 127.0f * factor;
    for (int64_t s = 0; s < supers; s++) {
      uint8_t *record = records + (r * supers + s) * form;
      Super *super = &read[s];
      super->d *= inverse;
      super->least *= inverse;
      if ((int)own_form(type) != form || !write_units((Form)form, super, record)) {
        float *own = weights + s * SUPER;
        for (int i = 0; i < SUPER; i++) own[i] *= inverse;
        fit_super((Form)form, own, super);
        write_units((Form)form, super, record);
      }
      write_codes((Form)form, super->codes, record);
    }
  }
  free(read);
  free(weights);
  return outcome;
}

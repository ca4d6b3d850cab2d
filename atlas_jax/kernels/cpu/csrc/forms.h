/* The forms in which weights of 8 bits lie: as bytes, or coded in fewer bits, and how 64 of them are decoded.

   A coded weight is the upper byte of code · step + base, in 16-bit arithmetic that wraps, or in FLOATS and LEVELS the number
   that a code stands for, shifted or times a step. The definition, and what the bytes of a record are, is `Form` in Python (`kernels.weight_forms`). */

#ifndef ATLAS_FORMS_H
#define ATLAS_FORMS_H

#include "vectors.h"

#include <stdbool.h>
#include <string.h>

/* A form is known by the bytes of its record. */
typedef enum { BYTES = 64, FLOATS = 34, LEVELS = 36, PAIRS = 40, FOUR = 144, FIVE = 176, SIX = 210 } Form;

/* Weights of a record. */
static inline __attribute__((always_inline)) int64_t span_of(Form form) {
  return form == FOUR || form == FIVE || form == SIX ? 256 : 64;
}

static inline bool is_coded(int64_t record) {
  return record == FLOATS || record == LEVELS || record == PAIRS || record == FOUR || record == FIVE || record == SIX;
}

/* Steps and bases of a record's blocks, and what of its codes lies apart; of codes of 4 bits the weights that they are instead,
   16 for each of four blocks a table: looking a weight up takes half as many instructions as multiplying. */
typedef struct {
  __m512i step, base, high, table[2];
} Record;

/* What the codes 0 to 15 of four blocks are, from block `first` on. */
static inline __attribute__((always_inline)) __m512i table_of(__m128i steps, __m128i bases, int first) {
  const __m512i counted = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
  const __m512i lanes = _mm512_set_epi64(0x0003000300030003, 0x0003000300030003, 0x0002000200020002, 0x0002000200020002,
                                         0x0001000100010001, 0x0001000100010001, 0, 0);
  const __m512i block = _mm512_add_epi16(lanes, _mm512_set1_epi16((short)first));
  const __m512i step = _mm512_permutexvar_epi16(block, _mm512_castsi128_si512(steps));
  const __m512i base = _mm512_permutexvar_epi16(block, _mm512_castsi128_si512(bases));
  const __m512i lower = _mm512_add_epi16(_mm512_mullo_epi16(step, counted), base);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_slli_epi16(step, 3));
  return _mm512_packus_epi16(_mm512_srli_epi16(lower, 8), _mm512_srli_epi16(upper, 8));
}

/* What the codes of FLOATS are, in either half of 64 weights that have these shifts: rounded where a shift leaves no whole one. */
static inline __attribute__((always_inline)) __m512i floats_of(uint8_t first, uint8_t second) {
  static const int8_t numbers[9][16] __attribute__((aligned(16))) = {
      {0, 8, 16, 24, 32, 48, 64, 96, 0, -8, -16, -24, -32, -48, -64, -96},
      {0, 4, 8, 12, 16, 24, 32, 48, 0, -4, -8, -12, -16, -24, -32, -48},
      {0, 2, 4, 6, 8, 12, 16, 24, 0, -2, -4, -6, -8, -12, -16, -24},
      {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
      {0, 0, 1, 2, 2, 3, 4, 6, 0, 0, -1, -2, -2, -3, -4, -6},
      {0, 0, 0, 1, 1, 2, 2, 3, 0, 0, 0, -1, -1, -2, -2, -3},
      {0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 0, -1, -1, -2},
      {0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, -1},
      {0}};
  const __m512i lower = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)numbers[first < 8 ? first : 8]));
  return _mm512_mask_broadcast_i32x4(lower, 0xff00, _mm_load_si128((const __m128i *)numbers[second < 8 ? second : 8]));
}

/* What the codes of LEVELS are, in either half of 64 weights that have these steps. */
static inline __attribute__((always_inline)) __m512i levels_of(const uint8_t *steps, short half) {
  const __m256i levels = _mm256_setr_epi16(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
  int16_t step[2];
  memcpy(step, steps, sizeof step);
  __m128i halves[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m256i made = _mm256_add_epi16(_mm256_mullo_epi16(levels, _mm256_set1_epi16(step[i])), _mm256_set1_epi16(half));
    halves[i] = _mm256_cvtepi16_epi8(_mm256_srli_epi16(made, 8));
  }
  return _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(halves[0]), 0xff00, halves[1]);
}

/* What is common to a record's weights. `flipped` weights come with their top bit flipped: w + 128, unsigned. */
static inline __attribute__((always_inline)) Record opened(const uint8_t *record, Form form, bool flipped) {
  const short half = (short)(flipped ? 128 + 0x8000 : 128);
  const __m512i zero = _mm512_setzero_si512();
  Record found = {zero, zero, zero, {zero, zero}};
  if (form == FOUR || form == FIVE) {
    int16_t units[2];
    memcpy(units, record, sizeof units);
    int32_t rest;
    memcpy(&rest, record + 12, sizeof rest);
    const __m128i both = _mm_loadl_epi64((const __m128i *)(record + 4)), nibbles = _mm_cvtsi32_si128(rest);
    __m128i least = _mm_unpacklo_epi8(nibbles, _mm_srli_epi16(nibbles, 4));
    least = _mm_or_si128(_mm_and_si128(least, _mm_set1_epi8(15)), _mm_and_si128(_mm_srli_epi16(both, 2), _mm_set1_epi8(0x30)));
    const __m128i factor = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_and_si128(both, _mm_set1_epi8(63))), 7);
    const __m128i below = _mm_mulhi_epu16(_mm_slli_epi16(_mm_cvtepu8_epi16(least), 10), _mm_set1_epi16(units[1]));
    const __m128i steps = _mm_mulhrs_epi16(factor, _mm_set1_epi16(units[0]));
    const __m128i bases = _mm_sub_epi16(_mm_set1_epi16(half), below);
    if (form == FOUR) {
      found.table[0] = table_of(steps, bases, 0);
      found.table[1] = table_of(steps, bases, 4);
      return found;
    }
    found.step = _mm512_castsi128_si512(steps);
    found.base = _mm512_castsi128_si512(bases);
    found.high = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(record + 16)));
  } else if (form == SIX) {
    int16_t unit;
    memcpy(&unit, record, sizeof unit);
    const __m256i factor = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(record + 2))), 4);
    const __m256i step = _mm256_mulhrs_epi16(factor, _mm256_set1_epi16(unit));
    found.step = _mm512_castsi256_si512(step);
    found.base = _mm512_castsi256_si512(_mm256_sub_epi16(_mm256_set1_epi16(half), _mm256_slli_epi16(step, 5)));
    found.high = _mm512_loadu_si512(record + 18);
  } else if (form == PAIRS) {
    int64_t halves;
    memcpy(&halves, record, sizeof halves);
    const __m512i all = _mm512_set1_epi64(halves);
    const __m512i of_step = _mm512_inserti64x4(_mm512_set1_epi16(0x0504), _mm256_set1_epi16(0x0100), 0);
    found.step = _mm512_shuffle_epi8(all, of_step);
    found.base = _mm512_shuffle_epi8(all, _mm512_add_epi8(of_step, _mm512_set1_epi8(2)));
    if (flipped) found.base = _mm512_xor_si512(found.base, _mm512_set1_epi16((short)0x8000));
  } else if (form == FLOATS) {
    found.table[0] = floats_of(record[0], record[1]);
    if (flipped) found.table[0] = _mm512_xor_si512(found.table[0], _mm512_set1_epi8((char)0x80));
  } else if (form == LEVELS) {
    found.table[0] = levels_of(record, half);
  }
  return found;
}

/* Every 16 bits shifted right, or left by a negative number. */
static inline __attribute__((always_inline)) __m512i shifted(__m512i v, int right) {
  if (!right) return v;
  return right > 0 ? _mm512_srlv_epi16(v, _mm512_set1_epi16((short)right)) : _mm512_sllv_epi16(v, _mm512_set1_epi16((short)-right));
}

/* The `part`th 64 weights of a record that `opened` has looked at. */
static inline __attribute__((always_inline)) __m512i decoded(const uint8_t *record, Form form, const Record *found, int part,
                                                             bool flipped) {
  if (form == BYTES) {
    const __m512i w = _mm512_loadu_si512(record);
    return flipped ? _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80)) : w;
  }
  if (form == FOUR) {
    __m512i codes = _mm512_loadu_si512(record + 16 + 64 * (part / 2));
    if (part % 2) codes = _mm512_srli_epi16(codes, 4);
    const __m512i table = found->table[part / 2];
    const __m512i own = part % 2 ? _mm512_shuffle_i64x2(table, table, 0xfa) : _mm512_shuffle_i64x2(table, table, 0x50);
    return _mm512_shuffle_epi8(own, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
  }
  if (form == FLOATS || form == LEVELS) {
    const __m512i halves = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(record + (form == FLOATS ? 2 : 4))));
    const __m512i upper = _mm512_slli_epi16(_mm512_srli_epi16(halves, 4), 8);
    return _mm512_shuffle_epi8(found->table[0], _mm512_or_si512(_mm512_and_si512(halves, _mm512_set1_epi16(15)), upper));
  }
  const int at = form == PAIRS ? 8 : form == FIVE ? 48 : 82;
  const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(record + at + 32 * part)));
  __m512i even = _mm512_and_si512(codes, _mm512_set1_epi16(15)), odd = _mm512_srli_epi16(codes, 4);
  __m512i step = found->step, base = found->base;
  if (form != PAIRS) {
    /* 16 or 8 of the 32 lanes belong to a block */
    const __m512i lanes =
        form == SIX ? _mm512_set_epi64(0x0003000300030003, 0x0003000300030003, 0x0002000200020002, 0x0002000200020002,
                                       0x0001000100010001, 0x0001000100010001, 0, 0)
                    : _mm512_set_epi64(0x0001000100010001, 0x0001000100010001, 0x0001000100010001, 0x0001000100010001, 0, 0, 0, 0);
    const __m512i block = _mm512_add_epi16(lanes, _mm512_set1_epi16((short)((form == SIX ? 4 : 2) * part)));
    step = _mm512_permutexvar_epi16(block, step);
    base = _mm512_permutexvar_epi16(block, base);
  }
  if (form == FIVE || form == SIX) {
    const int bits = form == SIX ? 2 : 1, shift = 2 * bits * part;
    const __m512i mask = _mm512_set1_epi16(form == SIX ? 0x30 : 0x10);
    const __m512i of_even = shifted(found->high, shift - 4), of_odd = shifted(found->high, shift + bits - 4);
    even = _mm512_ternarylogic_epi32(even, of_even, mask, 0xf8); /* a | (b & c) */
    odd = _mm512_ternarylogic_epi32(odd, of_odd, mask, 0xf8);
  }
  even = _mm512_add_epi16(_mm512_mullo_epi16(even, step), base);
  odd = _mm512_add_epi16(_mm512_mullo_epi16(odd, step), base);
  return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, _mm512_srli_epi16(even, 8), odd);
}

#endif

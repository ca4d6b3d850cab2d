/* Kept pairs: the pairs of a page that leaves a row's window take the places of those with lower scores, packed.

   XLA sorts, and scatters one pair after the other (30 layers of 3 heads, 1 024 pairs, in one run: 8.1 ms). */

#include "common.h"
#include "vectors.h"

#include <math.h>

enum { PAGE = 128, BLOCK = 64, LEVELS = 15, EIGHTHS = 8 };

/* Keys, or values, in 4 bits or 2. */
typedef struct {
  const int8_t *values; /* of the pages: [L, K, P, D] */
  const float *unit;    /* [L, K, P] */
  uint8_t *numbers;     /* [B, M, K, P, D · bits / 8]; pages of all layers */
  uint8_t *step;        /* [B, M, K, P, G] */
  int8_t *offset;
  uint16_t *half_scale; /* [B, M, K, P] */
  int bits;
} Packed;

typedef struct {
  const float *own;                      /* [L, K, P] */
  uint16_t *score;                       /* [B, M, K, P]: upper halves of float32 */
  const int32_t *first, *kept, *capacity; /* [L]: where a layer's pages begin, and its pairs */
  Packed k, v;
  int64_t row, pages, kv_heads, dim;
} Exchange;

/* Numbers in the order of floats, and of indices where those are equal. */
static uint64_t ordered(float value, uint32_t index) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
  return (uint64_t)bits << 32 | index;
}

/* The `rank`-th smallest of different numbers, counted from 0; puts them in another order (Hoare's selection). */
static uint64_t selected(uint64_t *numbers, int64_t count, int64_t rank) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const uint64_t pivot = numbers[low + (high - low) / 2];
    int64_t i = low, j = high;
    while (i <= j) {
      while (numbers[i] < pivot) i++;
      while (numbers[j] > pivot) j--;
      if (i <= j) {
        const uint64_t other = numbers[i];
        numbers[i++] = numbers[j];
        numbers[j--] = other;
      }
    }
    if (rank <= j) high = j;
    else if (rank >= i) low = i;
    else break;
  }
  return numbers[rank];
}

static float whole(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint16_t upper_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x8000) >> 16);
}

/* One token's numbers, as `packed_pages.pack`. */
static void pack(const Packed *pages, int64_t source, int64_t place, int64_t dim) {
  const int64_t block = dim % BLOCK ? dim : BLOCK, half = block / 2, shared = block * pages->bits / 8;
  const int8_t *x = pages->values + source * dim;
  uint8_t *numbers = pages->numbers + place * dim * pages->bits / 8, *step = pages->step + place * 2 * dim / block;
  int8_t *offset = pages->offset + place * 2 * dim / block;
  const int most = (1 << pages->bits) - 1;
  for (int64_t d = 0; d < dim; d += block, x += block, numbers += shared) {
    memset(numbers, 0, (size_t)shared);
    for (int64_t g = 0; g < 2; g++) {
      const int8_t *group = x + g * half;
      int low = group[0], high = group[0];
      for (int64_t i = 1; i < half; i++) {
        low = group[i] < low ? group[i] : low;
        high = group[i] > high ? group[i] : high;
      }
      const int width = ((high - low) * EIGHTHS + LEVELS - 1) / LEVELS;
      const int by = (width ? width : 1) * (LEVELS / most);
      for (int64_t i = 0; i < half; i++) {
        /* a quotient of such small numbers is an integer only if it really is one */
        const float n = (float)(2 * EIGHTHS * (group[i] - low) + by) / (float)(2 * by);
        const int64_t number = g * half + i;
        numbers[number % shared] |= (uint8_t)((n > most ? most : (int)n) << number / shared * pages->bits);
      }
      *step++ = (uint8_t)width;
      *offset++ = (int8_t)low;
    }
  }
  pages->half_scale[place] = upper_half(pages->unit[source]);
}

/* One head of one layer. */
static void exchange_part(const void *data, int64_t part) {
  static _Thread_local Room room;
  const Exchange *task = data;
  const int64_t layer = part / task->kv_heads, head = part % task->kv_heads, kept = task->kept[layer];
  const int64_t capacity = task->capacity[layer], places = (capacity + PAGE - 1) / PAGE * PAGE, count = places + PAGE;
  uint64_t *numbers = (uint64_t *)grown(&room, 2 * count * (int64_t)sizeof(uint64_t)), *shuffled = numbers + count;
  if (!numbers) abort();
  const float *own = task->own + part * PAGE;
  /* place i of the row is place i % P of page i / P */
  const int64_t page_step = task->kv_heads * PAGE;
  const int64_t first = (task->row * task->pages + task->first[layer]) * page_step + head * PAGE;
  for (int64_t i = 0; i < places; i++) {
    /* free places go first, in order; those past the capacity never */
    float score = i < kept ? whole(task->score[first + i / PAGE * page_step + i % PAGE]) : (float)(i - places);
    if (i >= capacity) score = INFINITY;
    numbers[i] = ordered(score, (uint32_t)i);
  }
  for (int64_t i = 0; i < PAGE; i++) numbers[places + i] = ordered(own[i], (uint32_t)(places + i));
  memcpy(shuffled, numbers, (size_t)count * sizeof(uint64_t));
  const uint64_t last = selected(shuffled, count, PAGE - 1); /* of those that go */
  int64_t source = 0;
  for (int64_t i = 0; i < places; i++) {
    if (numbers[i] > last) continue;
    while (numbers[places + source] <= last) source++;
    const int64_t place = first + i / PAGE * page_step + i % PAGE;
    task->score[place] = upper_half(own[source]);
    pack(&task->k, part * PAGE + source, place, task->dim);
    pack(&task->v, part * PAGE + source, place, task->dim);
    source++;
  }
}

static Packed packed(const XLA_FFI_CallFrame *frame, int page, int kept) {
  const XLA_FFI_Buffer *values = argument(frame, page), *numbers = result(frame, kept);
  return (Packed){.values = values->data,
                  .unit = argument(frame, page + 1)->data,
                  .bits = (int)(8 * numbers->dims[4] / values->dims[3]),
                  .numbers = numbers->data,
                  .step = result(frame, kept + 1)->data,
                  .offset = result(frame, kept + 2)->data,
                  .half_scale = result(frame, kept + 3)->data};
}

/* (row i32 []; of L layers the first page, kept pairs and capacity i32 [L]; own f32 [L, K, P]; the page's keys int8
   [L, K, P, D], their scale f32 [L, K, P]; values and scale; half of the score u16 [B, M, K, P]; kept keys: numbers u8
   [B, M, K, P, D · bits / 8], step u8 and offset int8 [B, M, K, P, G], half of the scale u16 [B, M, K, P]; kept values
   likewise) -> score, kept keys and kept values, in place; P = 128. */
EXPORT XLA_FFI_Error *atlas_exchange_pairs(XLA_FFI_CallFrame *frame) {
  if (asked_for_version(frame)) return NULL;
  XLA_FFI_Buffer *k = argument(frame, 5), *score = argument(frame, 9);
  Exchange task = {.row = *(const int32_t *)argument(frame, 0)->data,
                   .first = argument(frame, 1)->data,
                   .kept = argument(frame, 2)->data,
                   .capacity = argument(frame, 3)->data,
                   .own = argument(frame, 4)->data,
                   .score = result(frame, 0)->data,
                   .k = packed(frame, 5, 1),
                   .v = packed(frame, 7, 5),
                   .pages = score->dims[1],
                   .kv_heads = score->dims[2],
                   .dim = k->dims[3]};
  const int64_t layers = k->dims[0];
  if (score->dims[3] != PAGE || k->dims[2] != PAGE || task.dim % 4 || task.row < 0 || task.row >= score->dims[0] ||
      argument(frame, 1)->dims[0] != layers || (task.k.bits != 4 && task.k.bits != 2) || (task.v.bits != 4 && task.v.bits != 2))
    return failed(frame, "atlas_exchange_pairs: shape");
  for (int64_t l = 0; l < layers; l++)
    if (task.first[l] < 0 || task.capacity[l] < 0 || (task.pages - task.first[l]) * PAGE < task.capacity[l])
      return failed(frame, "atlas_exchange_pairs: places");
  run_parts(frame, exchange_part, &task, layers * task.kv_heads);
  return NULL;
}

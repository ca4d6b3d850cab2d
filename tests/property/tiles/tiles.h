/* AMX in plain C, included before the kernel's own source: what each instruction is documented to do, and an abort where it
   would fault. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
#include <immintrin.h>

static struct {
  int rows[8], bytes[8];
  int8_t tile[8][16][64];
} amx;

static void load_config(const uint8_t *shapes) {
  memset(&amx, 0, sizeof amx);
  if (shapes[0] != 1) abort(); /* palette */
  for (int i = 1; i < 16; i++)
    if (shapes[i]) abort();
  for (int t = 0; t < 16; t++) {
    int bytes = shapes[16 + 2 * t] | shapes[17 + 2 * t] << 8, rows = shapes[48 + t];
    if (bytes > 64 || rows > 16 || (t > 7 && (bytes || rows))) abort();
    if (t < 8) amx.bytes[t] = bytes, amx.rows[t] = rows;
  }
}

static void move_tile(int t, char *memory, int64_t stride, int store) {
  if (!amx.rows[t] || !amx.bytes[t]) abort();
  for (int i = 0; i < amx.rows[t]; i++) {
    char *row = memory + i * stride;
    memcpy(store ? (void *)row : amx.tile[t][i], store ? amx.tile[t][i] : (void *)row, (size_t)amx.bytes[t]);
  }
}

/* c[m, n] += Σ a[m, 4 k + j] · b[k, 4 n + j], signed bytes into 32 bits */
static void multiply_tile(int c, int a, int b) {
  if (amx.rows[c] != amx.rows[a] || amx.bytes[c] != amx.bytes[b] || amx.bytes[a] != 4 * amx.rows[b]) abort();
  for (int m = 0; m < amx.rows[c]; m++)
    for (int n = 0; n < amx.bytes[c] / 4; n++) {
      int32_t sum;
      memcpy(&sum, &amx.tile[c][m][4 * n], sizeof sum);
      for (int k = 0; k < amx.rows[b]; k++)
        for (int j = 0; j < 4; j++) sum += amx.tile[a][m][4 * k + j] * amx.tile[b][k][4 * n + j];
      memcpy(&amx.tile[c][m][4 * n], &sum, sizeof sum);
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig(shapes) load_config((const uint8_t *)(shapes))
#define _tile_release() memset(&amx, 0, sizeof amx)
#define _tile_zero(t) memset(amx.tile[t], 0, sizeof amx.tile[t])
#define _tile_loadd(t, memory, stride) move_tile(t, (char *)(memory), stride, 0)
#define _tile_stored(t, memory, stride) move_tile(t, (char *)(memory), stride, 1)
#define _tile_dpbssd(c, a, b) multiply_tile(c, a, b)

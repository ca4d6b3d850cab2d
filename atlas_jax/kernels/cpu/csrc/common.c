/* What the processor can do, work shared between XLA's threads, and XLA's calling convention. */

#define _GNU_SOURCE
#include "common.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sched.h>
#include <stdatomic.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

bool atlas_has_tiles;

/* What this processor runs: 0 nothing, 1 AVX-512 VNNI, 2 AMX tiles too. To be asked before anything else. */
EXPORT int atlas_supported(void) {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")))
    return 0;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return 1; /* amx-tile, amx-int8 */
#ifdef __linux__
  const long request_permission = 0x1023, tile_data = 18; /* the kernel saves tiles only for processes that asked */
  atlas_has_tiles = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#endif
  return atlas_has_tiles ? 2 : 1;
}

/* ---- threads -------------------------------------------------------------------------------------------------------

   A call cuts its work into parts and offers them to XLA's own pool. The caller takes parts too, until none is left, and
   then waits only for parts that somebody has begun: with every thread of the pool in a call of its own, nobody waits for
   a part that never starts.

   To wake a thread of the pool takes about as long as half a GEMV, so a thread that has helped stays for a
   moment and watches for the next call, which in a decode step comes soon (GEMVs of all layers, SmolLM2-135M:
   9.0 ms against 9.7 in 8 bits, 8.0 against 9.5 packed; medians of runs one after the other). */

typedef struct {
  Part *run;
  const void *task;
  int64_t parts, helpers;
  atomic_long next, finished, holders;
} Job;

/* STAY and AWAKE in cycles of the time stamp counter: how long a thread watches, 100 to 150 µs, and for how long it counts as
   running after it was last seen to, about 20; LOOKS, after how many it gives others its core, about 5 µs. */
enum { STAY = 300000, AWAKE = 50000, LOOKS = 200 };

/* What is offered to the threads that stay. `calls` counts the offers, `looked` is when one of those threads was last seen to
   run; the rest is read and written by who holds `busy`. */
static struct {
  atomic_flag busy;
  atomic_long calls, staying;
  _Atomic int64_t looked;
  Job *job;
} offer = {.busy = ATOMIC_FLAG_INIT};

static void lock_offer(void) {
  while (atomic_flag_test_and_set_explicit(&offer.busy, memory_order_acquire)) _mm_pause();
}

static void unlock_offer(void) { atomic_flag_clear_explicit(&offer.busy, memory_order_release); }

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

/* Whether there are threads that stay, who then see this job. */
static bool offer_job(Job *job) {
  if (!atomic_load(&offer.staying)) return false;
  lock_offer();
  bool free = !offer.job && atomic_load(&offer.staying);
  if (free) {
    offer.job = job;
    atomic_fetch_add(&offer.calls, 1);
  }
  unlock_offer();
  return free;
}

static void withdraw_job(void) {
  lock_offer();
  offer.job = NULL;
  unlock_offer();
}

static int64_t now(void) { return (int64_t)__rdtsc(); }

static void help(void *data) {
  int64_t most = ((Job *)data)->helpers;
  take_parts(data);
  release(data);
  if (atomic_fetch_add(&offer.staying, 1) >= most) { /* with the caller, there is one for every core */
    atomic_fetch_sub(&offer.staying, 1);
    return;
  }
  long seen = atomic_load(&offer.calls);
  int64_t since = now();
  atomic_store(&offer.looked, since);
  for (int looks = 1; now() - since < STAY; looks++) {
    if (atomic_load_explicit(&offer.calls, memory_order_acquire) == seen) {
      if (looks % LOOKS) {
        _mm_pause();
        continue;
      }
      sched_yield(); /* whoever else wants this core goes first */
      atomic_store(&offer.looked, now());
      continue;
    }
    lock_offer();
    seen = atomic_load(&offer.calls);
    Job *job = offer.job;
    if (job) atomic_fetch_add(&job->holders, 1);
    unlock_offer();
    if (!job) continue;
    take_parts(job);
    release(job);
    since = now();
    atomic_store(&offer.looked, since);
  }
  atomic_fetch_sub(&offer.staying, 1);
}

int64_t pool_threads(const XLA_FFI_CallFrame *frame) {
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

static void schedule_help(const XLA_FFI_CallFrame *frame, Job *job) {
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

void run_parts(const XLA_FFI_CallFrame *frame, Part *run, const void *task, int64_t parts) {
  int64_t most = pool_threads(frame) - 1, helpers = most < parts - 1 ? most : parts - 1;
  Job *job = helpers > 0 ? malloc(sizeof(Job)) : NULL;
  if (!job) {
    for (int64_t part = 0; part < parts; part++) run(task, part);
    return;
  }
  *job = (Job){.run = run, .task = task, .parts = parts, .helpers = most};
  atomic_init(&job->next, 0);
  atomic_init(&job->finished, 0);
  atomic_init(&job->holders, 1);
  bool offered = offer_job(job);
  /* A thread that gave its core to somebody, often to the next caller, since XLA starts a program on any of its threads, is
     not counted on until it runs again (16 rows, steps of five programs: 27 ms against 33). */
  bool awake = offered && now() - atomic_load(&offer.looked) < AWAKE;
  for (int64_t i = awake ? atomic_load(&offer.staying) : 0; i < helpers; i++) schedule_help(frame, job);
  take_parts(job);
  if (offered) withdraw_job();
  while (atomic_load(&job->finished) < parts) _mm_pause();
  release(job);
}

/* ---- calling convention ---------------------------------------------------------------------------------------- */

XLA_FFI_Error *failed(const XLA_FFI_CallFrame *frame, const char *message) {
  XLA_FFI_Error_Create_Args args = {.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
                                    .message = message,
                                    .errc = XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame->api->XLA_FFI_Error_Create(&args);
}

bool asked_for_version(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Extension_Base *extension = frame->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return true;
}

/* What the machine itself can do: reading memory over several streams a thread, and its multiply-accumulate units.
 *
 * Compiled for the machine it runs on. Every function does an amount of work and leaves the timing to its caller. */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define MOST_THREADS 64

typedef uint64_t line __attribute__((vector_size(64), aligned(64)));

/* One line of each stream in turn, the streams an odd number of lines apart so that they do not share cache sets. */
#define DEFINE_READ(STREAMS)                                                   \
  static uint64_t read_##STREAMS(const line* data, size_t lines, size_t ahead) { \
    const size_t part = (lines / STREAMS - 1) | 1;                             \
    line sums[STREAMS] = {{0}};                                                \
    for (size_t i = 0; i + ahead < part; ++i)                                  \
      _Pragma("GCC unroll 16") for (int s = 0; s < STREAMS; ++s) {             \
        __builtin_prefetch(data + s * part + i + ahead);                       \
        sums[s] ^= data[s * part + i];                                         \
      }                                                                        \
    line all = {0};                                                            \
    for (int s = 0; s < STREAMS; ++s) all ^= sums[s];                          \
    return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7]; \
  }
DEFINE_READ(1)
DEFINE_READ(2)
DEFINE_READ(4)
DEFINE_READ(8)
DEFINE_READ(16)

struct task {
  void (*run)(struct task*);
  const line* data;
  size_t lines, ahead;
  int streams;
  int64_t count;
  double done;
  uint64_t sink;
};

static void read_task(struct task* t) {
  for (int64_t i = 0; i < t->count; ++i) {
    switch (t->streams) {
      case 1: t->sink ^= read_1(t->data, t->lines, t->ahead); break;
      case 2: t->sink ^= read_2(t->data, t->lines, t->ahead); break;
      case 4: t->sink ^= read_4(t->data, t->lines, t->ahead); break;
      case 8: t->sink ^= read_8(t->data, t->lines, t->ahead); break;
      default: t->sink ^= read_16(t->data, t->lines, t->ahead); break;
    }
  }
}

/* Twelve accumulators hide the latency of every unit; as names, because compilers keep an array of them in memory. */
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define CLEAR(j) s##j = zero;
#define OPAQUE(j) __asm__ volatile("" : VECTOR_REGISTER(s##j));
#define FOLD(j)                     \
  memcpy(&word, &s##j, sizeof word); \
  t->sink ^= word;

/* A loop of STEPs, each of PRODUCTS multiply-accumulates; t->done counts them. */
#define DEFINE_PEAK(NAME, TYPE, ZERO, STEP, PRODUCTS)                     \
  static void NAME(struct task* t) {                                      \
    const TYPE zero = ZERO;                                               \
    TYPE s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11;                \
    uint64_t word;                                                        \
    EACH(CLEAR)                                                           \
    for (int64_t i = 0; i < t->count; ++i) {                              \
      EACH(STEP)                                                          \
      EACH(OPAQUE)                                                        \
    }                                                                     \
    EACH(FOLD)                                                            \
    t->done = (double)t->count * 12 * PRODUCTS;                           \
  }

#if defined(__x86_64__)
#define VECTOR_REGISTER(value) "+v"(value)
#if defined(__AVX512VNNI__)
#define VNNI(j) s##j = _mm512_dpbusd_epi32(s##j, _mm512_set1_epi8(3), _mm512_set1_epi8(5));
DEFINE_PEAK(peak_vnni, __m512i, _mm512_setzero_si512(), VNNI, 64)
#endif
#if defined(__AVX2__)
#define BYTES(j) _mm256_maddubs_epi16(s##j, _mm256_set1_epi8(5))
#define AVX2(j) s##j = _mm256_add_epi32(s##j, _mm256_madd_epi16(BYTES(j), _mm256_set1_epi16(1)));
DEFINE_PEAK(peak_avx2, __m256i, _mm256_setzero_si256(), AVX2, 32)
#endif
#if defined(__AVX512F__)
#define FMA(j) s##j = _mm512_fmadd_ps(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f), s##j);
DEFINE_PEAK(peak_fma, __m512, _mm512_setzero_ps(), FMA, 16)
#elif defined(__FMA__)
#define FMA(j) s##j = _mm256_fmadd_ps(_mm256_set1_ps(0.5f), _mm256_set1_ps(0.25f), s##j);
DEFINE_PEAK(peak_fma, __m256, _mm256_setzero_ps(), FMA, 8)
#endif
#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#define ARCH_REQUEST_PERMISSION 0x1023
#define TILE_DATA 18
static void peak_amx(struct task* t) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t columns[16];
    uint8_t rows[16];
  } __attribute__((packed, aligned(64))) config;
  if (syscall(SYS_arch_prctl, ARCH_REQUEST_PERMISSION, TILE_DATA)) return;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.columns[i] = 64;
    config.rows[i] = 16;
  }
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t i = 0; i < t->count; ++i) {
    _tile_dpbssd(0, 4, 5);
    _tile_dpbssd(1, 4, 5);
    _tile_dpbssd(2, 4, 5);
    _tile_dpbssd(3, 4, 5);
  }
  _tile_release();
  t->done = (double)t->count * 4 * 16 * 16 * 64;
}
#endif
#elif defined(__aarch64__)
#define VECTOR_REGISTER(value) "+w"(value)
#if defined(__ARM_FEATURE_DOTPROD)
#define SDOT(j) s##j = vdotq_s32(s##j, vdupq_n_s8(3), vdupq_n_s8(5));
DEFINE_PEAK(peak_sdot, int32x4_t, vdupq_n_s32(0), SDOT, 16)
#endif
#define FMA(j) s##j = vfmaq_f32(s##j, vdupq_n_f32(0.5f), vdupq_n_f32(0.25f));
DEFINE_PEAK(peak_fma, float32x4_t, vdupq_n_f32(0), FMA, 4)
#endif

/* In this order: the first integer unit that is there is the one that shares are given of. */
static const struct {
  const char* name;
  void (*run)(struct task*);
} peaks[] = {
#if defined(__AVX512VNNI__)
    {"vnni", peak_vnni},
#endif
#if defined(__AVX2__)
    {"avx2_integer", peak_avx2},
#endif
#if defined(__AMX_INT8__)
    {"amx_int8", peak_amx},
#endif
#if defined(__ARM_FEATURE_DOTPROD)
    {"sdot", peak_sdot},
#endif
#if defined(__aarch64__) || defined(__FMA__)
    {"fma_float32", peak_fma},
#endif
    {NULL, NULL},
};

static void* start(void* task) {
  ((struct task*)task)->run(task);
  return NULL;
}

/* Runs the tasks, the last one on the calling thread. */
static double run_all(struct task* tasks, int threads) {
  pthread_t handles[MOST_THREADS];
  int started[MOST_THREADS];
  double done = 0;
  for (int i = 0; i + 1 < threads; ++i) started[i] = pthread_create(&handles[i], NULL, start, &tasks[i]) == 0;
  start(&tasks[threads - 1]);
  for (int i = 0; i + 1 < threads; ++i) {
    if (started[i]) pthread_join(handles[i], NULL);
    else start(&tasks[i]);
  }
  for (int i = 0; i < threads; ++i) done += tasks[i].done;
  return done;
}

/* Reads `bytes` bytes, each thread its own part of them `repeats` times; `ahead` is the prefetch's distance in lines. */
EXPORT void limits_read(const void* data, size_t bytes, int streams, size_t ahead, int threads, int64_t repeats) {
  struct task tasks[MOST_THREADS] = {{0}};
  const size_t lines = bytes / sizeof(line) / (size_t)threads;
  for (int i = 0; i < threads; ++i) {
    const struct task task = {read_task, (const line*)data + (size_t)i * lines, lines, ahead, streams, repeats, 0, 0};
    tasks[i] = task;
  }
  run_all(tasks, threads);
}

/* The name of a unit, null beyond the last. */
EXPORT const char* limits_peak_name(int unit) { return peaks[unit].name; }

/* Keeps a unit busy for `count` rounds in each thread; returns the products (0: the system does not let it be used). */
EXPORT double limits_peak(int unit, int64_t count, int threads) {
  struct task tasks[MOST_THREADS] = {{0}};
  for (int i = 0; i < threads; ++i) {
    tasks[i].run = peaks[unit].run;
    tasks[i].count = count;
  }
  return run_all(tasks, threads);
}

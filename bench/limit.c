/* The memory limit: the traffic of each step in the plainest loop, on memory as good as it gets.

   Built for the machine it runs on, free to fuse and reorder, without a check or an option. A call
   takes `calls` steps, so that what it costs from Python vanishes at small sizes. Static shares go
   to the same thread in every step; what a core has cached it meets again. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

int limit_openmp(void)
{
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

/* What a column may hold, and what it is in arithmetic: the nearest, ties to even. NaN and what is
   too large are nobody's here. */
typedef float float32;
typedef double float64;
typedef uint16_t bfloat16, float16;

static inline uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float from_float32(float32 x) { return x; }
static inline float32 to_float32(float x) { return x; }
static inline double from_float64(float64 x) { return x; }
static inline float64 to_float64(double x) { return x; }
static inline float from_bfloat16(bfloat16 x) { return float_of((uint32_t)x << 16); }

static inline bfloat16 to_bfloat16(float x)
{
    uint32_t bits = bits_of(x);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

static inline float from_float16(float16 x)
{
    return float_of((uint32_t)(x & 0x8000) << 16 | (uint32_t)(x & 0x7FFF) << 13) * 0x1p112f;
}

static inline float16 to_float16(float x)
{
    uint32_t bits = bits_of(x * 0x1p-112f);
    return (bits >> 16 & 0x8000) | ((bits & 0x7FFFFFFF) + 0xFFF + (bits >> 13 & 1)) >> 13;
}

/* What is kept of a parameter besides itself. A float32 gives way to a parameter that was set. */
typedef char none;
typedef uint16_t split;
#define GET_none(X) from_##X(x[i])
#define PUT_none(X, value) x[i] = to_##X(value)
#define GET_split(X) float_of(((uint32_t)x[i] << 16) + (uint32_t)(int16_t)m[i])
#define PUT_split(X, value) x[i] = (bits_of(value) + 0x8000) >> 16, m[i] = bits_of(value)
#define GET_float32(X) (to_##X(m[i]) == x[i] ? m[i] : from_##X(x[i]))
#define PUT_float32(X, value) m[i] = value, x[i] = to_##X(value)

/* A step of elements from `i` on of an arena's columns: parameter, gradient, state, average or
   master or second state; then a place of each share for what it sums; then replicas. */
enum { X_, G_, V_, M_, SUMS, REPLICAS };
typedef void Step(void **p, size_t i, size_t n, int share);

#define STEPS_OF(NAME, T, X, M, G, V)                                                            \
    static inline void sgd_of_##NAME(X *restrict x, const G *restrict g, M *restrict m, size_t n,\
                                     T lr)                                                       \
    {                                                                                            \
        (void)m;                                                                                 \
        for (size_t i = 0; i < n; i++) {                                                         \
            T xi = GET_##M(X) - lr * from_##G(g[i]);                                             \
            PUT_##M(X, xi);                                                                      \
        }                                                                                        \
    }                                                                                            \
    static inline void momentum_of_##NAME(X *restrict x, const G *restrict g, V *restrict v,     \
                                          M *restrict m, size_t n, T lr, T rho)                  \
    {                                                                                            \
        (void)m;                                                                                 \
        for (size_t i = 0; i < n; i++) {                                                         \
            T vi = rho * from_##V(v[i]) + from_##G(g[i]);                                        \
            T xi = GET_##M(X) - lr * vi;                                                         \
            v[i] = to_##V(vi);                                                                   \
            PUT_##M(X, xi);                                                                      \
        }                                                                                        \
    }                                                                                            \
    void sgd_##NAME(void **p, size_t i, size_t n, int share)                                     \
    {                                                                                            \
        (void)share;                                                                             \
        sgd_of_##NAME((X *)p[X_] + i, (G *)p[G_] + i, (M *)p[M_] + i, n, (T)0.1);                \
    }                                                                                            \
    void momentum_##NAME(void **p, size_t i, size_t n, int share)                                \
    {                                                                                            \
        (void)share;                                                                             \
        momentum_of_##NAME((X *)p[X_] + i, (G *)p[G_] + i, (V *)p[V_] + i, (M *)p[M_] + i, n,    \
                           (T)0.1, (T)0.9);                                                      \
    }

#define PIPELINE(T)                                                                              \
    static inline T squares_of_##T(const T *restrict g, size_t n)                                \
    {                                                                                            \
        T sum = 0;                                                                               \
        for (size_t i = 0; i < n; i++) sum += g[i] * g[i];                                       \
        return sum;                                                                              \
    }                                                                                            \
    static inline void pipeline_of_##T(T *restrict x, T *restrict g, T *restrict v,              \
                                       T *restrict e, size_t n, T lr, T rho)                     \
    {                                                                                            \
        for (size_t i = 0; i < n; i++) {                                                         \
            T vi = rho * v[i] + g[i];                                                            \
            T xi = x[i] - lr * vi;                                                               \
            v[i] = vi;                                                                           \
            x[i] = xi;                                                                           \
            e[i] = rho * e[i] + lr * xi;                                                         \
            g[i] = 0;                                                                            \
        }                                                                                        \
    }                                                                                            \
    void norm_##T(void **p, size_t i, size_t n, int share)                                       \
    {                                                                                            \
        ((T *)p[SUMS])[64 * share] = squares_of_##T((T *)p[G_] + i, n);                          \
    }                                                                                            \
    void pipeline_##T(void **p, size_t i, size_t n, int share)                                   \
    {                                                                                            \
        (void)share;                                                                             \
        pipeline_of_##T((T *)p[X_] + i, (T *)p[G_] + i, (T *)p[V_] + i, (T *)p[M_] + i, n,       \
                        (T)0.1, (T)0.9);                                                         \
    }

/* The rate and the root's factor have corrections in them: about those of a tenth step, always. */
#define ADAM(T, SQRT)                                                                            \
    static inline void adam_of_##T(T *restrict x, const T *restrict g, T *restrict m,            \
                                   T *restrict v, size_t n, T rate, T root)                      \
    {                                                                                            \
        for (size_t i = 0; i < n; i++) {                                                         \
            T mi = (T)0.9 * m[i] + (T)0.1 * g[i];                                                \
            T vi = (T)0.999 * v[i] + (T)0.001 * g[i] * g[i];                                     \
            m[i] = mi;                                                                           \
            v[i] = vi;                                                                           \
            x[i] -= rate * mi / (root * SQRT(vi) + (T)1e-8);                                     \
        }                                                                                        \
    }                                                                                            \
    void adam_##T(void **p, size_t i, size_t n, int share)                                       \
    {                                                                                            \
        (void)share;                                                                             \
        adam_of_##T((T *)p[X_] + i, (T *)p[G_] + i, (T *)p[V_] + i, (T *)p[M_] + i, n,           \
                    (T)0.15, (T)10);                                                             \
    }

/* Nesterov towards the mean of K replicas. All streams advance together, and none overlaps. */
#define OUTER(K, BACK)                                                                           \
    void outer_##K##_##BACK(void **p, size_t begin, size_t n, int share)                         \
    {                                                                                            \
        float *x = (float *)p[X_] + begin, *v = (float *)p[V_] + begin, *r[K];                   \
        (void)share;                                                                             \
        for (int k = 0; k < K; k++) r[k] = (float *)p[REPLICAS + k] + begin;                     \
        _Pragma("omp simd")                                                                      \
        for (size_t i = 0; i < n; i++) {                                                         \
            float sum = r[0][i];                                                                 \
            for (int k = 1; k < K; k++) sum += r[k][i];                                          \
            float d = x[i] - sum * (1.0f / K);                                                   \
            float vi = 0.9f * v[i] + d;                                                          \
            float xi = x[i] - 0.7f * (d + 0.9f * vi);                                            \
            v[i] = vi;                                                                           \
            x[i] = xi;                                                                           \
            for (int k = 0; BACK && k < K; k++) r[k][i] = xi;                                    \
        }                                                                                        \
    }

#define STEPS(T, X, M, G, V) STEPS_OF(X##_##M##_##G##_##V, T, X, M, G, V)

STEPS(float, float32, none, float32, float32)
STEPS(double, float64, none, float64, float64)
STEPS(float, float32, none, float32, bfloat16)
STEPS(float, float32, none, bfloat16, bfloat16)
STEPS(float, bfloat16, split, bfloat16, float32)
STEPS(float, bfloat16, split, bfloat16, bfloat16)
STEPS(float, bfloat16, float32, bfloat16, float32)
STEPS(float, bfloat16, none, bfloat16, bfloat16)
STEPS(float, float16, float32, float16, float32)
STEPS(float, float16, none, float16, float32)
PIPELINE(float32)
PIPELINE(float64)
ADAM(float32, sqrtf)
ADAM(float64, sqrt)
OUTER(1, 0)
OUTER(1, 1)
OUTER(4, 0)
OUTER(4, 1)
OUTER(10, 0)
OUTER(10, 1)

/* Momentum on rows of a table, each once, those to come asked for ahead. A row's stamp says what
   it has missed, which a table of powers has ready. */
enum { WIDTH = 64, LINE = 16, AHEAD = 8, STAMPS_AHEAD = 32, AGES = 4096 };

typedef struct {
    float *x, *v;
    const float *g;
    uint32_t *stamps, clock;
    float gone[AGES], left[AGES];       /* of v: what x has lost by it, what there is of it */
} Rows;

static void fill_powers(Rows *t)
{
    double gone = 0, left = 1;
    for (int k = 0; k < AGES; k++, left *= 0.9, gone += 0.1 * left)
        t->gone[k] = gone, t->left[k] = left < 1e-37 ? 0 : left;
}

static inline void ask_for(const float *row)
{
    for (int j = 0; j < WIDTH; j += LINE) __builtin_prefetch(row + j, 1);
}

static void step_rows(const Rows *t, const int64_t *rows, size_t i, size_t end)
{
    for (; i < end; i++) {
        float *restrict x = t->x + WIDTH * rows[i], *restrict v = t->v + WIDTH * rows[i];
        const float *restrict g = t->g + WIDTH * i;
        uint32_t age = t->clock - 1 - t->stamps[rows[i]];
        float gone, left;
        if (age >= AGES) age = AGES - 1;        /* by then nothing is left */
        gone = t->gone[age], left = t->left[age];
        if (i + STAMPS_AHEAD < end) __builtin_prefetch(t->stamps + rows[i + STAMPS_AHEAD], 1);
        if (i + AHEAD < end) {
            ask_for(t->x + WIDTH * rows[i + AHEAD]);
            ask_for(t->v + WIDTH * rows[i + AHEAD]);
        }
        t->stamps[rows[i]] = t->clock;
        for (int j = 0; j < WIDTH; j++) {
            float vj = 0.9f * (left * v[j]) + g[j];
            x[j] = (x[j] - gone * v[j]) - 0.1f * vj;
            v[j] = vj;
        }
    }
}

/* A call takes steps one after the other; the rows of each begin where those of the last end. */
void limit_rows(float *x, float *v, const float *g, uint32_t *stamps, uint32_t *clock,
                const int64_t *rows, const int64_t *begins, int threads, int calls)
{
    static Rows t;
    if (t.left[0] == 0) fill_powers(&t);
    t.x = x, t.v = v, t.g = g, t.stamps = stamps;
    for (int call = 0; call < calls; call++) {
        const int64_t *these = rows + begins[call];
        size_t k = begins[call + 1] - begins[call];
        t.clock = ++*clock;
        if (threads == 1) {
            step_rows(&t, these, 0, k);
            continue;
        }
        _Pragma("omp parallel for num_threads(threads) schedule(static, 1)")
        for (int share = 0; share < threads; share++)
            step_rows(&t, these, k * share / threads, k * (share + 1) / threads);
    }
}

static void share_out(Step *step, void **p, size_t n, int threads)
{
    size_t size = (n / threads + 63) / 64 * 64;
    if (threads == 1) {
        step(p, 0, n, 0);
        return;
    }
    _Pragma("omp parallel for num_threads(threads) schedule(static, 1)")
    for (int share = 0; share < threads; share++) {
        size_t begin = size * share < n ? size * share : n;
        step(p, begin, share + 1 == threads || begin + size > n ? n - begin : size, share);
    }
}

/* `before` is what reads all before the step, or NULL. */
void limit(Step *before, Step *step, void **p, size_t n, int threads, int calls)
{
    for (int call = 0; call < calls; call++) {
        if (before) share_out(before, p, n, threads);
        share_out(step, p, n, threads);
    }
}

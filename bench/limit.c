/* The memory limit: the traffic of each step in the plainest loop, on memory as good as it gets.

   Built for the machine it runs on, free to fuse and reorder, without a check or an option. Each
   function takes `calls` steps, so that the cost of a call from Python vanishes at small sizes.
   Static shares go to the same thread in every step; what a core has cached it meets again. */
#include <stddef.h>
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

/* An arena's columns: parameter, gradient, velocity, average. */
#define STEPS(T, NAME)                                                                           \
    static void sgd_##NAME(T *restrict x, const T *restrict g, size_t n, T lr)                   \
    {                                                                                            \
        for (size_t i = 0; i < n; i++) x[i] -= lr * g[i];                                        \
    }                                                                                            \
    static void momentum_##NAME(T *restrict x, const T *restrict g, T *restrict v, size_t n,     \
                                T lr, T rho)                                                     \
    {                                                                                            \
        for (size_t i = 0; i < n; i++) {                                                         \
            T vi = rho * v[i] + g[i];                                                            \
            v[i] = vi;                                                                           \
            x[i] -= lr * vi;                                                                     \
        }                                                                                        \
    }                                                                                            \
    static T norm_##NAME(const T *restrict g, size_t n)                                          \
    {                                                                                            \
        T sum = 0;                                                                               \
        for (size_t i = 0; i < n; i++) sum += g[i] * g[i];                                       \
        return sum;                                                                              \
    }                                                                                            \
    static void pipeline_##NAME(T *restrict x, T *restrict g, T *restrict v, T *restrict e,      \
                                size_t n, T lr, T rho)                                           \
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
    static void share_##NAME(int streams, T **p, size_t n, int threads, int share, T *norm)      \
    {                                                                                            \
        size_t size = (n / threads + 63) / 64 * 64;                                              \
        size_t begin = size * share < n ? size * share : n;                                      \
        size_t count = share + 1 == threads || begin + size > n ? n - begin : size;              \
        if (norm)                                                                                \
            *norm = norm_##NAME(p[1] + begin, count);                                            \
        else if (streams == 3)                                                                   \
            sgd_##NAME(p[0] + begin, p[1] + begin, count, (T)0.1);                               \
        else if (streams == 5)                                                                   \
            momentum_##NAME(p[0] + begin, p[1] + begin, p[2] + begin, count, (T)0.1, (T)0.9);    \
        else                                                                                     \
            pipeline_##NAME(p[0] + begin, p[1] + begin, p[2] + begin, p[3] + begin, count,       \
                            (T)0.1, (T)0.9);                                                     \
    }                                                                                            \
    static void all_##NAME(int streams, T **p, size_t n, int threads, T *norm)                   \
    {                                                                                            \
        if (threads == 1) {                                                                      \
            share_##NAME(streams, p, n, 1, 0, norm);                                             \
            return;                                                                              \
        }                                                                                        \
        _Pragma("omp parallel for num_threads(threads) schedule(static, 1)")                     \
        for (int share = 0; share < threads; share++)                                            \
            share_##NAME(streams, p, n, threads, share, norm ? norm + 64 * share : NULL);        \
    }                                                                                            \
    void limit_##NAME(int streams, T **p, size_t n, int threads, int calls, T *norms)            \
    {                                                                                            \
        for (int call = 0; call < calls; call++) {                                               \
            if (streams == 9) all_##NAME(streams, p, n, threads, norms);                         \
            all_##NAME(streams, p, n, threads, NULL);                                            \
        }                                                                                        \
    }

STEPS(float, float32)
STEPS(double, float64)

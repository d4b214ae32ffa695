/* optcore's kernels, for C99 and C++11 extension modules that hold raw pointers.
 *
 *     #include <Python.h>
 *     #include <optcore.h>                  include_dirs=[optcore.get_include()]
 *
 *     PyMODINIT_FUNC PyInit_trainer(void) {
 *         if (import_optcore() < 0) return NULL;
 *         ...
 *
 * Each step function takes one step of one rule over `n` elements, in place, at the widest SIMD
 * level that this process uses, on the calling thread. After the import none of them needs the
 * GIL or touches a Python object, and any thread may call them. Arrays are marked IN or INOUT;
 * they must not overlap and must be aligned to their type. Nothing is checked: that is the
 * caller's part. The formulas are in optcore's README.
 *
 * A module of several files: define OPTCORE_UNIQUE_SYMBOL to the same name in all of them, and
 * OPTCORE_NO_IMPORT in all but the one that calls import_optcore(). Without the two, every file
 * that calls a kernel calls import_optcore() first.
 */
#ifndef OPTCORE_H
#define OPTCORE_H

#include <Python.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by whatever stops a compiled caller from working: another layout of optcore_options,
 * another signature or order in optcore_api. A function appended to optcore_api does not raise
 * it. kernels.pxd has the number in the name of its table. */
#define OPTCORE_ABI_VERSION 1

/* Start from optcore_defaults() and set what differs. */
typedef struct optcore_options {
    double lr;                          /* 0 */
    double momentum;                    /* 0 */
    double dampening;                   /* 0; ignored by nesterov and where lr_in_velocity */
    double weight_decay;                /* 0 */
    double grad_scale;                  /* 1 */
    double clip_value;                  /* infinity: none */
    int maximize;                       /* 0 */
    int decoupled_weight_decay;         /* 0 */
    int lr_in_velocity;                 /* 0; 1: v = momentum * v - lr * d */
    int first_step;                     /* 0; 1: with dampening, v starts as d */
} optcore_options;

/* What import_optcore() fetches. The first four members stay where they are for ever: they are
 * read before it is known whether the rest can be. */
typedef struct optcore_api {
    size_t abi_version;
    size_t api_size;                    /* bytes of this struct */
    size_t options_size;                /* bytes of optcore_options */
    const char *version;                /* optcore.__version__ */

    optcore_options (*defaults)(void);
    void (*sgd_f32)(float *, const float *, Py_ssize_t, const optcore_options *);
    void (*sgd_f64)(double *, const double *, Py_ssize_t, const optcore_options *);
    void (*momentum_f32)(float *, const float *, float *, Py_ssize_t, const optcore_options *);
    void (*momentum_f64)(double *, const double *, double *, Py_ssize_t, const optcore_options *);
    void (*nesterov_f32)(float *, const float *, float *, Py_ssize_t, const optcore_options *);
    void (*nesterov_f64)(double *, const double *, double *, Py_ssize_t, const optcore_options *);
} optcore_api;

#if !defined(OPTCORE_UNIQUE_SYMBOL)
#if defined(OPTCORE_NO_IMPORT)
#error "OPTCORE_NO_IMPORT needs the OPTCORE_UNIQUE_SYMBOL of the file that imports"
#endif
static const optcore_api *optcore_table = NULL;
#else
#define optcore_table OPTCORE_UNIQUE_SYMBOL
#if defined(OPTCORE_NO_IMPORT)
extern const optcore_api *optcore_table;
#else
extern const optcore_api *optcore_table;
const optcore_api *optcore_table = NULL;
#endif
#endif

#if !defined(OPTCORE_NO_IMPORT)
/* Import optcore and check that it is one this file was compiled for. Call it once, with the
 * GIL, before anything else here. Returns 0, or -1 with an exception set: ImportError where the
 * installed optcore is none of those, or is missing. */
static inline int import_optcore(void) {
    const optcore_api *table;
    PyObject *capsule, *module = PyImport_ImportModule("optcore.kernels");
    if (!module) return -1;
    capsule = PyObject_GetAttrString(module, "_C_API");
    Py_DECREF(module);
    if (!capsule || !PyCapsule_IsValid(capsule, "optcore.kernels._C_API")) {
        Py_XDECREF(capsule);
        PyErr_Clear();
        PyErr_Format(PyExc_ImportError,
                     "this module was compiled for optcore's ABI %d; the installed optcore has none",
                     OPTCORE_ABI_VERSION);
        return -1;
    }
    table = (const optcore_api *)PyCapsule_GetPointer(capsule, "optcore.kernels._C_API");
    Py_DECREF(capsule);     /* the table is static, and outlives it */
    if (table->abi_version != OPTCORE_ABI_VERSION ||
        table->options_size != sizeof(optcore_options) ||
        table->api_size < sizeof(optcore_api)) {
        PyErr_Format(PyExc_ImportError,
                     "this module was compiled for optcore's ABI %d (options of %zd bytes, table of "
                     "%zd); the installed optcore %s has ABI %zd (%zd, %zd): build it again",
                     OPTCORE_ABI_VERSION, (Py_ssize_t)sizeof(optcore_options),
                     (Py_ssize_t)sizeof(optcore_api), table->version,
                     (Py_ssize_t)table->abi_version, (Py_ssize_t)table->options_size,
                     (Py_ssize_t)table->api_size);
        return -1;
    }
    optcore_table = table;
    return 0;
}
#endif

static inline optcore_options optcore_defaults(void) {
    return optcore_table->defaults();
}

static inline void optcore_sgd_f32(
    float *param,                       /* INOUT */
    const float *grad,                  /* IN */
    Py_ssize_t n,
    const optcore_options *options      /* IN */
) {
    optcore_table->sgd_f32(param, grad, n, options);
}

static inline void optcore_sgd_f64(
    double *param,                      /* INOUT */
    const double *grad,                 /* IN */
    Py_ssize_t n,
    const optcore_options *options      /* IN */
) {
    optcore_table->sgd_f64(param, grad, n, options);
}

static inline void optcore_momentum_f32(
    float *param,                       /* INOUT */
    const float *grad,                  /* IN */
    float *velocity,                    /* INOUT */
    Py_ssize_t n,
    const optcore_options *options      /* IN */
) {
    optcore_table->momentum_f32(param, grad, velocity, n, options);
}

static inline void optcore_momentum_f64(
    double *param,                      /* INOUT */
    const double *grad,                 /* IN */
    double *velocity,                   /* INOUT */
    Py_ssize_t n,
    const optcore_options *options      /* IN */
) {
    optcore_table->momentum_f64(param, grad, velocity, n, options);
}

static inline void optcore_nesterov_f32(
    float *param,                       /* INOUT */
    const float *grad,                  /* IN */
    float *velocity,                    /* INOUT */
    Py_ssize_t n,
    const optcore_options *options      /* IN */
) {
    optcore_table->nesterov_f32(param, grad, velocity, n, options);
}

static inline void optcore_nesterov_f64(
    double *param,                      /* INOUT */
    const double *grad,                 /* IN */
    double *velocity,                   /* INOUT */
    Py_ssize_t n,
    const optcore_options *options      /* IN */
) {
    optcore_table->nesterov_f64(param, grad, velocity, n, options);
}

#ifdef __cplusplus
}
#endif

#endif

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
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by whatever stops a compiled caller from working: another order of what is in the
 * structs, another signature. A rule, an option or a function appended to the end of its list
 * does not raise it. kernels.pxd has the number in the name of its table. */
#define OPTCORE_ABI_VERSION 2

/* The rules, each by its name and those of its state arrays; a rule's number is its place. For
 * each of them there are, with as many states as it has (none to three),
 *
 *     void optcore_<rule>_f32(float *param,               INOUT
 *                             const float *grad,          IN
 *                             float *<state>...,          INOUT
 *                             Py_ssize_t n,
 *                             const optcore_options *options);
 *
 * and optcore_<rule>_f64 on doubles, defined at the end of this file. */
#define OPTCORE_RULES(RULE_0, RULE_1, RULE_2, RULE_3) \
    RULE_0(sgd) \
    RULE_1(momentum, velocity) \
    RULE_1(nesterov, velocity) \
    RULE_1(adagrad, square_sum) \
    RULE_1(rmsprop, square_avg) \
    RULE_2(rmsprop_momentum, square_avg, velocity) \
    RULE_2(rmsprop_nesterov, square_avg, velocity) \
    RULE_2(rmsprop_centered, square_avg, grad_avg) \
    RULE_3(rmsprop_centered_momentum, square_avg, velocity, grad_avg) \
    RULE_3(rmsprop_centered_nesterov, square_avg, velocity, grad_avg) \
    RULE_2(adam, exp_avg, exp_avg_sq) \
    RULE_2(adamw, exp_avg, exp_avg_sq) \
    RULE_3(amsgrad, exp_avg, exp_avg_sq, max_exp_avg_sq)

#define OPTCORE_NUMBER_0(rule) OPTCORE_RULE_##rule,
#define OPTCORE_NUMBER_1(rule, s) OPTCORE_RULE_##rule,
#define OPTCORE_NUMBER_2(rule, s, t) OPTCORE_RULE_##rule,
#define OPTCORE_NUMBER_3(rule, s, t, u) OPTCORE_RULE_##rule,
enum {
    OPTCORE_RULES(OPTCORE_NUMBER_0, OPTCORE_NUMBER_1, OPTCORE_NUMBER_2, OPTCORE_NUMBER_3)
    OPTCORE_N_RULES
};

/* How an array is stored. Half types are stepped in float32, and may meet it and each other in one
 * step; float64 stays with float64. */
enum optcore_storage {
    OPTCORE_FLOAT32,
    OPTCORE_FLOAT64,
    OPTCORE_BFLOAT16,
    OPTCORE_FLOAT16,
    /* parameters with the rest of a float32 beside them, which is zero at first: */
    OPTCORE_SPLIT_BFLOAT16,             /* the low 16 bits of each element, uint16_t */
    OPTCORE_COPIED_BFLOAT16,            /* a float copy of each, which is what is stepped */
    OPTCORE_COPIED_FLOAT16
};

typedef struct optcore_array {
    void *data;
    void *rest;                         /* what lies beside a parameter; else NULL */
    size_t storage;
} optcore_array;

/* Start from optcore_defaults() and set what differs. */
typedef struct optcore_options {
    size_t size;                        /* of this struct, as the caller was compiled with it */
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
    int flush_subnormals;               /* 0; 1: states below the smallest normal number become 0 */
    uint64_t noise_key;                 /* 0; of stochastic rounding: other for each array and step */
    uint64_t first_element;             /* 0; where param[0] is in the whole array, for the noise: a
                                           multiple of 256 */
    int stochastic;                     /* 0; 1: half types are rounded stochastically */
    double alpha;                       /* 0.99; of rmsprop's averages */
    double beta1;                       /* 0.9; of adam's average of the gradient */
    double beta2;                       /* 0.999; of its square's */
    double eps;                         /* 1e-8 */
    double beta1_power;                 /* 0: no correction; else the product of beta1 over all steps
                                           of the array, this one among them: beta1 to the number of
                                           steps where it stays the same */
    double beta2_power;                 /* 0; likewise */
    int eps_in_sqrt;                    /* 0: sqrt(s) + eps; 1: sqrt(s + eps) */
} optcore_options;

/* What import_optcore() fetches. The first four members stay where they are for ever: they are
 * read before it is known whether the rest can be. */
typedef struct optcore_api {
    size_t abi_version;
    size_t api_size;                    /* bytes of this struct */
    size_t options_size;                /* bytes of optcore_options */
    const char *version;                /* optcore.__version__ */

    size_t n_rules;
    void (*defaults)(optcore_options *, size_t size);
    void (*step_f32)(int rule, float *, const float *, float **states, Py_ssize_t n,
                     const optcore_options *);
    void (*step_f64)(int rule, double *, const double *, double **states, Py_ssize_t n,
                     const optcore_options *);
    void (*step)(int rule, const optcore_array *, Py_ssize_t n, const optcore_options *);
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
    size_t n_rules;
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
    /* A newer optcore has more of everything; an older one lacks what this file may ask for. */
    n_rules = table->abi_version == OPTCORE_ABI_VERSION ? table->n_rules : 0;
    if (n_rules < OPTCORE_N_RULES || table->options_size < sizeof(optcore_options) ||
        table->api_size < sizeof(optcore_api)) {
        PyErr_Format(PyExc_ImportError,
                     "this module was compiled for optcore's ABI %d (options of %zd bytes, table of "
                     "%zd, %d rules); the installed optcore %s has ABI %zd (%zd, %zd, %zd): build it "
                     "again",
                     OPTCORE_ABI_VERSION, (Py_ssize_t)sizeof(optcore_options),
                     (Py_ssize_t)sizeof(optcore_api), OPTCORE_N_RULES, table->version,
                     (Py_ssize_t)table->abi_version, (Py_ssize_t)table->options_size,
                     (Py_ssize_t)table->api_size, (Py_ssize_t)n_rules);
        return -1;
    }
    optcore_table = table;
    return 0;
}
#endif

static inline optcore_options optcore_defaults(void) {
    optcore_options options;
    optcore_table->defaults(&options, sizeof options);
    return options;
}

/* Any rule by its number: one pointer for each of its states, in the order of the list above. */
static inline void optcore_step_f32(
    int rule,
    float *param,                       /* INOUT */
    const float *grad,                  /* IN */
    float **states,                     /* INOUT */
    Py_ssize_t n,
    const optcore_options *options      /* IN */
) {
    optcore_table->step_f32(rule, param, grad, states, n, options);
}

static inline void optcore_step_f64(
    int rule,
    double *param,                      /* INOUT */
    const double *grad,                 /* IN */
    double **states,                    /* INOUT */
    Py_ssize_t n,
    const optcore_options *options      /* IN */
) {
    optcore_table->step_f64(rule, param, grad, states, n, options);
}

/* Arrays of any storage: the parameter, its gradient, and each state, in the order of the list. */
static inline void optcore_step(
    int rule,
    const optcore_array *arrays,        /* INOUT, but for the gradient: IN */
    Py_ssize_t n,
    const optcore_options *options      /* IN */
) {
    optcore_table->step(rule, arrays, n, options);
}

#define OPTCORE_STEP_0(rule, type, real) \
    static inline void optcore_##rule##_##type( \
        real *param, const real *grad, Py_ssize_t n, const optcore_options *options) { \
        optcore_step_##type(OPTCORE_RULE_##rule, param, grad, NULL, n, options); \
    }
#define OPTCORE_STEP_1(rule, s, type, real) \
    static inline void optcore_##rule##_##type( \
        real *param, const real *grad, real *s, Py_ssize_t n, const optcore_options *options) { \
        optcore_step_##type(OPTCORE_RULE_##rule, param, grad, &s, n, options); \
    }
#define OPTCORE_STEP_2(rule, s, t, type, real) \
    static inline void optcore_##rule##_##type( \
        real *param, const real *grad, real *s, real *t, Py_ssize_t n, \
        const optcore_options *options) { \
        real *states[2]; \
        states[0] = s; states[1] = t; \
        optcore_step_##type(OPTCORE_RULE_##rule, param, grad, states, n, options); \
    }
#define OPTCORE_STEP_3(rule, s, t, u, type, real) \
    static inline void optcore_##rule##_##type( \
        real *param, const real *grad, real *s, real *t, real *u, Py_ssize_t n, \
        const optcore_options *options) { \
        real *states[3]; \
        states[0] = s; states[1] = t; states[2] = u; \
        optcore_step_##type(OPTCORE_RULE_##rule, param, grad, states, n, options); \
    }
#define OPTCORE_STEPS_0(rule) \
    OPTCORE_STEP_0(rule, f32, float) OPTCORE_STEP_0(rule, f64, double)
#define OPTCORE_STEPS_1(rule, s) \
    OPTCORE_STEP_1(rule, s, f32, float) OPTCORE_STEP_1(rule, s, f64, double)
#define OPTCORE_STEPS_2(rule, s, t) \
    OPTCORE_STEP_2(rule, s, t, f32, float) OPTCORE_STEP_2(rule, s, t, f64, double)
#define OPTCORE_STEPS_3(rule, s, t, u) \
    OPTCORE_STEP_3(rule, s, t, u, f32, float) OPTCORE_STEP_3(rule, s, t, u, f64, double)

OPTCORE_RULES(OPTCORE_STEPS_0, OPTCORE_STEPS_1, OPTCORE_STEPS_2, OPTCORE_STEPS_3)

#ifdef __cplusplus
}
#endif

#endif

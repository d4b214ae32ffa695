/* Every kernel, by name, on raw addresses; compiled as C99 and as C++11. */
#include <Python.h>
#include <optcore.h>
#include <string.h>

#define STEP_2(name, real) \
    if (strcmp(which, #name) == 0) { \
        optcore_##name((real *)x, (const real *)g, n, &options); \
        Py_RETURN_NONE; \
    }
#define STEP_3(name, real) \
    if (strcmp(which, #name) == 0) { \
        optcore_##name((real *)x, (const real *)g, (real *)v, n, &options); \
        Py_RETURN_NONE; \
    }

static PyObject *step(PyObject *self, PyObject *args) {
    const char *which;
    void *x, *g, *v;
    Py_ssize_t n;
    unsigned long long at[3];
    optcore_options options = optcore_defaults();
    (void)self;
    if (!PyArg_ParseTuple(args, "sKKKnddddddiiii", &which, &at[0], &at[1], &at[2], &n,
                          &options.lr, &options.momentum, &options.dampening,
                          &options.weight_decay, &options.grad_scale, &options.clip_value,
                          &options.maximize, &options.decoupled_weight_decay,
                          &options.lr_in_velocity, &options.first_step))
        return NULL;
    x = (void *)(size_t)at[0];
    g = (void *)(size_t)at[1];
    v = (void *)(size_t)at[2];
    STEP_2(sgd_f32, float)
    STEP_2(sgd_f64, double)
    STEP_3(momentum_f32, float)
    STEP_3(momentum_f64, double)
    STEP_3(nesterov_f32, float)
    STEP_3(nesterov_f64, double)
    PyErr_SetString(PyExc_KeyError, which);
    return NULL;
}

static PyObject *defaults(PyObject *self, PyObject *args) {
    optcore_options options = optcore_defaults();
    (void)self;
    (void)args;
    return PyBytes_FromStringAndSize((const char *)&options, (Py_ssize_t)sizeof options);
}

static PyMethodDef methods[] = {
    {"step", step, METH_VARARGS, NULL},
    {"defaults", defaults, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, PROBE_NAME, NULL, -1, methods, NULL, NULL, NULL, NULL,
};

#define INIT_(name) PyInit_##name
#define INIT(name) INIT_(name)
PyMODINIT_FUNC INIT(PROBE)(void) {
    if (import_optcore() < 0) return NULL;
    return PyModule_Create(&module);
}

/* Every kernel, by name and by number, on raw addresses; compiled as C99 and as C++11. */
#include <Python.h>
#include <optcore.h>
#include <string.h>

#define CALL(rule, type, ...) \
    if (strcmp(which, #rule "_" #type) == 0) { \
        optcore_##rule##_##type(__VA_ARGS__, n, options); \
        Py_RETURN_NONE; \
    }
#define F(k) ((float *)at[k])
#define D(k) ((double *)at[k])
#define CALL_0(rule) CALL(rule, f32, F(0), F(1)) CALL(rule, f64, D(0), D(1))
#define CALL_1(rule, s) CALL(rule, f32, F(0), F(1), F(2)) CALL(rule, f64, D(0), D(1), D(2))
#define CALL_2(rule, s, t) \
    CALL(rule, f32, F(0), F(1), F(2), F(3)) CALL(rule, f64, D(0), D(1), D(2), D(3))
#define CALL_3(rule, s, t, u) \
    CALL(rule, f32, F(0), F(1), F(2), F(3), F(4)) CALL(rule, f64, D(0), D(1), D(2), D(3), D(4))

static PyObject *step(PyObject *self, PyObject *args) {
    const char *which;
    const optcore_options *options;
    Py_ssize_t n;
    unsigned long long place[6];
    void *at[5];
    int rule, k;
    (void)self;
    if (!PyArg_ParseTuple(args, "siKKKKKnK", &which, &rule, &place[0], &place[1], &place[2],
                          &place[3], &place[4], &n, &place[5]))
        return NULL;
    for (k = 0; k < 5; k++) at[k] = (void *)(size_t)place[k];
    options = (const optcore_options *)(size_t)place[5];
    OPTCORE_RULES(CALL_0, CALL_1, CALL_2, CALL_3)
    if (strcmp(which, "any_f32") == 0) {
        float *states[3];
        for (k = 0; k < 3; k++) states[k] = F(2 + k);
        optcore_step_f32(rule, F(0), F(1), states, n, options);
        Py_RETURN_NONE;
    }
    if (strcmp(which, "any_f64") == 0) {
        double *states[3];
        for (k = 0; k < 3; k++) states[k] = D(2 + k);
        optcore_step_f64(rule, D(0), D(1), states, n, options);
        Py_RETURN_NONE;
    }
    PyErr_SetString(PyExc_KeyError, which);
    return NULL;
}

static PyObject *step_stored(PyObject *self, PyObject *args) {
    unsigned long long arrays, options;
    Py_ssize_t n;
    int rule;
    (void)self;
    if (!PyArg_ParseTuple(args, "iKnK", &rule, &arrays, &n, &options)) return NULL;
    optcore_step(rule, (const optcore_array *)(size_t)arrays, n,
                 (const optcore_options *)(size_t)options);
    Py_RETURN_NONE;
}

static PyObject *defaults(PyObject *self, PyObject *args) {
    optcore_options options = optcore_defaults();
    (void)self;
    (void)args;
    return PyBytes_FromStringAndSize((const char *)&options, (Py_ssize_t)sizeof options);
}

static PyMethodDef methods[] = {
    {"step", step, METH_VARARGS, NULL},
    {"step_stored", step_stored, METH_VARARGS, NULL},
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

/* One table for two files: this one imports it. */
#include <Python.h>
#define OPTCORE_UNIQUE_SYMBOL shared_optcore_table
#include <optcore.h>

double shared_default_scale(void);

static PyObject *scale(PyObject *self, PyObject *args) {
    (void)self;
    (void)args;
    return PyFloat_FromDouble(shared_default_scale());
}

static PyMethodDef methods[] = {
    {"scale", scale, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "shared", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_shared(void) {
    if (import_optcore() < 0) return NULL;
    return PyModule_Create(&module);
}

/* A trainer in C: linear regression by gradient descent with momentum, without the GIL. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <optcore.h>
#include <string.h>

typedef struct {
    Py_buffer w, x, y, other;           /* other: the gradient, or the velocity */
    Py_ssize_t rows, columns;
} Problem;

/* g = xᵀ(xw - y) / rows; returns the loss, |xw - y|² / (2 rows). */
static double gradient(const Problem *p, double *g) {
    const double *w = p->w.buf, *x = p->x.buf, *y = p->y.buf;
    double loss = 0;
    for (Py_ssize_t j = 0; j < p->columns; j++) g[j] = 0;
    for (Py_ssize_t i = 0; i < p->rows; i++, x += p->columns) {
        double residual = -y[i];
        for (Py_ssize_t j = 0; j < p->columns; j++) residual += x[j] * w[j];
        for (Py_ssize_t j = 0; j < p->columns; j++) g[j] += residual / (double)p->rows * x[j];
        loss += residual * residual / 2;
    }
    return loss / (double)p->rows;
}

static void release(Problem *p) {
    PyBuffer_Release(&p->w);
    PyBuffer_Release(&p->x);
    PyBuffer_Release(&p->y);
    PyBuffer_Release(&p->other);
}

static int view(PyObject *array, int flags, Py_buffer *buffer) {
    if (PyObject_GetBuffer(array, buffer, flags | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) return -1;
    if (strcmp(buffer->format, "d") == 0) return 0;
    PyErr_Format(PyExc_TypeError, "expected an array of float64, got format %s", buffer->format);
    return -1;
}

/* Views of (w, x, y, other), checked: from here on all is pointers. */
static int open_problem(PyObject *const *arrays, Problem *p) {
    memset(p, 0, sizeof *p);
    if (view(arrays[0], PyBUF_WRITABLE, &p->w) < 0 || view(arrays[1], 0, &p->x) < 0 ||
        view(arrays[2], 0, &p->y) < 0 || view(arrays[3], PyBUF_WRITABLE, &p->other) < 0) {
        release(p);
        return -1;
    }
    p->rows = p->y.len / p->y.itemsize;
    p->columns = p->w.len / p->w.itemsize;
    if (p->rows > 0 && p->x.len == p->rows * p->w.len && p->other.len == p->w.len) return 0;
    PyErr_SetString(PyExc_ValueError, "expected w (n), x (m, n), y (m), and one more (n)");
    release(p);
    return -1;
}

static PyObject *py_gradient(PyObject *self, PyObject *args) {
    PyObject *arrays[4];
    Problem p;
    double loss;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOO", &arrays[0], &arrays[1], &arrays[2], &arrays[3]) ||
        open_problem(arrays, &p) < 0)
        return NULL;
    loss = gradient(&p, p.other.buf);
    release(&p);
    return PyFloat_FromDouble(loss);
}

static PyObject *py_train(PyObject *self, PyObject *args) {
    PyObject *arrays[4];
    Problem p;
    Py_ssize_t steps;
    double *g, loss = 0;
    optcore_options options = optcore_defaults();
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOndd", &arrays[0], &arrays[1], &arrays[2], &arrays[3],
                          &steps, &options.lr, &options.momentum) ||
        open_problem(arrays, &p) < 0)
        return NULL;
    g = PyMem_Malloc((size_t)p.w.len);
    if (!g) {
        release(&p);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t step = 0; step < steps; step++) {
        loss = gradient(&p, g);
        optcore_momentum_f64(p.w.buf, g, p.other.buf, p.columns, &options);
    }
    Py_END_ALLOW_THREADS
    PyMem_Free(g);
    release(&p);
    return PyFloat_FromDouble(loss);
}

static PyMethodDef methods[] = {
    {"gradient", py_gradient, METH_VARARGS, "gradient(w, x, y, out) -> loss"},
    {"train", py_train, METH_VARARGS, "train(w, x, y, velocity, steps, lr, momentum) -> loss"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "leastsquares", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_leastsquares(void) {
    if (import_optcore() < 0) return NULL;
    return PyModule_Create(&module);
}

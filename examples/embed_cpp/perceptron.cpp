// A trainer in C++: a network with one hidden layer learns the exclusive or, without the GIL.
#include <Python.h>
#include <optcore.h>

#include <array>
#include <cmath>
#include <exception>
#include <random>
#include <vector>

namespace {

// The kernels by element type, so that a template finds its own.
void step(std::vector<float> &x, const std::vector<float> &g, std::vector<float> &v,
          const optcore_options &options) {
    optcore_nesterov_f32(x.data(), g.data(), v.data(), static_cast<Py_ssize_t>(x.size()), &options);
}

void step(std::vector<double> &x, const std::vector<double> &g, std::vector<double> &v,
          const optcore_options &options) {
    optcore_nesterov_f64(x.data(), g.data(), v.data(), static_cast<Py_ssize_t>(x.size()), &options);
}

constexpr std::size_t hidden = 8;
constexpr std::size_t row = 4;                  // of a hidden unit: two inputs, bias, output weight
constexpr std::size_t size = hidden * row;

template <typename Real>
std::vector<Real> initial() {
    std::mt19937 generator(4);
    std::vector<Real> weights(size);
    for (Real &w : weights) w = static_cast<Real>(generator() / 4294967296.0 * 2 - 1);
    return weights;
}

// Write the gradient of half the squared error over the four corners; return that error.
template <typename Real>
Real gradient(const std::vector<Real> &w, std::vector<Real> &g) {
    Real loss = 0;
    g.assign(size, 0);
    for (int corner = 0; corner < 4; corner++) {
        const Real a = corner & 1 ? 1 : -1, b = corner & 2 ? 1 : -1;
        std::array<Real, hidden> activation;
        Real error = a * b;                     // -1 where exactly one input is on
        for (std::size_t k = 0; k < hidden; k++) {
            const Real *unit = &w[k * row];
            activation[k] = std::tanh(unit[0] * a + unit[1] * b + unit[2]);
            error += unit[3] * activation[k];
        }
        for (std::size_t k = 0; k < hidden; k++) {
            const Real back = error * w[k * row + 3] * (1 - activation[k] * activation[k]);
            Real *out = &g[k * row];
            out[0] += back * a;
            out[1] += back * b;
            out[2] += back;
            out[3] += error * activation[k];
        }
        loss += error * error / 2;
    }
    return loss;
}

class WithoutGil {
    PyThreadState *state = PyEval_SaveThread();

public:
    WithoutGil() = default;
    WithoutGil(const WithoutGil &) = delete;
    WithoutGil &operator=(const WithoutGil &) = delete;
    ~WithoutGil() { PyEval_RestoreThread(state); }
};

template <typename Real>
Real train(std::vector<Real> &w, Py_ssize_t steps, const optcore_options &options) {
    const WithoutGil without_gil;
    std::vector<Real> g(size), v(size, 0);
    Real loss = 0;
    for (Py_ssize_t i = 0; i < steps; i++) {
        loss = gradient(w, g);
        step(w, g, v, options);
    }
    return loss;
}

template <typename Real>
PyObject *bytes_of(const std::vector<Real> &values) {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char *>(values.data()),
                                     static_cast<Py_ssize_t>(values.size() * sizeof(Real)));
}

template <typename Real>
PyObject *trained(Py_ssize_t steps, const optcore_options &options) {
    std::vector<Real> w = initial<Real>();
    const Real loss = train(w, steps, options);
    return Py_BuildValue("dN", static_cast<double>(loss), bytes_of(w));
}

template <typename Real>
PyObject *gradient_at(const char *bytes, Py_ssize_t length) {
    if (length != static_cast<Py_ssize_t>(size * sizeof(Real))) {
        PyErr_SetString(PyExc_ValueError, "expected as many weights as initial() returns");
        return nullptr;
    }
    const Real *begin = reinterpret_cast<const Real *>(bytes);
    std::vector<Real> g;
    gradient(std::vector<Real>(begin, begin + size), g);
    return bytes_of(g);
}

// No exception may pass through Python's frames.
template <typename Body>
PyObject *guarded(Body body) {
    try {
        return body();
    } catch (const std::exception &error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

PyObject *py_initial(PyObject *, PyObject *args) {
    int wide;
    if (!PyArg_ParseTuple(args, "p", &wide)) return nullptr;
    return guarded([&] { return wide ? bytes_of(initial<double>()) : bytes_of(initial<float>()); });
}

PyObject *py_gradient(PyObject *, PyObject *args) {
    int wide;
    Py_buffer w;
    if (!PyArg_ParseTuple(args, "py*", &wide, &w)) return nullptr;
    const char *bytes = static_cast<const char *>(w.buf);
    PyObject *result = guarded([&] {
        return wide ? gradient_at<double>(bytes, w.len) : gradient_at<float>(bytes, w.len);
    });
    PyBuffer_Release(&w);
    return result;
}

PyObject *py_train(PyObject *, PyObject *args) {
    int wide;
    Py_ssize_t steps;
    optcore_options options = optcore_defaults();
    options.lr_in_velocity = 1;
    if (!PyArg_ParseTuple(args, "pndd", &wide, &steps, &options.lr, &options.momentum))
        return nullptr;
    return guarded(
        [&] { return wide ? trained<double>(steps, options) : trained<float>(steps, options); });
}

PyMethodDef methods[] = {
    {"initial", py_initial, METH_VARARGS, "initial(wide) -> weights"},
    {"gradient", py_gradient, METH_VARARGS, "gradient(wide, weights) -> gradient"},
    {"train", py_train, METH_VARARGS, "train(wide, steps, lr, momentum) -> (loss, weights)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "perceptron", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit_perceptron() {
    if (import_optcore() < 0) return nullptr;
    return PyModule_Create(&module);
}

"""A trainer in Cython: logistic regression in minibatches, without the GIL."""
from libc.math cimport exp, log1p

from optcore.kernels cimport optcore_defaults, optcore_nesterov_f32, optcore_options


cdef float batch_gradient(
    const float[::1] w, const float[:, ::1] x, const float[::1] y, float[::1] g,
    Py_ssize_t begin, Py_ssize_t end,
) noexcept nogil:
    """Write the gradient of the mean of log(1 + exp(-y·xw)) over some rows; return that mean."""
    cdef Py_ssize_t i, j
    cdef float margin, pull, loss = 0
    g[:] = 0
    for i in range(begin, end):
        margin = 0
        for j in range(w.shape[0]):
            margin += x[i, j] * w[j]
        margin *= y[i]
        loss += <float>log1p(exp(-margin))
        pull = <float>(-y[i] / (1 + exp(margin)) / (end - begin))
        for j in range(w.shape[0]):
            g[j] += pull * x[i, j]
    return loss / (end - begin)


cdef int check(w, x, y, g) except -1:
    if not len(w) == len(g) == x.shape[1] or len(x) != len(y):
        raise ValueError("expected w (n), x (m, n), y (m), and one more (n)")
    return 0


def gradient(
    const float[::1] w, const float[:, ::1] x, const float[::1] y, float[::1] out, begin, end
):
    """Write the gradient over rows `begin` to `end`; return the loss."""
    check(w, x, y, out)
    return batch_gradient(w, x, y, out, begin, end)


def train(
    float[::1] w, const float[:, ::1] x, const float[::1] y, float[::1] velocity,
    Py_ssize_t epochs, Py_ssize_t batch, double lr, double momentum,
):
    """Train `w` in place with Nesterov momentum; return the last epoch's mean loss."""
    cdef float[::1] g = velocity.copy()
    cdef optcore_options options = optcore_defaults()
    cdef Py_ssize_t begin, end, _epoch
    cdef double loss = 0
    check(w, x, y, velocity)
    options.lr = lr
    options.momentum = momentum
    with nogil:
        for _epoch in range(epochs):
            loss = 0
            begin = 0
            while begin < x.shape[0]:
                end = min(begin + batch, x.shape[0])
                loss += (end - begin) * batch_gradient(w, x, y, g, begin, end)
                if w.shape[0]:
                    optcore_nesterov_f32(&w[0], &g[0], &velocity[0], w.shape[0], &options)
                begin = end
    return loss / x.shape[0]

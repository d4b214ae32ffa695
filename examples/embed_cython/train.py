"""Separate two clouds of points in Cython, and again from Python to compare the bits."""
import numpy as np
from logistic import gradient, train

import optcore

LR, MOMENTUM, EPOCHS, BATCH = 0.1, 0.9, 20, 32

rng = np.random.default_rng(0)
y = rng.choice([-1, 1], 500).astype(np.float32)
x = (rng.standard_normal((500, 16)) + 0.5 * y[:, None]).astype(np.float32)

w, velocity = np.zeros(16, np.float32), np.zeros(16, np.float32)
loss = train(w, x, y, velocity, EPOCHS, BATCH, LR, MOMENTUM)

w_python = np.zeros_like(w)
grad, velocity = np.empty_like(w), np.zeros_like(w)
for _ in range(EPOCHS):
    for begin in range(0, len(x), BATCH):
        gradient(w_python, x, y, grad, begin, min(begin + BATCH, len(x)))
        optcore.nesterov_step(w_python, grad, velocity, lr=LR, momentum=MOMENTUM)

right = np.mean(np.sign(x @ w) == y)
print(f"Cython: loss {loss:.3e} after {EPOCHS} epochs, {right:.1%} of the points on their side")
assert w.tobytes() == w_python.tobytes()
print("Cython and Python: equal to the last bit")

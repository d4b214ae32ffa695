"""Recover a line's coefficients in C, and again from Python to compare the bits."""
import numpy as np
from leastsquares import gradient, train

import optcore

LR, MOMENTUM, STEPS = 0.05, 0.9, 300

rng = np.random.default_rng(0)
truth = rng.standard_normal(20)
x = rng.standard_normal((500, 20))
y = x @ truth + 0.01 * rng.standard_normal(500)

w, velocity = np.zeros(20), np.zeros(20)
loss = train(w, x, y, velocity, STEPS, LR, MOMENTUM)

w_python, grad, velocity = np.zeros(20), np.empty(20), np.zeros(20)
for _ in range(STEPS):
    gradient(w_python, x, y, grad)
    optcore.momentum_step(w_python, grad, velocity, lr=LR, momentum=MOMENTUM)

print(f"C: loss {loss:.3e} after {STEPS} steps, largest error {abs(w - truth).max():.1e}")
assert w.tobytes() == w_python.tobytes()
print("C and Python: equal to the last bit")

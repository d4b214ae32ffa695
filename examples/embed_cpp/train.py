"""Learn the exclusive or in C++, in both precisions, and again from Python to compare the bits."""
import numpy as np
import perceptron

import optcore

LR, MOMENTUM, STEPS = 0.05, 0.9, 500

for dtype in (np.float32, np.float64):
    wide = dtype is np.float64
    loss, weights = perceptron.train(wide, STEPS, LR, MOMENTUM)

    w = np.frombuffer(perceptron.initial(wide), dtype).copy()
    velocity = np.zeros_like(w)
    for _ in range(STEPS):
        grad = np.frombuffer(perceptron.gradient(wide, w), dtype)
        optcore.nesterov_step(w, grad, velocity, lr=LR, momentum=MOMENTUM, lr_in_velocity=True)

    print(f"C++: loss {loss:.3e} after {STEPS} steps in {np.dtype(dtype)}")
    assert weights == w.tobytes()
print("C++ and Python: equal to the last bit")

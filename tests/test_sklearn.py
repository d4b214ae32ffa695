"""optcore.sklearn against scikit-learn's own optimizer, to the last bit."""
from __future__ import annotations

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.datasets import load_digits
from sklearn.neural_network import (
    MLPClassifier,
    MLPRegressor,
    _multilayer_perceptron,
    _stochastic_optimizers,
)

import optcore.sklearn
from reference import same_bits

X, Y = load_digits(return_X_y=True)
X = X[:400] / 16
Y = Y[:400]


def fit(kind, dtype=np.float64, y_dtype=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # that it has not converged
        return kind(
            hidden_layer_sizes=(20, 10), solver="sgd", max_iter=8, random_state=0, **options
        ).fit(X.astype(dtype), Y if issubclass(kind, MLPClassifier) else Y.astype(y_dtype or dtype))


def assert_same_model(a, b, dtype):
    for p, q in zip(a.coefs_ + a.intercepts_, b.coefs_ + b.intercepts_, strict=True):
        assert p.dtype == dtype
        assert same_bits(p, q)
    assert a.loss_curve_ == b.loss_curve_
    assert a._optimizer.learning_rate == b._optimizer.learning_rate


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("schedule", ["constant", "invscaling", "adaptive"])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, True)])
@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
def test_perceptrons_have_the_same_bits(kind, momentum, nesterov, schedule, dtype):
    options = {"momentum": momentum, "nesterovs_momentum": nesterov, "learning_rate": schedule,
               "learning_rate_init": 0.01, "n_iter_no_change": 1, "tol": 0.05}
    theirs = fit(kind, dtype, **options)
    with optcore.sklearn.patched():
        ours = fit(kind, dtype, **options)
    assert type(theirs._optimizer) is _stochastic_optimizers.SGDOptimizer
    assert type(ours._optimizer) is optcore.sklearn.SGDOptimizer
    assert_same_model(theirs, ours, dtype)
    derived = fit(getattr(optcore.sklearn, kind.__name__), dtype, dtype, **options)
    assert type(derived._optimizer) is optcore.sklearn.SGDOptimizer
    assert_same_model(theirs, derived, dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("nesterov", [True, False])
def test_update_params(nesterov, dtype, rng):
    start = [np.asarray(rng.standard_normal(shape), dtype) for shape in [(40, 30), (30, 3), 30]]
    start[1] = np.asfortranarray(start[1])
    grads = [np.asarray(rng.standard_normal(p.shape), dtype) for p in start]
    results = []
    for kind in (_stochastic_optimizers.SGDOptimizer, optcore.sklearn.SGDOptimizer):
        params = [p.copy(order="K") for p in start]
        optimizer = kind(params, 0.1, "invscaling", 0.9, nesterov, 0.25)
        held = list(params)
        for k in range(5):
            optimizer.update_params(params, grads)
            optimizer.iteration_ends(k)
        assert all(a is b for a, b in zip(params, held, strict=True))
        results.append([*params, *optimizer.velocities])
    for p, q in zip(*results, strict=True):
        assert same_bits(p, q)


def test_stopping(capsys):
    results = []
    for kind in (_stochastic_optimizers.SGDOptimizer, optcore.sklearn.SGDOptimizer):
        optimizer = kind([np.ones(3)], 1e-5, "adaptive")
        results.append([optimizer.trigger_stopping("Enough.", True) for _ in range(4)])
    assert results[0] == results[1] == [False, False, True, True]
    out = capsys.readouterr().out.splitlines()
    assert out[:4] == out[4:]


def test_partial_fit_and_pickle():
    models = [MLPClassifier(solver="sgd", hidden_layer_sizes=(5,), random_state=0),
              optcore.sklearn.MLPClassifier(solver="sgd", hidden_layer_sizes=(5,), random_state=0)]
    for k in range(3):
        for model in models:
            model.partial_fit(X, Y, classes=range(10))
        models[k % 2] = pickle.loads(pickle.dumps(models[k % 2]))
    assert_same_model(*models, np.float64)


def test_arrays_must_match():
    optimizer = optcore.sklearn.SGDOptimizer([np.ones(3)])
    with pytest.raises(ValueError, match="must hold 1 arrays, got 2 and 1"):
        optimizer.update_params([np.ones(3), np.ones(3)], [np.ones(3)])
    with pytest.raises(ValueError, match="grad has shape"):
        optimizer.update_params([np.ones(3)], [np.ones(4)])


def test_mixed_dtypes_go_their_way():
    """float32 X with float64 y make float64 gradients of float32 parameters."""
    theirs = fit(MLPRegressor, np.float32, np.float64)
    with optcore.sklearn.patched():
        ours = fit(MLPRegressor, np.float32, np.float64)
    assert ours._optimizer.velocities[0].dtype == np.float64
    assert_same_model(theirs, ours, np.float32)


def test_patches_nest():
    theirs = _stochastic_optimizers.SGDOptimizer
    with optcore.sklearn.patched():
        with optcore.sklearn.patched():
            pass
        assert _multilayer_perceptron.SGDOptimizer is optcore.sklearn.SGDOptimizer
    with pytest.raises(KeyError), optcore.sklearn.patched():
        raise KeyError
    assert _multilayer_perceptron.SGDOptimizer is theirs


def changed_arithmetic(theirs):
    def updates(self, grads):
        self.velocities = [self.momentum * v - self.learning_rate * (g + 0.1)
                           for v, g in zip(self.velocities, grads, strict=True)]
        return self.velocities
    return "_get_updates", updates, "computes something else"


def changed_signature(theirs):
    def init(self, params, learning_rate_init=0.1, lr_schedule="constant", momentum=0.9,
             nesterov=True, power_t=0.5, weight_decay=0.0):
        raise AssertionError
    return "__init__", init, r"SGDOptimizer.__init__ takes .* weight_decay=0.0"


def changed_entry(theirs):
    def update_params(self, params, grads, sample_weight=None):
        raise AssertionError
    return "update_params", update_params, r"SGDOptimizer.update_params takes"


@pytest.mark.parametrize("change", [changed_arithmetic, changed_signature, changed_entry])
def test_another_scikit_learn_fails_loudly(change, monkeypatch):
    theirs = _stochastic_optimizers.SGDOptimizer
    name, replacement, words = change(theirs)
    monkeypatch.setattr(theirs, name, replacement)
    with pytest.raises(RuntimeError, match=words), optcore.sklearn.patched():
        pass
    assert _multilayer_perceptron.SGDOptimizer is theirs


def test_another_perceptron_fails_loudly(monkeypatch):
    monkeypatch.setattr(_multilayer_perceptron, "SGDOptimizer", object)
    with pytest.raises(RuntimeError, match="another SGDOptimizer"), optcore.sklearn.patched():
        pass
    monkeypatch.undo()
    monkeypatch.setattr(_multilayer_perceptron.BaseMultilayerPerceptron, "_fit_stochastic",
                        lambda self: None)
    with pytest.raises(RuntimeError, match="does not call"), optcore.sklearn.patched():
        pass


def test_no_scikit_learn_says_what_to_install():
    code = "import sys; sys.modules['sklearn'] = None; import optcore; import optcore.sklearn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'optcore[sklearn]'" in done.stderr

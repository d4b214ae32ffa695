"""optcore.sklearn against scikit-learn's own optimizer, to the last bit."""
from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone
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
    assert ours._optimizer._plan.step_count == 2 * ours.n_iter_    # batches of 200: all in one pass
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


def halves(shape, dtype=np.float32):
    """Numbers whose sums and products round."""
    return np.asarray(np.sin(np.arange(math.prod(shape)) + 1.5), dtype).reshape(shape)


def params_of(*dtypes):
    return [halves(shape, dtype) for dtype in dtypes for shape in [(5, 3), (3,), (0, 2), ()]]


def twice(view):
    square = halves((4, 4), F8)
    return [square, view(square)]


def frozen(array):
    array.setflags(write=False)
    return array


def varying(params, k, optimizer):
    return [np.asarray(np.cos(p + k), p.dtype) for p in params]


def of_all(make):
    """Gradients that `make` makes of the step and each parameter's shape and dtype."""
    return lambda params, k, _: [make(k, p.shape, p.dtype) for p in params]


def wide(k, shape, dtype):
    """Every other element of what is twice as long."""
    return halves([2 * n for n in shape], dtype)[tuple(slice(None, None, 2) for _ in shape)]


F4, F8 = np.float32, np.float64

SINGLE, DOUBLE, BOTH = (partial(params_of, *dtypes) for dtypes in [(F4,), (F8,), (F4, F8)])

# What may be peculiar: options of the optimizer, parameters, their gradients at step k.
ODD = {
    str(options): (options, BOTH, varying) for options in [
        *({"learning_rate_init": lr}
          for lr in (1e-50, 1e50, 1e-42, 0.0, -0.0, -0.5, np.nan, np.inf)),
        {"lr_schedule": "invscaling", "power_t": 40.0},
        {"lr_schedule": "invscaling", "power_t": np.float64(0.5)},
        *({"momentum": momentum}
          for momentum in (1, 1.5, 1 - 1e-12, 1e-60, 0, -0.0, True)),
        *({"momentum": kind(0.9)} for kind in (np.float64, np.float32, np.array)),
    ]
} | {
    "negative zeros": (
        {"momentum": 0}, lambda: [np.full(4, -0.0, F4)], of_all(lambda k, *how: np.zeros(*how))),
    "gradients not finite": ({}, BOTH, of_all(
        lambda k, *how: np.full(how[0], [np.nan, np.inf, -np.inf][k], how[1]))),
    "gradients not finite, momentum 0": ({"momentum": 0.0}, BOTH, of_all(
        lambda k, *how: np.full(how[0], [np.inf, 1, np.nan][k], how[1]))),
    "float16": ({}, partial(params_of, np.float16), varying),
    "float16 beside float32": ({}, partial(params_of, np.float16, F4), varying),
    "big-endian": ({}, partial(params_of, ">f8"), varying),
    "integers": ({}, partial(params_of, int), varying),
    "float64 gradients": ({}, SINGLE, of_all(lambda k, shape, _: np.cos(halves(shape, F8) + k))),
    "float32 gradients": ({}, DOUBLE, of_all(lambda k, shape, _: np.cos(halves(shape, F4) + k))),
    "integer gradients": ({}, SINGLE, of_all(lambda k, shape, _: np.full(shape, k + 1))),
    "transposed gradients": ({}, BOTH, of_all(
        lambda k, shape, dtype: halves(shape[::-1], dtype).T)),
    "strided gradients": ({}, BOTH, of_all(wide)),
    "reversed gradients": ({}, BOTH, of_all(lambda k, *how: np.flip(halves(*how)))),
    "repeated gradients": ({}, BOTH, of_all(
        lambda k, shape, dtype: np.broadcast_to(dtype.type(k + 0.1), shape))),
    "numbers as gradients": ({}, BOTH, of_all(lambda k, *_: 0.7)),
    "lists as gradients": ({}, BOTH, of_all(lambda k, *how: halves(*how).tolist())),
    "masked gradients": ({}, BOTH, of_all(
        lambda k, *how: np.ma.masked_greater(halves(*how), 0.5))),
    "gradients are parameters": ({}, BOTH, lambda params, *_: list(params)),
    "gradients are other parameters": (     # of f(a, b) = a · b
        {}, lambda: list(halves((2, 4))), lambda params, *_: params[::-1]),
    "gradients are velocities": (
        {}, lambda: list(halves((2, 4))), lambda params, k, optimizer:
        optimizer.velocities[::-1] if k else varying(params, k, optimizer)),
    "one array twice": ({}, partial(twice, np.asarray), varying),
    "an array and its transpose": ({}, partial(twice, np.transpose), varying),
    "strided parameters": ({}, lambda: [halves((6, 6))[::2, ::3]], varying),
    "misaligned parameters": ({}, lambda: [np.zeros(33, np.uint8)[1:].view(F8)], varying),
    "masked parameters": ({}, lambda: [np.ma.array([1.5, 2.5], mask=[False, True])], varying),
    "the second is read-only": ({}, lambda: [halves((3,)), frozen(halves((3,)))], varying),
    "the second gradient is too long": ({}, BOTH, lambda params, *_: [
        np.copy(p) if i != 1 else np.ones(7, F4) for i, p in enumerate(params)]),
    "the second gradient has more dimensions": ({}, BOTH, lambda params, *_: [
        np.copy(p) if i != 1 else p[None] for i, p in enumerate(params)]),
    "the second gradient is none": ({}, BOTH, lambda params, *_: [
        np.copy(p) if i != 1 else None for i, p in enumerate(params)]),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_odd_steps_have_the_same_bits(name, nesterov):
    """Whatever scikit-learn computes; what raises there raises here, and changes nothing."""
    options, make, grads_of = ODD[name]
    results = []
    for kind in (_stochastic_optimizers.SGDOptimizer, optcore.sklearn.SGDOptimizer):
        params = make()
        optimizer = kind(params, **{"nesterov": nesterov, **options})
        raised = False
        for k in range(3):
            grads = grads_of(params, k, optimizer)
            before = copy.deepcopy([*params, *optimizer.velocities])
            try:
                optimizer.update_params(params, grads)
            except (TypeError, ValueError):
                raised = True
                if kind is optcore.sklearn.SGDOptimizer:
                    assert all(map(same_bits, [*params, *optimizer.velocities], before))
            optimizer.iteration_ends(10 ** (k + 1))
        results.append((raised, [*params, *optimizer.velocities]))
    (theirs_raised, theirs), (ours_raised, ours) = results
    assert ours_raised == theirs_raised
    if not ours_raised:
        for p, q in zip(theirs, ours, strict=True):
            assert same_bits(p, q)


def test_options_and_arrays_edited_between_steps():
    """nesterov, momentum, the rate, velocities and the list of parameters, as scikit-learn."""
    def edit(optimizer, params, k):
        if k == 1:
            optimizer.nesterov = False
        if k == 2:
            optimizer.momentum, optimizer.learning_rate = 0.3, 0.7
        if k == 3:
            optimizer.velocities[0] = np.full_like(params[0], 3)
        if k == 4:
            optimizer.velocities = [v / 7 for v in optimizer.velocities]
        if k == 5:
            params[1] = params[1] * F4(3)
        if k == 6:      # for one step only: the next is in one pass again
            optimizer.learning_rate = 1e-50
        if k == 7:
            optimizer.learning_rate, optimizer.nesterov = 0.1, True

    results = []
    for kind in (_stochastic_optimizers.SGDOptimizer, optcore.sklearn.SGDOptimizer):
        params = [p for p in params_of(F4, F8) if p.ndim]
        optimizer = kind(params)
        for k in range(9):
            edit(optimizer, params, k)
            optimizer.update_params(params, varying(params, k, optimizer))
        results.append([*params, *optimizer.velocities])
    for p, q in zip(*results, strict=True):
        assert same_bits(p, q)
    assert optimizer._plan.step_count == 2


def test_an_interrupted_step_of_theirs_changes_nothing():
    """Where NumPy raises in the middle, as it may be told to."""
    params = [np.ones(2, np.float16), np.full(2, 6e4, np.float16)]
    optimizer = optcore.sklearn.SGDOptimizer(params, 1.0)
    held = optimizer.velocities
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        optimizer.update_params(params, [p * 0 + np.float16(-1e4) for p in params])
    assert [p.tolist() for p in params] == [[1, 1], [6e4, 6e4]]
    assert optimizer.velocities is held
    assert not any(v.any() for v in held)


def test_copies_step_on_their_own():
    params = params_of(F4, F8)
    optimizer = optcore.sklearn.SGDOptimizer(params, 0.1, "adaptive")
    optimizer.update_params(params, varying(params, 0, None))
    twins = [copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    start = copy.deepcopy(params)
    optimizer.update_params(params, varying(start, 1, None))
    for twin in twins:
        own = copy.deepcopy(start)
        twin.update_params(own, varying(start, 1, None))
        for p, q in zip([*own, *twin.velocities], [*params, *optimizer.velocities], strict=True):
            assert same_bits(p, q)
        with pytest.raises(AttributeError, match="has no attribute 'lr'"):
            twin.lr = 0.5


def test_arrays_must_match():
    optimizer = optcore.sklearn.SGDOptimizer([np.ones(3)])
    with pytest.raises(ValueError, match="must hold 1 arrays, got 2 and 1"):
        optimizer.update_params([np.ones(3), np.ones(3)], [np.ones(3)])
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \(4,\).*reshape\(param.shape\)"):
        optimizer.update_params([np.ones(3)], [np.ones(4)])
    # scikit-learn's own step would train nothing here, and say nothing
    with pytest.raises(TypeError, match=r"params\[0\] must be a numpy.ndarray, got float"):
        optimizer.update_params([1.0], [np.ones(3)])


def test_what_nothing_reads_is_refused():
    optimizer = optcore.sklearn.SGDOptimizer([np.ones(3)])
    for name in ("lr", "max_norm", "power", "velocity"):
        with pytest.raises(AttributeError, match=f"no attribute {name!r}.*learning_rate"):
            setattr(optimizer, name, 0.1)
    with pytest.raises(ValueError, match=r"lr_schedule must be .* got 'cosine'"):
        optimizer.lr_schedule = "cosine"
    with pytest.raises(ValueError, match=r"lr_schedule must be .* got 'cosine'"):
        optcore.sklearn.SGDOptimizer([np.ones(3)], 0.1, "cosine")
    optimizer.lr_schedule = "invscaling"

    class WithHistory(optcore.sklearn.SGDOptimizer):
        history = None

    WithHistory([np.ones(3)]).history = [1]


@pytest.mark.parametrize("name", ["MLPClassifier", "MLPRegressor"])
def test_perceptrons_take_scikit_learns_attributes_and_no_others(name):
    model = getattr(optcore.sklearn, name)(solver="sgd", hidden_layer_sizes=(5,), max_iter=2)
    with pytest.raises(AttributeError, match=r"no attribute 'nesterov'.*get_params"):
        model.nesterov = False
    with pytest.raises(ValueError, match="Invalid parameter 'nesterov'"):
        model.set_params(nesterov=False)
    model.nesterovs_momentum = False
    model.loss = model.loss
    assert model.get_params()["nesterovs_momentum"] is False
    for options in ({}, {"early_stopping": True}, {"warm_start": True}):
        for made in (clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            made.set_params(**options)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made.fit(X[:50], Y[:50] % 2).fit(X[:50], Y[:50] % 2)
            assert type(made._optimizer) is optcore.sklearn.SGDOptimizer


def test_an_optimizer_that_overrides_the_update_is_asked():
    class Halved(optcore.sklearn.SGDOptimizer):
        def _get_updates(self, grads):
            return [-g / 2 for g in grads]

    params = [np.ones(3)]
    Halved(params).update_params(params, [np.ones(3)])
    assert params[0].tolist() == [0.5] * 3


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

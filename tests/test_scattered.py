"""Gradients that lie as NumPy's idioms leave them; scalars for 0-d parameters."""
from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from twin import Twin, everything

import optcore
from optcore.runtime import always_threaded
from reference import same_bits


def spread(values):
    """Every third element of an array of NaN along the last axis."""
    wide = np.full((*values.shape[:-1], 3 * values.shape[-1]), np.nan, values.dtype)
    wide[..., 1::3] = values
    return wide[..., 1::3]


def field(values):
    records = np.zeros(values.shape, [("other", values.dtype), ("grad", values.dtype)])
    records["grad"] = values
    return records["grad"]


def swapped(values):
    """As a product of transposed factors: the axes the other way round in memory."""
    return np.array(values.T, order="C").T


def sliced(values):
    """One gate's part of a wider gradient."""
    n = values.shape[-1]
    wide = np.full((*values.shape[:-1], 3 * n), 7, values.dtype)
    wide[..., n : 2 * n] = values
    return wide[..., n : 2 * n]


def memory(g):
    return (g if g.base is None else g.base).tobytes()


LAYOUTS = {
    "C": lambda v: np.array(v, order="C"), "F": lambda v: np.array(v, order="F"),
    "transposed": swapped, "spread": spread, "field": field, "sliced": sliced,
    "reversed": lambda v: np.array(v[::-1])[::-1],
    "reversed, last": lambda v: np.array(v[..., ::-1])[..., ::-1],
    "steps back": lambda v: spread(v[::-1])[::-1],
    "moved": lambda v: np.moveaxis(np.array(np.moveaxis(v, 0, -1), order="C"), -1, 0),
}
SHAPES = [(7,), (1, 5), (5, 1), (33, 65), (4, 3, 2, 5), (0, 3), (130, 130)]


def draw(rng, dtype, order):
    return [np.array(rng.standard_normal(shape), dtype, order=order) for shape in SHAPES]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, order, dtype, rng):
    """From every door, with a norm; the caller's arrays are zeroed, what lies between is not."""
    params = draw(rng, dtype, order)
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "max_norm": 1.0, "ema_decay": 0.5}
    values = [draw(rng, dtype, "C") for _ in range(3)]
    grads, more, bound = [[LAYOUTS[layout](v) for v in given] for given in values]
    between = [memory(g) for g in grads]
    opt = optcore.SGD(params, grads=bound, skip_nonfinite=True, **options)
    twin = Twin(opt)
    opt.step()
    twin.step(values[2])
    opt.step(grads)
    twin.step(values[0])
    assert all(map(same_bits, grads, values[0]))
    opt.step_replicas([grads, more], weights=[1, 2])
    twin.step_replicas(values[:2], [1, 2])
    with always_threaded():
        opt.step_replicas([grads, more], zero_grad=True)
    twin.step_replicas(values[:2])
    twin.check()
    assert opt.grad_norm == twin.norm
    assert not any(g.any() for g in grads + more)
    for g, old, v in zip(grads, between, values[0], strict=True):
        g[...] = v
        assert memory(g) == old
    grads[3][3, 3] = np.inf
    assert opt.step(grads, zero_grad=True) is False         # zeroed where it is skipped, too
    assert opt.nonfinite_params == [3]
    assert not any(g.any() for g in grads)
    twin.skipped += 1
    assert opt.step(zero_grad=True)
    twin.step(values[2])
    assert not any(g.any() for g in bound)
    twin.check()


def test_read_only_and_repeated(rng):
    """Broadcast gradients are read; they cannot be set to zero."""
    params = [rng.standard_normal((4, 6)) for _ in range(3)]
    frozen = rng.standard_normal((6, 4))
    frozen.flags.writeable = False
    row = rng.standard_normal(6)
    grads = [np.broadcast_to(2.0, (4, 6)), np.broadcast_to(row, (4, 6)), frozen.T]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0)
    twin = Twin(opt)
    for k in range(3):
        opt.step(grads)
        twin.step(grads)
        before = everything(opt)
        with pytest.raises(ValueError, match=r"grads\[0\] must be writeable"):
            opt.step(grads, zero_grad=True)
        with pytest.raises(ValueError, match=rf"grads\[{k}\] must be writeable"):
            opt.step([g if i == k else np.ones((4, 6)) for i, g in enumerate(grads)],
                     zero_grad=True)
        assert everything(opt) == before
    twin.check()


def test_gates_of_one_array(rng):
    """Parts of one array that interleave but share nothing may be zeroed; what overlaps may not."""
    params = [rng.standard_normal((4, 5)).astype(np.float32) for _ in range(3)]
    wide = rng.standard_normal((4, 15)).astype(np.float32)
    grads = [wide[:, 5 * k : 5 * k + 5] for k in range(3)]
    kept = [g.copy() for g in grads]
    for bound in (None, grads):
        opt = optcore.SGD(params, lr=0.1, grads=bound)
        twin = Twin(opt)
        opt.step(zero_grad=True) if bound else opt.step(grads, zero_grad=True)
        twin.step(kept)
        twin.check()
        assert not wide.any()
        for g, v in zip(grads, kept, strict=True):
            g[...] = v
    opt.zero_grad()
    assert not wide.any()


@pytest.mark.parametrize("of", ["params", "velocities"])
def test_overlap(of, rng):
    whole = rng.standard_normal((12, 12))
    x, other = whole[:4], rng.standard_normal((4, 12))
    params, own = (x, other) if of == "params" else (other, x)
    opt = optcore.SGD([params], lr=0.1, momentum=0.9, velocities=[own])
    before = everything(opt, whole)
    for g in (whole[::3], whole[3::-1], whole.T[:4], whole[0:8:2], whole[:, ::3].T,
              np.broadcast_to(whole[3], (4, 12))):
        for call in (lambda g=g: opt.step([g]), lambda g=g: opt.step_replicas([[0 * x], [g]])):
            for _ in range(2):
                with pytest.raises(ValueError, match=rf"must not share memory with {of}"):
                    call()
                assert everything(opt, whole) == before


def test_no_allocation_after_the_first_step(rng):
    """The buffer is kept, and serves gradients that lie otherwise, too."""
    params = [rng.standard_normal((200, 300)) for _ in range(2)]
    ways = [[f(p) for p in params] for f in (swapped, spread, LAYOUTS["reversed"])]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0, grads=ways[0])

    def step():
        for grads in ways:
            opt.step(grads)
            opt.step_replicas([grads, ways[0]], weights=[1, 2])
        opt.step()

    step()
    tracemalloc.start()
    try:
        for _ in range(3):
            step()
        assert tracemalloc.get_traced_memory()[1] < params[0].nbytes / 10
    finally:
        tracemalloc.stop()


def test_accumulate(rng):
    """Scattered gradients are added; what they are added into must lie as its parameter does."""
    x, g = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    bound = np.zeros((3, 4))
    opt = optcore.SGD(x, lr=0.1, grads=bound)
    for layout in LAYOUTS.values():
        expected = bound + g
        opt.accumulate(layout(g))
        assert same_bits(bound, expected)
    opt = optcore.SGD(x, lr=0.1, grads=swapped(g))
    with pytest.raises(ValueError, match=r"bind np.zeros_like\(p\)"):
        opt.accumulate(g)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scalars(dtype):
    """NumPy's are taken for 0-d parameters, as `d.sum()` gives them."""
    b, w = np.ones((), dtype), np.ones(2, dtype)
    opt = optcore.SGD({"b": b, "w": w}, lr=0.5, momentum=0.5)
    twin = Twin(opt)
    opt.step({"b": dtype(3), "w": w * 2})
    twin.step([np.array(3, dtype), np.full(2, 2, dtype)])
    opt.step_replicas([{"b": dtype(3), "w": None}, {"b": np.array(5, dtype), "w": None}])
    twin.step_replicas([[np.array(3, dtype), None], [np.array(5, dtype), None]])
    v = np.zeros((), dtype)
    optcore.momentum_step(b.copy(), dtype(3), v, lr=0.5, momentum=0.5)
    assert v == 3
    twin.check()
    other = np.float32 if dtype is np.float64 else np.float64
    before = everything(opt)
    for g, error in [(other(3), TypeError), (3.0, TypeError), (np.int64(3), TypeError),
                     (np.bool_(True), TypeError), (np.ones(1, dtype), ValueError)]:
        with pytest.raises(error, match=r"grads\[0\] \('b'\)"):
            opt.step({"b": g, "w": w * 2})
    with pytest.raises((TypeError, ValueError), match=r"grads\[0\] \('b'\)"):
        opt.step({"b": dtype(3), "w": w * 2}, zero_grad=True)
    with pytest.raises((TypeError, ValueError), match=r"grads\[1\] \('w'\)"):
        opt.step({"b": dtype(3), "w": dtype(3)})
    assert everything(opt) == before

"""Outer steps: towards the mean of replicas' parameters, and back into these."""
from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from test_precision import made
from twin import Twin, everything

import optcore
from optcore.runtime import always_threaded, simd, simd_levels_available
from reference import same_bits, type_name

SIZES = [0, 1, 255, (3, 5), 257, 1000, 9000]
HALVES = ["bfloat16", "float16"]


def made_as(rng, kind):
    return [rng.standard_normal(size) if kind == "float64"
            else made(rng.standard_normal(size), kind) for size in SIZES]


@contextlib.contextmanager
def on_some_machine(rng):
    """At one of the SIMD levels, by one thread or by three."""
    n_threads = int(rng.choice([1, 3]))
    optcore.set_num_threads(n_threads)
    try:
        with simd(rng.choice(simd_levels_available())), (
            always_threaded() if n_threads > 1 else contextlib.nullcontext()
        ):
            yield
    finally:
        optcore.set_num_threads(None)


def random_storage(rng, kind):
    """Options of parameters of a type: with noise or without."""
    options = {"seed": int(rng.integers(99)),
               "rounding": str(rng.choice(["nearest", "stochastic"]))}
    if kind in HALVES and rng.integers(2):
        options["master"] = None
    if kind != "float64" and rng.integers(2):
        options["velocity_dtype"] = "bfloat16"
    return options


def random_options(rng, kind):
    momentum = float(rng.choice([0, 0.5]))
    return {
        **random_storage(rng, kind),
        "lr": float(rng.choice([1.0, 0.1])),
        "momentum": momentum,
        "nesterov": bool(rng.integers(2)) and momentum > 0,
        "lr_in_velocity": bool(rng.integers(2)),
        "weight_decay": float(rng.choice([0, 0.01])),
        "clip_value": [None, 0.5][rng.integers(2)],
        "ema_decay": [None, 0.9][rng.integers(2)],
        "skip_nonfinite": bool(rng.integers(2)),
        "track_grad_norm": bool(rng.integers(2)),
    }


@pytest.mark.parametrize("kind", ["float32", "float64", *HALVES])
@pytest.mark.parametrize("n_replicas", [*range(1, 9), 10])
def test_follows_its_twin(kind, n_replicas, rng, cases, times):
    rng = np.random.default_rng(n_replicas)
    kinds = ["float64"] if kind == "float64" else ["float32", *HALVES]
    for _ in range(4 * times):
        params = made_as(rng, kind)
        opt = optcore.SGD(params, **random_options(rng, kind))
        twin = Twin(opt)
        with on_some_machine(rng):
            for _ in range(3):
                given = kinds[:1] if rng.integers(2) else kinds
                replicas = [made_as(rng, given[rng.integers(len(given))])
                            for _ in range(n_replicas)]
                weights = [None, rng.integers(1, 9, n_replicas)][rng.integers(2)]
                back = bool(rng.integers(2))
                if rng.integers(3) == 0:
                    bad = replicas[-1][5]
                    bad[7] = 0x7FC0 if type_name(bad) == "bfloat16" else np.nan
                before = [[p.copy() for p in replica] for replica in replicas]
                stepped = opt.outer_step(replicas, weights=weights, grad_scale=0.5, write_back=back)
                assert stepped is twin.outer_step(before, weights, 0.5)
                twin.check()
                for replica, old in zip(replicas, before, strict=True):
                    for i, (p, was) in enumerate(zip(replica, old, strict=True)):
                        new = was
                        if back and stepped:
                            shown = params[i]
                            new = shown if type_name(p) == type_name(shown) else None
                        cases(new is None or same_bits(p, new), (kind, i, back))


def test_write_back_is_rounded_once_to_another_type(rng):
    x = rng.standard_normal(1000).astype(np.float32)
    half = made(rng.standard_normal(1000), "bfloat16")
    optcore.SGD(x, lr=1.0).outer_step([half], write_back=True)
    assert same_bits(half, made(x, "bfloat16"))
    master = made(rng.standard_normal(1000), "bfloat16")
    opt, replica = optcore.SGD(master, lr=0.1), rng.standard_normal(1000).astype(np.float32)
    opt.outer_step([replica], write_back=True)
    assert same_bits(replica, opt.state_dict()["state"][0]["master"])


def test_averaging_is_a_step_of_one(rng):
    x = np.zeros(3, np.float32)
    a, b = (rng.integers(0, 9, 3).astype(np.float32) for _ in range(2))
    optcore.SGD(x, lr=1.0).outer_step([a, b], weights=[1, 3])
    assert same_bits(x, (a + 3 * b) / 4)


def test_replicas_may_lie_otherwise_and_be_read_only(rng):
    x = rng.standard_normal((40, 30)).astype(np.float32)
    y, replica = x.copy(), rng.standard_normal((30, 40)).astype(np.float32)
    fixed = replica.T.copy()
    fixed.flags.writeable = False
    optcore.SGD(x, lr=0.5).outer_step([replica.T], write_back=True)
    optcore.SGD(y, lr=0.5).outer_step([fixed])
    assert same_bits(x, y)
    assert same_bits(replica.T, x)


def test_replicas_that_lie_otherwise_may_not_overlap_where_they_are_written():
    memory, x = np.arange(48, dtype=np.float32), np.zeros((4, 3), np.float32)
    opt = optcore.SGD(x, lr=1.0)
    one, two = memory[:12].reshape(3, 4).T, memory[4:16].reshape(3, 4).T
    for replicas in ([one, two], [one, memory[4:16].reshape(4, 3)], [one, one[::-1]]):
        before = everything(opt, x, memory)
        with pytest.raises(ValueError, match=r"replica_params\[1\] must not share memory with "
                           r"replica_params\[0\] where gradients are written"):
            opt.outer_step(replicas, write_back=True)
        assert everything(opt, x, memory) == before
        opt.outer_step(replicas)
    woven = np.lib.stride_tricks.as_strided(memory, (2, 4, 3), (4, 24, 8))
    opt.outer_step(list(woven), write_back=True)        # between each other's elements
    assert all(same_bits(np.ascontiguousarray(replica), x) for replica in woven)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda opt, x, r: opt.outer_step(r), TypeError, "replica_params must be a list or tuple"),
    (lambda opt, x, r: opt.outer_step([]), ValueError, "at least one entry, got none"),
    (lambda opt, x, r: opt.outer_step([x]), ValueError,
     r"replica_params\[0\] must not share memory with params"),
    (lambda opt, x, r: opt.outer_step([r, r], write_back=True), ValueError,
     r"must not share memory with replica_params\[0\].* where gradients are written"),
    (lambda opt, x, r: opt.outer_step([r], write_back=1), TypeError, "write_back must be True or"),
    (lambda opt, x, r: opt.outer_step([r], weights=[0]), ValueError, "finite sum > 0"),
    (lambda opt, x, r: opt.outer_step([r[:2]]), ValueError, r"has shape \(2,\)"),
    (lambda opt, x, r: opt.outer_step([None]), ValueError, "at least one array, got None"),
])
def test_refusals(call, error, words):
    x, replica = np.ones(3, np.float32), np.zeros(3, np.float32)
    opt = optcore.SGD(x, lr=0.1, momentum=0.9)
    before = everything(opt, x, replica)
    with pytest.raises(error, match=words):
        call(opt, x, replica)
    assert everything(opt, x, replica) == before
    opt.outer_step([replica])


def test_a_plain_step_follows_an_outer_one(rng):
    x, replica, g = (rng.standard_normal(300).astype(np.float32) for _ in range(3))
    opt = optcore.SGD(x, lr=0.1)
    twin = Twin(opt)
    for _ in range(2):
        twin.outer_step([[replica.copy()]])
        opt.outer_step([replica], write_back=True)
        opt.step(g)
        twin.step([g])
        twin.check()
    assert not same_bits(replica, x)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts it")
def test_nothing_of_the_models_size_is_made(tmp_path):
    """Resident memory at its highest, in a process of its own, over all that a step touches."""
    script = tmp_path / "peak.py"
    script.write_text(textwrap.dedent("""
        import sys
        from pathlib import Path
        import numpy as np
        import optcore

        def resident(which):
            line, = (line for line in Path("/proc/self/status").read_text().splitlines()
                     if line.startswith(which))
            return int(line.split()[1]) * 1024

        def step():
            opt.outer_step(replicas, weights=[1, 2, 3], write_back=True)

        optcore.set_num_threads(2)
        replicas = [np.ones(1_000_000, np.float32) for _ in range(3)]
        x = np.ones(1_000_000, np.float32)
        small = [np.ones(20_000, np.float32) for _ in range(4)]
        optcore.SGD(small[3], lr=0.7, momentum=0.9).outer_step(small[:3], write_back=True)
        opt = optcore.SGD(x, lr=0.7, momentum=0.9, nesterov=True, max_norm=1.0, ema_decay=0.9)
        step()          # the velocity's pages
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        step()
        print(resident("VmHWM") - before)
    """))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1 << 20


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_tensors_are_stepped_in_their_memory(kind, rng):
    torch = pytest.importorskip("torch", reason="torch is missing")

    def tensor():
        return torch.from_numpy(rng.standard_normal(300)).to(getattr(torch, kind))

    x, replicas = tensor().to(torch.float32), [tensor() for _ in range(3)]
    y, copies = x.numpy().copy(), [made(r.float().numpy().copy(), kind) for r in replicas]
    places = [r.data_ptr() for r in replicas]
    a, b = (optcore.SGD(p, lr=0.7, momentum=0.9, nesterov=True) for p in (x, y))
    for _ in range(2):
        assert a.outer_step(replicas, weights=[1, 2, 3], write_back=True)
        assert b.outer_step(copies, weights=[1, 2, 3], write_back=True)
        assert same_bits(x.numpy(), y)
        for replica, copy, place in zip(replicas, copies, places, strict=True):
            assert replica.data_ptr() == place
            assert same_bits(made(replica.float().numpy(), kind), copy)
    with a.collecting() as mean:
        for replica in replicas:
            mean.add(replica)
    b.outer_step(copies)
    assert same_bits(x.numpy(), y)

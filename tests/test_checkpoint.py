"""Checkpoints: the same bits after a resume, and no way to load a wrong or half-written one."""
from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import optcore
from reference import RULES, same_bits

safetensors = pytest.importorskip("safetensors.numpy")

SHAPES = [(), (7,), (0,), (3, 5), (33, 4)]


def arrays(rng, dtype=np.float32):
    made = [np.array(rng.standard_normal(shape), dtype) for shape in SHAPES]
    return [*made, np.asfortranarray(rng.standard_normal((4, 6)).astype(dtype))]


def mixed(rng):
    return arrays(rng) + arrays(rng, np.float64)


def steps(opt, script):
    for grads in script:
        opt.step(grads)


def assert_same_optimizers(a, b):
    """State, options and averages, to the bit."""
    a, b = a._contents(include_params=True), b._contents(include_params=True)
    for one, other in zip(a.pop("state").values(), b.pop("state").values(), strict=True):
        for key in one.keys() | other.keys():
            assert (one[key] is None) == (other[key] is None)
            assert one[key] is None or same_bits(one[key], other[key])
    assert a == b


@pytest.mark.parametrize("include_params", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_resuming_gives_the_same_bits(rule, include_params, rng, tmp_path):
    """Two groups, names, float32 and float64, late first steps, every sweep option."""
    path = tmp_path / "run.safetensors"
    options = {
        "momentum": 0.9 if rule.has_momentum else 0.0,
        "dampening": 0.25 if rule.dampens else 0.0, "weight_decay": 0.1,
    }

    def groups(flat):
        half = len(flat) // 2
        return [
            {"params": {f"a{i}": p for i, p in enumerate(flat[:half])}, **options, "name": "lo"},
            {"params": {f"b{i}": p for i, p in enumerate(flat[half:])}, **options,
             "maximize": True, "initial_lr": np.float32(0.3)},
        ]

    params = mixed(rng)
    script = [{name: g for group in groups(mixed(rng)) for name, g in group["params"].items()}
              for _ in range(6)]
    for grads in script[:4]:
        grads["a1"] = None
    opt = rule.optimizer(
        groups(params), lr=0.1, max_norm=3.0, skip_nonfinite=True, ema_decay=0.9)
    steps(opt, script[:3])
    assert not opt.step({**script[0], "a0": np.full((), np.nan, np.float32)})
    opt.save(path, include_params=include_params)
    copies = mixed(rng) if include_params else [p.copy(order="K") for p in params]
    resumed = type(opt).load(path, [{"params": g["params"]} for g in groups(copies)])
    restored = rule.optimizer(
        groups([p.copy(order="K") for p in params]), lr=7.0, ema_decay=0.5, clip_value=9.0
    )
    restored.restore(path)
    assert (resumed.step_count, resumed.skipped) == (3, 1)
    for other in (resumed, restored):
        assert_same_optimizers(opt, other)
    for each in (opt, resumed, restored):
        steps(each, script[3:])
    for other in (resumed, restored):
        assert_same_optimizers(opt, other)


@pytest.mark.parametrize("kind", ["array", "list", "mapping"])
def test_loads_into_every_structure(kind, rng, tmp_path):
    flat = arrays(rng)
    made = {"array": lambda: flat[1].copy(), "list": lambda: [p.copy() for p in flat],
            "mapping": lambda: {f"p{i}": p.copy() for i, p in enumerate(flat)}}[kind]
    grads = copy.deepcopy(made())
    opt = optcore.SGD(made(), lr=0.1, momentum=0.9)
    opt.step(grads)
    opt.save(tmp_path / "c", include_params=True)
    other = optcore.SGD.load(tmp_path / "c", made(), grads=grads)
    opt.step(grads)
    other.step()
    assert_same_optimizers(opt, other)


def test_schedules_are_given_again(tmp_path):
    path = tmp_path / "c"

    def lr(step):
        return 0.1 / (1 + step)

    def decay(step):
        return 0.5

    x, g = np.ones(3, np.float32), np.ones(3, np.float32)
    opt = optcore.SGD(x, lr=lr, momentum=0.9, ema_decay=decay)
    opt.step(g)
    opt.save(path)
    y = x.copy()
    for missing in ({}, {"lr": lr}, {"ema_decay": decay}):
        with pytest.raises(ValueError, match="was saved with a callable"):
            optcore.SGD.load(path, y, **missing)
    resumed = optcore.SGD.load(path, y, lr=lr, ema_decay=decay)
    assert resumed.param_groups[0]["lr"] is lr
    assert resumed.ema_decay is decay
    grouped = optcore.SGD.load(path, [{"params": y.copy(), "lr": lr}], ema_decay=decay)
    for each, grads in ((opt, g), (resumed, g), (grouped, [g])):
        each.step(grads)
    assert_same_optimizers(opt, resumed)
    assert_same_optimizers(opt, grouped)
    with pytest.raises(optcore.CheckpointError, match="saved with a callable lr"):
        optcore.SGD(y, lr=0.1, momentum=0.9, ema_decay=0.5).restore(path)


def test_a_subclass_may_keep_more(tmp_path):
    class More(optcore.SGD):
        epoch = 7

        def state_dict(self):
            return {**super().state_dict(), "epoch": self.epoch}

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            self.epoch = state_dict["epoch"]

    opt = More(np.ones(3), lr=0.1)
    opt.save(tmp_path / "c")
    opt.epoch = 0
    opt.restore(tmp_path / "c")
    assert opt.epoch == 7


def test_an_option_that_changed_in_its_place_is_checked_before_it_is_saved(tmp_path):
    lr = np.array(0.5)
    opt = optcore.SGD(np.ones(3), lr=lr)
    opt.save(tmp_path / "c")
    lr[...] = -1
    for call in (opt.state_dict, lambda: opt.save(tmp_path / "c")):
        with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
            call()
    assert optcore.SGD.load(tmp_path / "c", np.ones(3)).param_groups[0]["lr"] == 0.5


def test_schedule_that_would_not_be_used_is_refused(tmp_path):
    x = np.ones(3, np.float32)
    optcore.SGD(x, lr=0.1).save(tmp_path / "c")
    for unused in ("lr", "ema_decay"):
        with pytest.raises(ValueError, match=f"{unused} must be left out"):
            optcore.SGD.load(tmp_path / "c", x, **{unused: lambda step: 0.5})


def test_restore_keeps_the_convention_it_was_built_with(tmp_path):
    x, g = np.ones(3), np.ones(3)
    opt = optcore.SGD(x, lr=0.5, momentum=0.5)
    opt.step(g)
    opt.save(tmp_path / "c")
    assert not optcore.SGD.load(tmp_path / "c", x.copy()).param_groups[0]["lr_in_velocity"]
    other = optcore.SGD(x.copy(), lr=0.1, momentum=0.5, lr_in_velocity=True)
    other.restore(tmp_path / "c")
    assert same_bits(other.state_dict()["state"][0]["velocity"], np.full(3, -0.5))


@pytest.mark.parametrize(("before", "after"), [("clip_value", "max_norm"),
                                               ("max_norm", "clip_value")])
def test_clipping_is_exchanged_by_a_restore(before, after, tmp_path):
    x = np.ones(3)
    optcore.SGD(x, lr=0.1, **{after: 2.0}).save(tmp_path / "c")
    opt = optcore.SGD(x.copy(), lr=0.1, **{before: 1.0})
    opt.restore(tmp_path / "c")
    clipping = {"max_norm": opt.max_norm, "clip_value": opt.param_groups[0]["clip_value"]}
    assert clipping == {before: None, after: 2.0}


# Refusals

def small(tmp_path):
    """Return a small checkpoint, an optimizer that is further on, and what it looked like."""
    path = tmp_path / "small"
    x, g = np.arange(3, dtype=np.float32), np.ones(3, np.float32)
    opt = optcore.SGD({"w": x}, lr=0.1, momentum=0.9, ema_decay=0.5)
    opt.step({"w": g})
    opt.save(path, include_params=True)
    saved = opt._contents(include_params=True)
    opt.step({"w": g})
    return path, opt, saved, opt._contents(include_params=True)


def equal(a, b):
    """Whether two contents are the same to the bit."""
    texts = [optcore.checkpoint.split(contents) for contents in (a, b)]
    return optcore.checkpoint.digest(*texts[0]) == optcore.checkpoint.digest(*texts[1])


def refused(opt, path, saved, before):
    """Whether a file was refused without a trace; a load of anything but `saved` fails."""
    try:
        opt.restore(path)
    except optcore.CheckpointError:
        assert equal(opt._contents(include_params=True), before)
        return True
    assert equal(opt._contents(include_params=True), saved), "a wrong load"
    opt.load_state_dict(before)
    return False


def test_every_truncation_is_refused(tmp_path, checkpoint_counts):
    path, opt, saved, before = small(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refused(opt, path, saved, before), f"{length} of {len(whole)} bytes"
    path.write_bytes(whole + b"\0")
    assert refused(opt, path, saved, before)
    checkpoint_counts["truncations refused"] = len(whole)
    path.write_bytes(whole)
    assert not refused(opt, path, saved, before)


def test_random_bit_flips_load_nothing_wrong(tmp_path, rng, checkpoint_counts):
    path, opt, saved, before = small(tmp_path)
    whole = path.read_bytes()
    n_refused = 0
    for bit in rng.integers(0, 8 * len(whole), 1000):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        n_refused += refused(opt, path, saved, before)
    checkpoint_counts["bit flips refused"] = n_refused
    checkpoint_counts["bit flips that changed nothing"] = 1000 - n_refused
    assert n_refused > 900


def foreign(path):
    """Yield what a path may hold that is no checkpoint, with words of the complaint."""
    def model(metadata):
        safetensors.save_file({"weight": np.ones(3, np.float32)}, path, metadata)

    yield lambda: path.write_bytes(b""), "not a whole safetensors file"
    yield lambda: path.write_text("epoch 3, loss 0.1\n" * 20), "not a whole safetensors file"
    yield lambda: path.write_bytes((2**40).to_bytes(8, "little") + b"{}"), "header too large"
    yield lambda: path.write_bytes((2**63 + 5).to_bytes(8, "little") + b"{}"), "header"
    yield path.mkdir, "is not a file"
    yield lambda: model(None), "no optcore checkpoint"
    yield lambda: model({"format": "pt"}), "no optcore checkpoint"
    yield lambda: model({"format": "optcore"}), "format version None"
    yield lambda: model({"format": "optcore", "format_version": "2"}), "format version '2'"
    yield lambda: model({"format": "optcore", "format_version": "1"}), "SHA-256"


def test_foreign_files_are_refused(tmp_path):
    _, opt, saved, before = small(tmp_path)
    path = tmp_path / "foreign"
    for make, words in foreign(path):
        make()
        with pytest.raises(optcore.CheckpointError, match=words):
            optcore.SGD.load(path, np.ones(3, np.float32))
        assert refused(opt, path, saved, before)
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError):
        opt.restore(path)


@pytest.mark.parametrize("state", [{"state": 3}, {"state": {"x": {}}}, [], None, {"state": {}}])
def test_nonsense_with_a_true_hash_is_refused(state, tmp_path):
    _, opt, saved, before = small(tmp_path)
    path = tmp_path / "forged"
    text = optcore.checkpoint.json.dumps(state)
    safetensors.save_file({}, path, {
        "format": "optcore", "format_version": "1", "optimizer": text,
        "sha256": optcore.checkpoint.digest(text, {}),
    })
    assert refused(opt, path, saved, before)
    with pytest.raises(optcore.CheckpointError):
        optcore.SGD.load(path, {"w": np.ones(3, np.float32)})


def test_checkpoint_of_another_model_is_refused(tmp_path):
    path, *_ = small(tmp_path)
    options = {"lr": 0.1, "momentum": 0.9, "ema_decay": 0.5}
    for params, words in [
        ({"w": np.ones(4, np.float32)}, "has shape"),
        ({"w": np.ones(3)}, "has dtype"),
        ({"v": np.ones(3, np.float32)}, "param_names"),
        ({"w": np.ones(3, np.float32), "b": np.ones(3, np.float32)}, r"\['params'\]"),
        ([{"params": np.ones(3, np.float32)}, {"params": np.ones(3)}], "groups"),
    ]:
        with pytest.raises(optcore.CheckpointError, match=words):
            optcore.SGD.load(path, copy.deepcopy(params))
        with pytest.raises(optcore.CheckpointError, match=words):
            optcore.SGD(copy.deepcopy(params), **options).restore(path)
    with pytest.raises(optcore.CheckpointError, match="build the optimizer with ema_decay"):
        optcore.SGD({"w": np.ones(3, np.float32)}, lr=0.1, momentum=0.9).restore(path)


def test_read_only_parameters_are_refused_before_anything_changes(tmp_path):
    path, opt, _, before = small(tmp_path)
    opt._whole_params[0].flags.writeable = False
    with pytest.raises(optcore.CheckpointError, match="its parameter is read-only"):
        opt.restore(path)
    assert equal(opt._contents(include_params=True), before)


# Writing

@pytest.mark.parametrize("failing", ["save_file", "fsync", "replace"])
def test_failed_save_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    path, opt, saved, _ = small(tmp_path)

    def fail(*args):
        raise OSError(28, "No space left on device")

    owner = {"save_file": safetensors, "fsync": os, "replace": os}[failing]
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, fail)
        with pytest.raises(OSError, match="No space left"):
            opt.save(path)
    assert os.listdir(tmp_path) == [path.name]
    opt.restore(path)
    assert equal(opt._contents(include_params=True), saved)


def test_names_that_json_cannot_hold_are_refused(tmp_path):
    opt = optcore.SGD({("layer", 1): np.ones(3)}, lr=0.1)
    with pytest.raises(TypeError, match="must be plain numbers and strings"):
        opt.save(tmp_path / "c")
    assert not os.listdir(tmp_path)


def test_missing_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    opt = optcore.SGD(np.ones(3), lr=0.1)
    for call in (opt.save, opt.restore):
        with pytest.raises(ImportError, match=r"pip install 'optcore\[checkpoint\]'"):
            call(tmp_path / "c")


KILLER = """
    import os, random, signal, sys, time
    import numpy as np
    import optcore

    path, n_kills = sys.argv[1], int(sys.argv[2])
    random.seed(20170425)
    N = 250_000     # large enough that a kill hits every part of a save

    def optimizer():
        return optcore.SGD(np.zeros(N, np.float32), lr=1.0, momentum=0.5)

    def child(opt, report):
        # every array is one number, so that a file of two saves would show
        while True:
            opt.step(np.ones(N, np.float32))
            opt.save(path, include_params=True)
            os.write(report, opt.step_count.to_bytes(8, "little"))

    opt = optimizer()
    opt.save(path, include_params=True)
    lost = wrong = 0
    for _ in range(n_kills):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            child(opt, writing)
        os.close(writing)
        told = os.read(reading, 8)      # the first save is done
        time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(reading, 8):
            told = more
        os.close(reading)
        seen, expected = optimizer(), optimizer()
        try:
            seen.restore(path)
        except (OSError, ValueError):
            lost += 1
            continue
        lost += seen.step_count < int.from_bytes(told, "little")
        if opt.step_count < seen.step_count:
            opt = optimizer()
            opt.restore(path)
        param = seen.param_groups[0]["params"][0]
        velocity = seen.state_dict()["state"][0]["velocity"]
        x, v = np.float32(0), np.float32(0)
        for _ in range(seen.step_count):
            v = np.float32(0.5) * v + np.float32(1)
            x = x - v
        wrong += not ((param == x).all() and (velocity == v).all())
    print(n_kills, lost, wrong, opt.step_count)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_saves_lose_nothing(tmp_path, checkpoint_counts):
    """Killed at random moments: the file holds the last save that returned, or a later one."""
    path = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), str(path), "200"],
        capture_output=True, text=True, timeout=120, check=False,
    )
    assert done.returncode == 0, done.stderr
    n_kills, lost, wrong, n_saves = map(int, done.stdout.split())
    checkpoint_counts["kills during saves"] = n_kills
    checkpoint_counts["lost checkpoints"] = lost
    checkpoint_counts["wrong loads"] = wrong
    assert (lost, wrong) == (0, 0)
    assert n_saves > n_kills

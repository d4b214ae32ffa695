"""Checkpoints: the same bits after a resume, and no way to load a wrong or half-written one."""
from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import hashlib
import itertools
import json
import os
import pickle
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import optcore
from optcore import checkpoint
from reference import BFLOAT16, rounded, same_bits, split, widened
from test_bits import by_rule

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
@by_rule
def test_resuming_gives_the_same_bits(rule, include_params, rng, tmp_path):
    """Two groups, names, float32 and float64, late first steps, every sweep option."""
    path = tmp_path / "run.safetensors"
    options = {
        "momentum": 0.9 if rule.has_momentum else 0.0,
        "dampening": 0.25 if rule.dampens else 0.0, "weight_decay": 0.1,
    }
    options = rule.known(options)

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


# Half types

def halved(arrays, name):
    return [np.array(rounded(a, name), order="F" if a.flags.fnc else "C") for a in arrays]


HALF_OPTIONS = [
    ("bfloat16", {}), ("bfloat16", {"master": "float32"}), ("float16", {}),
    ("bfloat16", {"master": None, "velocity_dtype": "bfloat16", "seed": 2**64 - 1}),
    ("float16", {"master": None, "rounding": "nearest"}),
    ("float32", {"velocity_dtype": BFLOAT16}),
]


@pytest.mark.parametrize("include_params", [False, True])
@pytest.mark.parametrize(("name", "options"), HALF_OPTIONS)
def test_half_types_resume_with_the_same_bits(name, options, include_params, rng, tmp_path):
    """Without ml_dtypes too; arrays in Fortran's order are saved in C's."""
    params = halved(arrays(rng), name)
    script = [halved(arrays(rng), each) for each in ["float32", "bfloat16", "float16", name]]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, ema_decay=0.5, **options)
    steps(opt, script[:2])
    opt.save(tmp_path / "c", include_params=include_params)
    others = halved(arrays(rng), name) if include_params else [p.copy(order="K") for p in params]
    resumed = optcore.SGD.load(tmp_path / "c", others)
    steps(opt, script[2:])
    steps(resumed, script[2:])
    assert_same_optimizers(opt, resumed)


def ties(name):
    """float32 numbers around those of a half type and between them."""
    low = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] if name == "bfloat16" else [
        0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF]
    bits = 0x3F800000 + np.arange(0, 0x200000, 0x8000)[:, None] + low
    return np.asfortranarray(bits.astype(np.uint32).view(np.float32))


KINDS = [("float32", "auto"), ("bfloat16", "split"), ("bfloat16", "float32"),
         ("float16", "float32")]


@pytest.mark.parametrize(("name", "master"), KINDS)
@pytest.mark.parametrize(("other_name", "other_master"), KINDS)
def test_masters_are_exchanged_exactly(name, master, other_name, other_master, tmp_path):
    """Every number of float32 goes on as it was, whatever its parameter shows."""
    exact = ties(other_name)
    opt = optcore.SGD({"w": rounded(np.zeros_like(exact), name)}, lr=1.0, maximize=True,
                      momentum=0.5, master=master)
    opt.step({"w": exact})
    opt.save(tmp_path / "c", include_params=True)
    x = np.array(rounded(np.ones_like(exact), other_name), order="F")
    shown = split(exact)[0] if other_master == "split" else rounded(exact, other_name)
    other = optcore.SGD.load(tmp_path / "c", {"w": x}, master=other_master)
    assert same_bits(x, shown)
    x.view(f"u{x.itemsize}")[...] = 0
    other.load_state_dict(opt._contents(include_params=True), by_name=True)
    assert same_bits(x, shown)
    for _ in range(2):
        for each in (opt, other):
            each.step({"w": np.full_like(exact, 2.0**-20)})
    one, two = (o._contents(include_params=True)["state"][0] for o in (opt, other))
    assert same_bits(one.get("master", one["param"]), two.get("master", two["param"]))


@pytest.mark.parametrize(("saved", "built"), [(None, "bfloat16"), ("bfloat16", None)])
def test_velocities_change_their_type(saved, built, rng):
    """To bfloat16 they are rounded to the nearest; and so are those of the other convention."""
    x, g = (rng.standard_normal((30, 4), np.float32) for _ in range(2))
    opt = optcore.SGD(x.copy(), lr=0.1, momentum=0.9, velocity_dtype=saved)
    opt.step(g)
    v = opt.state_dict()["state"][0]["velocity"]
    for right in (False, True):
        other = optcore.SGD(x.copy(order="F"), lr=0.5, momentum=0.9, velocity_dtype=built,
                            lr_in_velocity=right)
        other.load_state_dict(opt.state_dict())
        expected = widened(v) * np.float32(-0.1) if right else widened(v)
        assert same_bits(other.state_dict()["state"][0]["velocity"],
                         rounded(expected, built or "float32"))


def test_bfloat16_is_known_again_after_pickling():
    x = rounded(np.ones(3, np.float32), "bfloat16")
    opt = optcore.SGD(x, lr=0.1, momentum=0.9, velocity_dtype="bfloat16")
    opt.step(x.copy())
    for state in (pickle.loads(pickle.dumps(opt.state_dict())), copy.deepcopy(opt.state_dict())):
        other = optcore.SGD(pickle.loads(pickle.dumps(x)), lr=0.1, momentum=0.9,
                            velocity_dtype="bfloat16")
        other.load_state_dict(state)
        assert_same_optimizers(opt, other)
        other.step(pickle.loads(pickle.dumps(x))[::-1])


def test_files_of_earlier_versions_are_read(tmp_path):
    """As they were written: with the hash that they had, and without half types' options."""
    opt = optcore.SGD({"w": np.arange(3, dtype=np.float32)}, lr=0.1, momentum=0.9)
    opt.step({"w": np.ones(3, np.float32)})
    text, tensors = checkpoint.split(opt._contents(include_params=True))
    state = json.loads(text)
    state["version"] = 3
    del state["options"]["seed"]
    for key in ("master", "rounding", "velocity_dtype"):
        del state["param_groups"][0][key]
    text = json.dumps(state)
    found = hashlib.sha256(text.encode())
    for name, a in sorted(tensors.items()):
        found.update(f"\0{name}\0float32\0(3,)\0".encode() + a.tobytes())
    header = {"__metadata__": {"format": "optcore", "format_version": "1", "optimizer": text,
                               "sha256": found.hexdigest()}}
    for k, name in enumerate(tensors):
        header[name] = {"dtype": "F32", "shape": [3], "data_offsets": [12 * k, 12 * k + 12]}
    (tmp_path / "c").write_bytes(whole(header, b"".join(a.tobytes() for a in tensors.values())))
    for x in (np.zeros(3, np.float32), rounded(np.zeros(3, np.float32), "bfloat16")):
        other = optcore.SGD.load(tmp_path / "c", {"w": x})
        entry = other._contents(include_params=True)["state"][0]
        assert same_bits(entry.get("master", entry["param"]), opt.param_groups[0]["params"][0])
        assert (other.seed, other.step_count) == (0, 1)


@pytest.mark.parametrize(("name", "change", "words"), [
    ("bfloat16", {"master": np.ones(3)}, "'master'] has dtype float64; its parameter has bfloat16"),
    ("bfloat16", {"master": np.ones(3, np.float16)}, "'master'] must have dtype float32, got"),
    ("bfloat16", {"master": np.ones(4, np.float32)}, "'master'] has shape (4,)"),
    ("bfloat16", {"velocity": np.ones(3, np.uint16)}, "dtype uint16; its parameter has bfloat16: "
     "a.view(optcore.bfloat16) declares it"),
    ("bfloat16", {"ema": np.ones(3)}, "a.astype(np.float32) can be stepped with it"),
    ("float16", {"param": np.ones(3, np.float32), "master": None}, None),
    ("float16 alone", {"param": np.ones(3, np.float32)}, "has dtype float32; its parameter has "
     "float16 and no master, so that it would be rounded: build the optimizer with master='auto'"),
    ("bfloat16 alone", {"param": np.ones(3, np.float16)}, "has dtype float16; its parameter has "
     "bfloat16 and no master"),
])
def test_half_types_that_do_not_fit_are_refused(name, change, words):
    name, _, alone = name.partition(" ")
    x = rounded(np.zeros(3, np.float32), name)
    opt = optcore.SGD(x, lr=0.1, momentum=0.9, ema_decay=0.5, master=None if alone else "auto")
    opt.step(np.ones(3, np.float32))
    before = opt._contents(include_params=True)
    state = copy.deepcopy(before)
    state["state"][0].update(change)
    if words is None:
        opt.load_state_dict(state)
        assert same_bits(opt.state_dict()["state"][0]["master"], change["param"])
        return
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        opt.load_state_dict(state)
    for key, value in [("master", "half"), ("rounding", "up"), ("velocity_dtype", 8)]:
        state = copy.deepcopy(before)
        state["param_groups"][0][key] = value
        with pytest.raises((TypeError, ValueError), match=rf"\['{key}'\] must be .* {value!r}"):
            opt.load_state_dict(state)
    assert equal(opt._contents(include_params=True), before)


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
    """Whether two contents are the same to the bit, without a look at their hashes."""
    (text, arrays), (other, others) = (checkpoint.split(contents) for contents in (a, b))
    return text == other and arrays.keys() == others.keys() and all(
        same_bits(array, others[name]) for name, array in arrays.items())


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


def whole(header, data=b""):
    """Return the bytes of a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def foreign(path):
    """Yield what a path may hold that is no checkpoint, with words of the complaint."""
    def model(metadata):
        weight = {"weight": {"dtype": "I16", "shape": [3], "data_offsets": [0, 6]}}
        path.write_bytes(whole(metadata | weight, bytes(6)))

    def said(**metadata):
        return lambda: model({"__metadata__": metadata})

    yield lambda: path.write_bytes(b""), "not a whole safetensors file"
    yield lambda: path.write_text("epoch 3, loss 0.1\n" * 20), "not a whole safetensors file"
    yield lambda: path.write_bytes((2**40).to_bytes(8, "little") + b"{}"), "header too large"
    yield lambda: path.write_bytes((2**63 + 5).to_bytes(8, "little") + b"{}"), "header"
    yield path.mkdir, "is not a file"
    yield lambda: model({}), "no optcore checkpoint"
    yield said(format="pt"), "no optcore checkpoint"
    yield said(format="optcore"), "format version None"
    yield said(format="optcore", format_version="2"), "format version '2'"
    yield said(format="optcore", format_version="1"), "not a whole safetensors file: I16"


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


def forged(text):
    """Return a file of no tensors, whose hash is true."""
    return whole({"__metadata__": {
        "format": "optcore", "format_version": "1", "optimizer": text,
        "sha256": checkpoint.digest(text, {}),
    }})


@pytest.mark.parametrize("state", [{"state": 3}, {"state": {"x": {}}}, [], None, {"state": {}}])
def test_nonsense_with_a_true_hash_is_refused(state, tmp_path):
    _, opt, saved, before = small(tmp_path)
    path = tmp_path / "forged"
    path.write_bytes(forged(json.dumps(state)))
    assert refused(opt, path, saved, before)
    with pytest.raises(optcore.CheckpointError):
        optcore.SGD.load(path, {"w": np.ones(3, np.float32)})


def replaced(text, key, value):
    """Put another text in the place of a key's value, a number or a list of one."""
    changed, n = re.subn(rf'"{key}":(\["?\w*"?\]|[-\w.]+)', lambda _: f'"{key}":{value}', text)
    assert n == 1
    return changed


@pytest.mark.parametrize("depth", [100, 500, 900, 990, 1000, 100_000])
def test_deep_json_is_refused(depth, tmp_path):
    """At every depth: where the parser gives up, and where what shows the value would."""
    path, opt, saved, before = small(tmp_path)
    deep = "[" * depth + "]" * depth
    text, _ = checkpoint.split(opt.state_dict())
    for forgery in (
        forged(deep), forged('{"state":{},"param_groups":' + deep + "}"),
        *(forged(replaced(text, key, deep)) for key in ("param_names", "version", "lr")),
        whole(deep.encode()), whole(b'{"__metadata__":' + deep.encode() + b"}"),
    ):
        path.write_bytes(forgery)
        assert refused(opt, path, saved, before)
        with pytest.raises(optcore.CheckpointError):
            optcore.SGD.load(path, {"w": np.ones(3, np.float32)})


@pytest.mark.timeout(60)
def test_a_shape_that_would_be_multiplied_for_hours_is_refused(tmp_path):
    path, opt, saved, before = small(tmp_path)
    path.write_bytes(whole({
        "__metadata__": {"format": "optcore", "format_version": "1"},
        "w": {"dtype": "F32", "shape": [10**4000] * 1500, "data_offsets": [0, 0]},
    }))
    assert refused(opt, path, saved, before)


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, "9" * 5000, "1e999", "NaN", "[]"])
def test_numbers_that_are_none_are_refused(number, tmp_path):
    opt = optcore.SGD({"w": np.ones(3)}, lr=0.25)
    before = opt._contents(include_params=True)
    text, _ = checkpoint.split(opt.state_dict())
    path = tmp_path / "c"
    path.write_bytes(forged(text))
    opt.restore(path)
    for key in ("lr", "step_count", "version", "weight_decay"):
        path.write_bytes(forged(replaced(text, key, number)))
        assert refused(opt, path, None, before)


def test_keys_that_come_twice_are_refused(tmp_path):
    path, opt, saved, before = small(tmp_path)
    path.write_bytes(forged('{"state":{},"state":{},"param_groups":[]}'))
    with pytest.raises(optcore.CheckpointError, match="a key comes twice"):
        opt.restore(path)
    assert refused(opt, path, saved, before)


ENTRY = {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}


@pytest.mark.parametrize("entry", [
    None, [], 3, {}, {"dtype": "F32"}, {"dtype": "F32", "shape": [3]},
    *({**ENTRY, "dtype": dtype} for dtype in ("F64", "U99", "", None, ["F32"])),
    *({**ENTRY, "shape": shape} for shape in (
        [4], [], [-3], [-1, -3], [3.5], [3.0], ["3"], [None], 3, None, "", {}, [0, 2**70],
        [2**62, 3], [[3]], [1] * 64 + [3], [3] + [1] * 64, [1 << 4000] * 64,
    )),
    *({**ENTRY, "data_offsets": place} for place in (
        [11, 23], [0, 12], [13, 25], [24, 36], [12, 2**70], [24, 12], [-12, 0], [12], [12, 24, 36],
        [], None, 12, ["12", "24"],
    )),
    {**ENTRY, "shape": [1 << 60], "data_offsets": [12, 12 + (4 << 60)]},    # more than there is
    # nothing of anything: no bytes, yet no array
    *({**ENTRY, "shape": shape, "data_offsets": [12, 12]} for shape in (
        [0, 2**70], [0, 2**62], [0, -1], [0] * 65,
    )),
])
def test_tensors_that_are_described_wrongly_are_refused(entry, tmp_path):
    """The header is not in the hash. Nothing but a refusal, and no room for what is not there."""
    path, opt, saved, before = small(tmp_path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    name = next(name for name in header if header[name].get("data_offsets") == [12, 24])
    assert header[name] == ENTRY
    path.write_bytes(whole(header, data))
    assert not refused(opt, path, saved, before)
    path.write_bytes(whole({**header, name: entry}, data))
    assert refused(opt, path, saved, before)
    path.write_bytes(whole({**header, "more": entry}, data))
    assert refused(opt, path, saved, before)


def test_headers_that_are_none_are_refused(tmp_path):
    path, opt, saved, before = small(tmp_path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    text, data = content[8:end], content[end:]
    metadata = json.loads(text)["__metadata__"]
    for header in (
        b"", b"[]", b"null", b"3", b'"optcore"', b"\xff\xfe", text[:-30], text.rstrip()[:-1],
        text + text, text.decode().encode("utf-16"), b'{"__metadata__":[]}',
        b'{"__metadata__":null}', text.replace(b'"__metadata__":', b'"__metadata__":{},"w":', 1),
        b'{"__metadata__":{},' + text[1:], text.replace(b"ema.0", b"param.0"),
        {"__metadata__": {**metadata, "optimizer": 3}}, {"__metadata__": {**metadata, "sha256": 3}},
    ):
        path.write_bytes(whole(header, data))
        assert refused(opt, path, saved, before), header
    for n_bytes, n_there in [(end - 8, end - 9), (end, 3), (checkpoint.MOST_HEADER_BYTES + 1,) * 2]:
        path.write_bytes(n_bytes.to_bytes(8, "little") + text)
        os.truncate(path, 8 + n_there)
        with pytest.raises(optcore.CheckpointError, match="header too large or cut off"):
            opt.restore(path)


def test_name_dtype_and_shape_are_in_the_hash(tmp_path):
    x = np.arange(6, dtype=np.int32).view(np.float32)
    variants = [
        ("text", {"a": x}), ("other", {"a": x}), ("text", {"b": x}), ("text", {"a": x[::-1]}),
        ("text", {"a": x.reshape(2, 3)}), ("text", {"a": x.reshape(3, 2)}),
        ("text", {"a": x.reshape(1, 6)}), ("text", {"a": x.view(np.int32)}),
        ("text", {"a": x.view(np.float64)}), ("text", {"a": x, "b": x[:0]}),
        ("text", {"a": x[:3], "b": x[3:]}), ("text", {"a": x[:2], "b": x[2:]}), ("text", {}),
    ]
    hashes = [checkpoint.digest(*variant) for variant in variants]
    assert len(set(hashes)) == len(variants)
    fortran = np.asfortranarray(x.reshape(2, 3))
    assert checkpoint.digest("text", {"a": fortran}) == hashes[4]
    assert checkpoint.digest("text", {"a": x.astype(">f4")}) == hashes[0]

    path, opt, *_ = small(tmp_path)
    content = path.read_bytes()
    for old, new in [(b'"shape":[3]', b'"shape":[1,3]'), (b"ema.0", b"velocity.0")]:
        end = 8 + int.from_bytes(content[:8], "little")
        header = content[8:end]
        place = header.rindex(b'"__metadata__"'), header.index(b'"sha256"')
        assert place[0] < place[1]
        tensors = header[place[1]:].replace(new, b"\0").replace(old, new).replace(b"\0", old)
        assert tensors != header[place[1]:]
        path.write_bytes(whole(header[: place[1]] + tensors, content[end:]))
        with pytest.raises(optcore.CheckpointError, match="SHA-256"):
            opt.restore(path)


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


# The format

def test_safetensors_reads_what_is_written(rng, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    opt = optcore.SGD(mixed(rng), lr=0.1, momentum=0.9, ema_decay=0.5)
    opt.step(mixed(rng))
    opt.save(tmp_path / "c", include_params=True)
    state = opt._contents(include_params=True)["state"]
    with safetensors.safe_open(tmp_path / "c", framework="numpy") as file:
        assert file.metadata()["format"] == "optcore"
        names = set(file.keys())
        for i, key in itertools.product(state, ("param", "velocity", "ema")):
            assert same_bits(file.get_tensor(f"{key}.{i}"), state[i][key])
            names.remove(f"{key}.{i}")
    assert not names
    content = (tmp_path / "c").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    del header["__metadata__"]
    for entry in header.values():       # aligned, as whoever maps the file likes it
        assert (end + entry["data_offsets"][0]) % (int(entry["dtype"][1:]) // 8) == 0


def test_what_safetensors_writes_is_read(rng, tmp_path):
    """Files of its own writer, as earlier versions of optcore used it."""
    safetensors = pytest.importorskip("safetensors.numpy")
    opt = optcore.SGD(mixed(rng), lr=0.1, momentum=0.9, ema_decay=0.5)
    opt.step(mixed(rng))
    text, tensors = checkpoint.split(opt._contents(include_params=True))
    safetensors.save_file(
        {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()},
        tmp_path / "c",
        {"format": "optcore", "format_version": "1", "optimizer": text,
         "sha256": checkpoint.digest(text, tensors)},
    )
    assert_same_optimizers(opt, optcore.SGD.load(tmp_path / "c", mixed(rng)))


def test_arrays_are_not_copied_to_be_written(rng, tmp_path):
    """Nor twice to be read; those in Fortran's order one at a time."""
    params = [rng.standard_normal((300, 400)), np.asfortranarray(rng.standard_normal((300, 400)))]
    opt = optcore.SGD(params, lr=0.1, momentum=0.9, ema_decay=0.5)
    opt.step([p.copy(order="K") for p in params])
    state = opt._contents(include_params=True)
    size = params[0].nbytes
    tracemalloc.start()
    try:
        checkpoint.write(tmp_path / "c", state)
        _, to_write = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        read = checkpoint.read(tmp_path / "c")
        _, to_read = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert to_write < 1.25 * size
    assert to_read < 6.25 * size
    assert same_bits(read["state"][1]["param"], params[1])


def test_safetensors_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path, opt, saved, _ = small(tmp_path)
    opt.restore(path)
    assert equal(opt._contents(include_params=True), saved)


def test_a_header_that_no_reader_takes_is_not_written(tmp_path, monkeypatch):
    path, opt, saved, _ = small(tmp_path)
    monkeypatch.setattr(checkpoint, "MOST_HEADER_BYTES", 500)
    with pytest.raises(OSError, match=r"The header has \d+ bytes, of 500 allowed") as raised:
        opt.save(path, include_params=True)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [path.name]
    opt.restore(path)
    assert equal(opt._contents(include_params=True), saved)


# Names and options

class Path8(os.PathLike):
    """A path that is bytes."""

    def __init__(self, path):
        self.path = os.fsencode(path)

    def __fspath__(self):
        return self.path


@pytest.mark.parametrize("kind", [str, os.fsencode, Path, Path8, os.path.relpath])
def test_paths_of_every_kind(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, opt, *_ = small(tmp_path)
    path.unlink()
    given = kind(path)
    opt.save(given)
    opt.save(given, include_params=True)
    assert os.listdir(tmp_path) == [path.name]
    opt.restore(given)
    loaded = optcore.SGD.load(given, {"w": np.ones(3, np.float32)})
    assert_same_optimizers(opt, loaded)
    path.write_text("damaged")
    with pytest.raises(optcore.CheckpointError, match=f"^{kind(path) if kind is str else ''}"):
        opt.restore(given)


@pytest.mark.parametrize("path", [0, 1, True, None, 1.5, bytearray(b"c"), ["c"]])
def test_what_is_no_path_is_refused(path, tmp_path):
    """A number would be a file descriptor, perhaps somebody's."""
    _, opt, *_ = small(tmp_path)
    for call in (opt.save, opt.restore, lambda path: optcore.SGD.load(path, np.ones(3))):
        with pytest.raises(TypeError, match=r"path must be a str, bytes or os\.PathLike, got "):
            call(path)
    assert os.listdir(tmp_path) == ["small"]


@pytest.mark.parametrize("character", ["x", "ü", "漢"])
def test_the_longest_name(character, tmp_path):
    path, opt, *_ = small(tmp_path)
    path.unlink()
    most = os.pathconf(tmp_path, "PC_NAME_MAX") if hasattr(os, "pathconf") else 200
    longest = tmp_path / (character * (most // len(os.fsencode(character))))
    opt.save(longest, include_params=True)
    opt.save(longest, include_params=True)
    assert os.listdir(tmp_path) == [longest.name]
    opt.restore(longest)


@pytest.mark.parametrize("number", [np.int64, np.int8, np.uint16, np.float32, np.float64, np.bool_])
def test_numbers_of_numpy_are_names(number, tmp_path):
    x = [np.arange(3.0), np.arange(4.0)]
    names = [number(0), number(0.1 if issubclass(number, np.floating) else 5)]
    opt = optcore.SGD(dict(zip(names, x, strict=True)), lr=0.1, momentum=0.9)
    opt.step({name: np.ones_like(a) for name, a in zip(names, x, strict=True)})
    opt.save(tmp_path / "c", include_params=True)
    group = checkpoint.read(tmp_path / "c")["param_groups"][0]
    assert group["param_names"] == names
    assert {type(name) for name in group["param_names"]} <= {bool, int, float}
    for given in (names, group["param_names"]):
        fresh = dict(zip(given, map(np.zeros_like, x), strict=True))
        assert_same_optimizers(opt, optcore.SGD.load(tmp_path / "c", fresh))


def circular():
    made = []
    made.append(made)
    return made


def deep(depth):
    made = []
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize("value", [
    ("layer", 1), {1: "one"}, {np.int64(1): "one"}, b"bytes", np.bytes_(b"bytes"), 1j,
    np.complex64(1), np.longdouble(0.5), np.datetime64("2017-04-25"), np.ones(2), float("nan"),
    np.float32("nan"), {1, 2}, object(), circular(), deep(100_000),
], ids=lambda value: type(value).__name__)
def test_what_json_cannot_hold_is_refused(value, tmp_path):
    path, opt, *_ = small(tmp_path)
    before = path.read_bytes()
    for key, put in [("param_names", [value]), ("note", value), ("note", [[value]])]:
        state = opt.state_dict()
        state["param_groups"][0][key] = put
        with pytest.raises(TypeError, match="must be plain numbers and strings") as raised:
            checkpoint.write(path, state)
        assert str(raised.value).startswith(f"param_groups[0]['{key}'] must be")
        assert len(str(raised.value)) < 500
        with pytest.raises(TypeError, match=r"^the state must be plain"):
            checkpoint.write(path, {**opt.state_dict(), "more": put})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_names_that_json_cannot_hold_are_refused(tmp_path):
    opt = optcore.SGD({("layer", 1): np.ones(3)}, lr=0.1)
    with pytest.raises(TypeError, match=r"'param_names'\] must be .* got \[\('layer', 1\)\]"):
        opt.save(tmp_path / "c")
    assert not os.listdir(tmp_path)


# Saves that fail

def assert_fails(number, opt, path):
    """The system's error, with its class, its number and the name that was given."""
    with pytest.raises(OSError, match=r"^\[Errno ") as raised:
        opt.save(path)
    error = raised.value
    assert (error.errno, error.filename, error.filename2) == (number, os.fsdecode(path), None)
    assert type(error) is type(OSError(number, ""))


def assert_kept(path, opt, saved):
    """The old file is there, and nothing else."""
    assert os.listdir(path.parent) == [path.name]
    opt.restore(path)
    assert equal(opt._contents(include_params=True), saved)


@contextlib.contextmanager
def unprivileged():
    """Let permissions be checked for root too, whom they would not stop."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("needs another user than root")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)       # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()                      # effective, permitted, inheritable; again
    assert libc.capget(header, sets) == 0
    without = (ctypes.c_uint32 * 6)(*sets)
    without[0] = without[3] = 0
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, sets) == 0


needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX's permissions")


@pytest.mark.parametrize("name", [
    ("none/c", errno.ENOENT), ("small/c", errno.ENOTDIR), ("small/", errno.ENOTDIR),
    ("none/", errno.EISDIR), (".", errno.EISDIR), ("..", errno.EISDIR), ("", errno.EISDIR),
    ("x" * 256, errno.ENAMETOOLONG), ("none/../c", errno.ENOENT),
], ids=lambda case: case[0][:10])
def test_names_that_cannot_be_saved_to(name, tmp_path):
    path, opt, saved, _ = small(tmp_path)
    name, number = name
    assert_fails(number, opt, f"{tmp_path}/{name}")
    assert_fails(number, opt, os.fsencode(f"{tmp_path}/{name}"))
    assert_kept(path, opt, saved)


def test_the_empty_name(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    _, opt, *_ = small(tmp_path)
    assert_fails(errno.ENOENT, opt, "")
    assert sorted(os.listdir(tmp_path)) == ["here", "small"]
    assert not os.listdir(tmp_path / "here")


def test_a_file_that_grows_too_large(tmp_path):
    resource = pytest.importorskip("resource")
    path, opt, saved, _ = small(tmp_path)
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, most))
    try:
        assert_fails(errno.EFBIG, opt, path)
        assert_fails(errno.EFBIG, opt, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert_kept(path, opt, saved)


FULL = """
    import os, sys
    import numpy as np
    import optcore

    for n in (10, 1000, 20_000, 100_000):
        opt = optcore.SGD(np.ones(n, np.float32), lr=0.1, momentum=0.9)
        opt.step(np.ones(n, np.float32))
        try:
            opt.save("full/c")
        except OSError as error:
            print(n, error.errno, error.filename, os.listdir("full"))
        else:
            print(n, "saved")
            os.unlink("full/c")
"""


def test_a_full_disk(tmp_path):
    """A real one, of 64 KiB, that only a child sees."""
    (tmp_path / "full").mkdir()
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=64k tmpfs full"
    try:
        if subprocess.run([*inside, mount], cwd=tmp_path, capture_output=True).returncode != 0:
            pytest.skip("needs to mount a file system of its own")
    except FileNotFoundError:
        pytest.skip("needs unshare")
    done = subprocess.run(
        [*inside, f'{mount} && exec "$@"', "sh", sys.executable, "-c", textwrap.dedent(FULL)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )
    assert done.stdout.splitlines() == [
        "10 saved", "1000 saved", f"20000 {errno.ENOSPC} full/c []",
        f"100000 {errno.ENOSPC} full/c []",
    ], done.stderr


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails(name, tmp_path, monkeypatch):
    """Errors that a disk gives only when it is broken, as the kernel would raise them."""
    path, opt, saved, _ = small(tmp_path)

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO), *args[:1], None, *args[1:])

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        assert_fails(errno.EIO, opt, path)
        assert_fails(errno.EIO, opt, tmp_path / "new")
    assert_kept(path, opt, saved)


@needs_posix
def test_no_permission(tmp_path):
    path, opt, _, before = small(tmp_path)
    folder = path.parent
    with unprivileged():
        folder.chmod(0o555)
        try:
            assert_fails(errno.EACCES, opt, path)
            assert_fails(errno.EACCES, opt, folder / "new")
        finally:
            folder.chmod(0o755)
        path.chmod(0o444)       # a file that is protected is not replaced either
        assert_fails(errno.EACCES, opt, path)
        path.chmod(0o200)
        for call in (opt.restore, lambda path: optcore.SGD.load(path, np.ones(3))):
            with pytest.raises(PermissionError) as raised:
                call(path)
            assert (raised.value.errno, raised.value.filename) == (errno.EACCES, str(path))
        assert equal(opt._contents(include_params=True), before)
        opt.save(path, include_params=True)
        assert stat.S_IMODE(path.stat().st_mode) == 0o200
        path.chmod(0o600)
    assert_kept(path, opt, before)


def test_no_file_to_read(tmp_path):
    _, opt, *_ = small(tmp_path)
    for name, number in [("none", errno.ENOENT), ("small/c", errno.ENOTDIR), ("", errno.ENOENT)]:
        missing = f"{tmp_path}/{name}" if name else name
        for call in (opt.restore, lambda path: optcore.SGD.load(path, np.ones(3))):
            with pytest.raises(OSError, match=r"^\[Errno ") as raised:
                call(missing)
            assert (raised.value.errno, raised.value.filename) == (number, missing)
            assert type(raised.value) is type(OSError(number, ""))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs /proc")
def test_a_disk_that_fails_while_it_is_read(tmp_path):
    """A regular file that opens and cannot be read."""
    _, opt, _, before = small(tmp_path)
    with pytest.raises(OSError, match=r"^\[Errno ") as raised:
        opt.restore("/proc/self/mem")
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, "/proc/self/mem")
    assert equal(opt._contents(include_params=True), before)


SHORT_OF_MEMORY = """
    import resource, sys
    import numpy as np
    import optcore

    N = 1 << 19     # each array of 2 MiB
    path = sys.argv[1]
    ones, twos = np.ones(N, np.float32), np.full(N, 2, np.float32)

    def optimizer():
        return optcore.SGD(twos.copy(), lr=0.5, momentum=0.5, ema_decay=0.5)

    def contents(opt):
        state = opt._contents(include_params=True)
        return [(a is None, b"" if a is None else a.tobytes()) for a in (
            state["state"][0][key] for key in ("param", "velocity", "ema")
        )], state["step_count"]

    def size():
        return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

    calls = {
        "build": lambda: optcore.SGD(twos, lr=0.5, ema_decay=0.5),
        "restore": lambda: opt.restore(path),
        "load": lambda: optcore.SGD.load(path, params),
        "save": lambda: opt.save(path, include_params=True),
    }
    opt = optimizer()
    before = contents(opt)
    opt.step(ones)
    opt.save(path, include_params=True)
    outcomes = {name: set() for name in calls}
    for name, call in calls.items():
        for kib in (0, 8, 64, *range(256, 10_000, 1024), 24_000):
            opt, params = optimizer(), twos.copy()
            resource.setrlimit(resource.RLIMIT_AS, (size() + 1024 * kib, -1))
            try:
                call()
                outcomes[name].add("done")
            except MemoryError:
                resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
                outcomes[name].add("refused")
                assert contents(opt) == before
                assert (params == 2).all()
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert all(len(found) == 2 for found in outcomes.values()), outcomes
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_too_little_memory(tmp_path):
    """Wherever it runs out it is MemoryError, the process goes on, and nothing has changed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHORT_OF_MEMORY), str(tmp_path / "c")],
        capture_output=True, text=True, timeout=120, check=False,
        # glibc would keep what was freed before, and have enough of it
        env={**os.environ, "OPTCORE_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
             "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["c"]


@pytest.fixture
def interruptible():
    """Let SIGINT raise KeyboardInterrupt, also where a shell started this in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["open", "fsync", "replace"])
def test_an_interrupted_save(name, late, tmp_path, monkeypatch):
    """Ctrl-C before or after each call: the old file or the new one, and nothing beside it."""
    path, opt, saved, _ = small(tmp_path)
    own = getattr(os, name)
    in_place = False

    def interrupted(*args, **more):
        nonlocal in_place
        if late:
            done = own(*args, **more)
        in_place = in_place or (late and name == "replace")
        signal.raise_signal(signal.SIGINT)
        return done if late else own(*args, **more)

    new = opt._contents(include_params=True)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                opt.save(path, include_params=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert_kept(path, opt, new if in_place else saved)


# What is saved to

@needs_posix
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
def test_modes(umask, tmp_path, monkeypatch):
    """A new file's is the umask's, a replaced one's stays; nobody may read it meanwhile either."""
    path, opt, *_ = small(tmp_path)
    created = []
    own = os.open

    def spy(name, flags, mode=0o777, **more):
        descriptor = own(name, flags, mode, **more)
        if flags & os.O_CREAT:
            created.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", spy)
    before = os.umask(umask)
    try:
        opt.save(tmp_path / "new")
        assert created == [0o666 & ~umask]
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask
        for mode in (0o600, 0o640, 0o644, 0o664, 0o666, 0o606, 0o755):
            path.chmod(mode)
            for _ in range(2):
                opt.save(path)
                assert stat.S_IMODE(path.stat().st_mode) == mode
                assert created.pop() & ~mode == 0
    finally:
        os.umask(before)


@needs_posix
def test_owners(tmp_path):
    """Kept where one may give files away, else the saver's own; the mode stays in any case."""
    path, opt, *_ = small(tmp_path)
    if os.geteuid() != 0:
        pytest.skip("needs root")
    os.chown(path, 4321, 1234)
    path.chmod(0o666)
    opt.save(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (4321, 1234, 0o666)
    with unprivileged():
        opt.save(path)
    found = path.stat()
    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())
    assert stat.S_IMODE(found.st_mode) == 0o666


@needs_posix
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("links", [
    ["{}/store/run"], ["../store/run"], ["other", "../store/run"], ["../store/more", "run"],
    ["more/../../store/run"], ["folder/run"],
], ids=str)
def test_links_are_followed(links, there, tmp_path):
    """The file they lead to is replaced or made, beside itself; they stay as they are."""
    for name in ("links", "store", "links/more"):
        (tmp_path / name).mkdir()
    (tmp_path / "links/folder").symlink_to("../store")
    link = made = tmp_path / "links/latest"
    placed = []
    for to in links:
        made.symlink_to(to.format(tmp_path))
        placed.append((made, os.readlink(made)))
        made = made.parent / to if to != links[-1] else made
    target = tmp_path / "store/run"
    _, opt, *_ = small(tmp_path)
    if there:
        target.write_text("old")
        target.chmod(0o604)
    before = sorted({*os.listdir(tmp_path / "store"), "run"})
    with unprivileged():
        (tmp_path / "links").chmod(0o555)       # no room for a file beside the link
        try:
            opt.save(link, include_params=True)
            opt.save(os.fsencode(link), include_params=True)
        finally:
            (tmp_path / "links").chmod(0o755)
    assert all(os.readlink(made) == to for made, to in placed)
    assert not target.is_symlink()
    assert not there or stat.S_IMODE(target.stat().st_mode) == 0o604
    assert sorted(os.listdir(tmp_path / "store")) == before
    for path in (link, target):
        opt.restore(path)


@needs_posix
def test_links_that_lead_nowhere(tmp_path):
    _, opt, *_ = small(tmp_path)
    for name, to, number in [
        ("a", "b", errno.ELOOP), ("b", "a", errno.ELOOP), ("c", "c", errno.ELOOP),
        ("d", "none/d", errno.ENOENT), ("e", "none/", errno.EISDIR), ("f", ".", errno.EISDIR),
        ("g", "small/", errno.ENOTDIR),
    ]:
        (tmp_path / name).symlink_to(to)
        before = sorted(os.listdir(tmp_path))
        if name != "a":
            assert_fails(number, opt, tmp_path / name)
        assert sorted(os.listdir(tmp_path)) == before
        assert os.readlink(tmp_path / name) == to
    assert_fails(errno.ELOOP, opt, tmp_path / "a")


def test_a_link_to_another_file_system(tmp_path):
    """A rename would not get there."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        except OSError:
            pytest.skip("needs /dev/shm")
        if os.stat(folder).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("needs two file systems")
        path, opt, *_ = small(tmp_path)
        path.unlink()
        path.symlink_to(f"{folder}/run")
        opt.save(path)
        opt.save(path)
        assert path.is_symlink()
        assert os.listdir(folder) == ["run"]
        opt.restore(f"{folder}/run")


def make_socket(path):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(str(path))


def make_device(path):
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))      # as /dev/null
    except (OSError, AttributeError):
        pytest.skip("may not make device nodes")


def make_link(path):
    os.mkfifo(path.parent / "pipe")
    path.symlink_to("pipe")


@needs_posix
@pytest.mark.timeout(20)        # who opens a pipe waits for the other end
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, make_socket, make_device, make_link])
def test_what_is_no_file_is_neither_replaced_nor_read(make, tmp_path, monkeypatch):
    _, opt, saved, before = small(tmp_path)
    monkeypatch.chdir(tmp_path)     # the name of a socket is short
    path = Path("special")
    make(path)
    for _ in range(2):
        found, names = os.lstat(path), sorted(os.listdir())
        assert_fails(errno.EISDIR if make is os.mkdir else errno.EINVAL, opt, path)
        assert sorted(os.listdir()) == names
        assert os.lstat(path)[:9] == found[:9]
        assert refused(opt, path, saved, before)
        with pytest.raises(optcore.CheckpointError, match="special is not a file"):
            optcore.SGD.load(path, np.ones(3))


# On the disk, and at the same time

@needs_posix
@pytest.mark.parametrize("kind", ["new", "old", "relative", "link"])
def test_the_order_of_a_save(kind, tmp_path, monkeypatch):
    """The whole file is synced, renamed, and then the folder synced that it lies in."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path, opt, *_ = small(folder)
    given = path
    if kind == "new":
        path.unlink()
    if kind == "relative":
        monkeypatch.chdir(folder)
        given = path.name
    if kind == "link":
        given = tmp_path / "link"
        given.symlink_to("folder/small")
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        found = os.fstat(descriptor)
        calls.append(("synced", found.st_ino, 0 if stat.S_ISDIR(found.st_mode) else found.st_size))
        fsync(descriptor)

    def spy_replace(old, new):
        calls.append(("renamed", os.stat(old).st_ino, os.path.abspath(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    opt.save(given)
    found = path.stat()
    assert calls == [
        ("synced", found.st_ino, found.st_size), ("renamed", found.st_ino, str(path)),
        ("synced", folder.stat().st_ino, 0),
    ]


@needs_posix
@pytest.mark.parametrize("why", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_synced(why, tmp_path, monkeypatch):
    """The new file is in place, and that is no failure."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path, opt, _, now = small(folder)
    asked = []
    fsync = os.fsync

    def refuse(descriptor):     # as some network file systems
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            asked.append(descriptor)
            raise OSError(why, os.strerror(why))
        fsync(descriptor)

    if why == errno.EACCES:     # truly: files may be made, but not listed
        with unprivileged():
            folder.chmod(0o333)
            try:
                opt.save(path, include_params=True)
            finally:
                folder.chmod(0o755)
    else:
        monkeypatch.setattr(os, "fsync", refuse)
        opt.save(path, include_params=True)
        assert len(asked) == 1
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(asked[0])      # nothing is left open
    assert_kept(path, opt, now)


def test_two_saves_at_once(tmp_path, monkeypatch):
    """One that begins and ends while another is under way: both files are whole in their turn."""
    path, slow, *_ = small(tmp_path)
    fast = optcore.SGD({"w": np.ones(5000)}, lr=0.1, momentum=0.9)
    fsync = os.fsync
    between = []

    def meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        fast.save(path, include_params=True)
        between.append(optcore.SGD.load(path, {"w": np.zeros(5000)}))
        fsync(descriptor)

    now = slow._contents(include_params=True)
    monkeypatch.setattr(os, "fsync", meanwhile)
    slow.save(path, include_params=True)
    assert_same_optimizers(between[0], fast)
    assert_kept(path, slow, now)


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
        # at any moment of the save after a few: as long as one takes here, however fast that is
        begin = time.perf_counter()
        n_done = random.randint(1, 3)
        for _ in range(n_done):
            told = os.read(reading, 8)
        time.sleep(random.uniform(0, (time.perf_counter() - begin) / n_done))
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
        capture_output=True, text=True, timeout=280, check=False,
    )
    assert done.returncode == 0, done.stderr
    n_kills, lost, wrong, n_saves = map(int, done.stdout.split())
    checkpoint_counts["kills during saves"] = n_kills
    checkpoint_counts["lost checkpoints"] = lost
    checkpoint_counts["wrong loads"] = wrong
    assert (lost, wrong) == (0, 0)
    assert n_saves > n_kills

"""atheris on the checkpoint reader: whatever a file holds, only the documented errors come.

    python tests/fuzz_checkpoint.py [--seconds 300]

An input is a whole file, or the text of one that is signed here: no mutation would come by its
SHA-256, and what lies behind it would never be tried. It is read, and an optimizer restored from
it: CheckpointError, OSError or MemoryError may be raised, and nothing has changed then; what is
taken must be steppable. It needs ``pip install atheris``, which is for CPython on Linux and macOS.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

try:
    import atheris
except ImportError:
    raise SystemExit("fuzz_checkpoint.py needs atheris: pip install atheris") from None

with atheris.instrument_imports(include=["optcore.checkpoint", "optcore._state"]):
    import optcore
    from optcore import checkpoint
    from optcore._state import NEW_SINCE, STATE_VERSION

REFUSALS = (optcore.CheckpointError, OSError, MemoryError)
SIGNED, WHOLE = b"s", b"w"          # how an input begins; then the place of its optimizer
SHAPES = {"w": (3, 2), "b": (2,), "e": (0,), "s": ()}


def falling(count):
    return 0.5 / (1 + count)


def params(dtype, view=None):
    return {name: np.ones(shape, dtype).view(view or dtype) for name, shape in SHAPES.items()}


BUILD = [
    lambda: optcore.SGD(params(np.float32), lr=0.1, momentum=0.9),
    lambda: optcore.SGD([{"params": [np.ones(4)]}, {"params": [np.ones((2, 2), order="F")],
                                                    "lr": falling}],
                        lr=0.1, momentum=0.9, nesterov=True, ema_decay=0.5, max_norm=1.0),
    lambda: optcore.SGD(params(np.float64), lr=falling, momentum=0.9, lr_in_velocity=True,
                        ema_decay=falling, skip_nonfinite=True),
    lambda: optcore.SGD(np.ones(300), lr=0.1, weight_decay=0.1, clip_value=1.0),
    lambda: optcore.SGD(params(np.uint16, optcore.bfloat16), lr=0.1, momentum=0.9,
                        velocity_dtype="bfloat16", seed=7),
    lambda: optcore.SGD([{"params": params(np.float16)},
                         {"params": {"x": np.ones(4, np.uint16).view(optcore.bfloat16)},
                          "master": "float32"}],
                        lr=0.1, momentum=0.9, nesterov=True, ema_decay=0.5),
    lambda: optcore.SGD(params(np.float16), lr=0.1, master=None, rounding="nearest"),
    lambda: optcore.SGD(params(np.float32), lr=0.1, momentum=0.9, lr_in_velocity=True,
                        velocity_dtype="bfloat16"),
]
assert ord("0") % len(BUILD) == 0       # so that an input's digit is its optimizer's place


def stepped(build):
    opt = build()
    for _ in range(2):
        grads = [np.full_like(p, 0.25, np.float64 if p.dtype == np.float64 else np.float32)
                 for group in opt.param_groups for p in group["params"]]
        opt.step(opt._structured(grads))
    return opt


def contents(opt):
    """All that a restore may change, to be compared."""
    text, tensors = checkpoint.split(opt._contents(True))
    return text, {name: array.tobytes() for name, array in tensors.items()}, opt.grad_norm


def older(state, version):
    """A state as an earlier version saved it."""
    groups = []
    for group in state["param_groups"]:
        gone = [name for name, since in NEW_SINCE.items() if version < since]
        gone += ["schedules"] if version == 1 else []
        groups.append({key: value for key, value in group.items() if key not in gone})
    return {**state, "version": version, "param_groups": groups}


def seeds():
    """Valid inputs: files of all optimizers and versions, and their texts."""
    for k, build in enumerate(BUILD):
        opt = stepped(build)
        place = bytes([ord("0") + k])
        for include_params in (False, True):
            state = opt._contents(include_params)
            text, tensors = checkpoint.split(state)
            yield SIGNED + place + text.encode()
            yield WHOLE + place + signed(text, tensors)
        for version in range(1, STATE_VERSION):
            text, tensors = checkpoint.split(older(opt._contents(False), version))
            yield SIGNED + place + text.encode()
            yield WHOLE + place + signed(text, tensors)


def signed(text, tensors):
    """A file of this text and these tensors, with the SHA-256 that they have."""
    metadata = {
        "format": checkpoint.FORMAT, "format_version": checkpoint.FORMAT_VERSION,
        "optimizer": text, "sha256": checkpoint.digest(text, tensors),
    }
    return checkpoint._header(metadata, tensors) + b"".join(
        bytes(checkpoint._as_bytes(array)) for array in tensors.values())


class Reader:
    def __init__(self, path):
        self.path = path
        self.opts = [stepped(build) for build in BUILD]
        self.tensors = [checkpoint.split(opt._contents(True))[1] for opt in self.opts]
        self.before = [contents(opt) for opt in self.opts]

    def __call__(self, data):
        if len(data) < 2:
            return
        k = data[1] % len(BUILD)
        content = data[2:]
        if data[:1] == SIGNED:
            try:
                content = signed(content.decode(), self.tensors[k])
            except UnicodeDecodeError:
                return
        Path(self.path).write_bytes(content)
        opt = self.opts[k]
        try:
            state = checkpoint.read(self.path)
        except REFUSALS:
            state = None
        try:
            opt.restore(self.path, by_name=data[1] & 64 != 0)
        except REFUSALS:
            assert contents(opt) == self.before[k], "a refused restore has changed something"
            return
        assert state is not None, "restore() took what read() refuses"
        opt.state_dict()
        opt.step(opt._structured([np.zeros_like(p) for group in opt.param_groups
                                  for p in group["params"]]))
        self.opts[k] = stepped(BUILD[k])


def words():
    """Words for mutations to put in, as libFuzzer reads them."""
    text = checkpoint.split(stepped(BUILD[1])._contents(True))[0]
    found = {json.dumps(key) for key in json.loads(text)}
    for part in (*json.loads(text)["param_groups"], *json.loads(text)["state"].values()):
        found |= {json.dumps(key) for key in part}
    found |= {"__metadata__", "data_offsets", "dtype", "shape", "F32", "F64", "F16", "BF16", "null",
              "true", "NaN", "Infinity", "-1", "1e999", "[[[[", "{}", "split", "float32"}
    return "".join('"' + word.replace('"', '\\"') + '"\n' for word in sorted(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=300)
    asked = parser.parse_args()
    folder = Path(__file__).resolve().parents[1] / "build" / "fuzz_checkpoint"
    corpus = folder / "corpus"      # which the next run begins with
    corpus.mkdir(parents=True, exist_ok=True)
    for k, seed in enumerate(seeds()):
        (corpus / f"seed{k}").write_bytes(seed)
    (folder / "words").write_text(words())
    os.chdir(folder)                # where libFuzzer leaves an input that fails
    atheris.Setup([
        sys.argv[0], str(corpus), f"-max_total_time={asked.seconds}", f"-dict={folder / 'words'}",
        "-max_len=8192", "-timeout=20", "-rss_limit_mb=4096", "-print_final_stats=1",
    ], Reader(str(folder / "state")))
    atheris.Fuzz()


if __name__ == "__main__":
    main()

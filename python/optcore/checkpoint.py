"""An optimizer's state in one safetensors file, written whole or not at all.

The tensors are ``velocity.<i>`` (or what a rule's states are called), ``ema.<i>`` and, where
asked for, ``param.<i>``; everything else is one JSON text in the file's metadata, beside a
SHA-256 of that text and all tensors.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "optcore"
FORMAT_VERSION = "1"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or of another optimizer."""


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "checkpoints need the package safetensors: pip install 'optcore[checkpoint]'"
        ) from error
    return safetensors


def digest(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256, in hexadecimal, of a text and named arrays."""
    total = hashlib.sha256(text.encode())
    for name, array in sorted(tensors.items()):
        total.update(f"\0{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        total.update(_little_endian(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _little_endian(array: np.ndarray) -> np.ndarray:
    """Return an array as the file holds it; safetensors writes memory without asking its order."""
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def split(state: Mapping[str, Any]) -> tuple[str, dict[str, np.ndarray]]:
    """Return a state as a text with names in the place of arrays, and the arrays by name.

    Raises
    ------
    TypeError
        For what JSON does not give back as it was, such as names that are tuples.
    """
    tensors = {}
    entries = {}
    for i, entry in state["state"].items():
        entries[str(i)] = described = dict(entry)
        for key, value in entry.items():
            if isinstance(value, np.ndarray):
                described[key] = f"{key}.{i}"
                tensors[described[key]] = value
    described = {**state, "state": entries}
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    if json.loads(text) != described:
        raise TypeError(
            "names and options must be plain numbers and strings to be saved, "
            f"got {state['param_groups']!r}"
        )
    return text, tensors


def _joined(text: str, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the state that `split` took apart."""
    state: dict[str, Any] = json.loads(text)
    state["state"] = {
        int(i): {
            key: tensors[value] if isinstance(value, str) else value
            for key, value in entry.items()
        }
        for i, entry in state["state"].items()
    }
    return state


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state to `path`; whoever is killed meanwhile leaves the old file or the new one.

    Raises
    ------
    ImportError
        Where safetensors is missing.
    OSError, TypeError
        Where the file cannot be written, or the state cannot be put in one. The old file stays.
    """
    safetensors = _safetensors()
    text, tensors = split(state)
    tensors = {name: _little_endian(array) for name, array in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "optimizer": text,
        "sha256": digest(text, tensors),
    }
    path = Path(path)
    # In the same folder, since a rename is atomic within a file system only; of a name of its
    # own, since others may be saving there too.
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        safetensors.numpy.save_file(tensors, temporary, metadata)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if hasattr(os, "O_DIRECTORY"):  # the name lies in the folder, which has to be synced as well
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the state that `write` wrote.

    Raises
    ------
    CheckpointError
        For a file that is not a checkpoint, or not as it was written.
    ImportError
        Where safetensors is missing.
    OSError
        Where there is no file, or none that may be read.
    """
    safetensors = _safetensors()
    if not Path(path).is_file() and Path(path).exists():
        raise CheckpointError(f"{path} is not a file")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is a safetensors file, but no optcore checkpoint")
            if metadata.get("format_version") != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path} has format version {metadata.get('format_version')!r}; this "
                    f"optcore reads {FORMAT_VERSION!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    except (TypeError, AttributeError) as error:  # a damaged dtype that NumPy does not have
        raise CheckpointError(f"{path} is damaged: {error}") from error
    text = metadata.get("optimizer", "")
    if metadata.get("sha256") != digest(text, tensors):
        raise CheckpointError(f"{path} is damaged: its content does not have the SHA-256 it names")
    with refusing(path):
        return _joined(text, tensors)


@contextlib.contextmanager
def refusing(path: str | os.PathLike[str]) -> Any:
    """Turn a refusal of what a checkpoint holds into a `CheckpointError` that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} does not fit: {reason}") from error

"""An optimizer's state in one safetensors file, written whole or not at all.

The tensors are ``velocity.<i>`` (or what a rule's states are called), ``ema.<i>`` and, where
asked for, ``param.<i>``; everything else is one JSON text in the file's metadata, beside a
SHA-256 of that text and all tensors.

The format (https://github.com/huggingface/safetensors#format) is read and written here, since the
library of that name ends the process where memory runs out while reading, or where a mapped file
cannot be read, tells no errno, and writes every file with mode 0600.
"""
from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import Any, BinaryIO

import numpy as np

from optcore.arrays import bfloat16, is_bfloat16

FORMAT = "optcore"
FORMAT_VERSION = "1"

MOST_HEADER_BYTES = 100_000_000     # safetensors' own limit: no reader takes more
# Of bfloat16 the bits are read
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
}
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

FilePath = str | bytes | os.PathLike[Any]


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or of another optimizer."""


def _type_name(array: np.ndarray) -> str:
    """Return the name of an array's type, whatever its byte order."""
    return "bfloat16" if is_bfloat16(array) else array.dtype.name


def digest(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256, in hexadecimal, of a text and named arrays."""
    total = hashlib.sha256(text.encode())
    for name, array in sorted(tensors.items()):
        total.update(f"\0{name}\0{_type_name(array)}\0{array.shape}\0".encode())
        total.update(_as_bytes(array))
    return total.hexdigest()


def _as_bytes(array: np.ndarray) -> memoryview:
    """Return an array's bytes as a file holds them; a copy only of what lies otherwise."""
    bits = array.view(np.uint16) if is_bfloat16(array) else array
    whole = np.asarray(bits, dtype=bits.dtype.newbyteorder("<"), order="C")
    return whole.reshape(-1).view(np.uint8).data


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
    for g, group in enumerate(state["param_groups"]):
        for key, value in group.items():    # once alone, for an error that says which it is
            _as_json(value, f"param_groups[{g}][{key!r}]")
    return _as_json({**state, "state": entries}, "the state"), tensors


def _as_json(value: Any, what: str) -> str:
    """Return the text that JSON gives back as `value`; NumPy's numbers become Python's."""
    def number(numpys: Any) -> Any:
        if isinstance(numpys, (np.number, np.bool_)):
            return numpys.item()
        raise TypeError(f"{type(numpys).__name__} has no form in JSON")

    refusal = None
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=number)
        if json.loads(text) == value:
            return text
    except (RecursionError, TypeError, ValueError) as error:
        refusal = error
    raise TypeError(
        f"{what} must be plain numbers and strings to be saved, got {reprlib.repr(value)}"
    ) from refusal


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, whose keys may come but once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key comes twice")
    return made


def _joined(text: str, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the state that `split` took apart."""
    state: dict[str, Any] = json.loads(text, object_pairs_hook=_unique)
    state["state"] = {
        int(i): {
            key: tensors[value] if isinstance(value, str) else value
            for key, value in entry.items()
        }
        for i, entry in state["state"].items()
    }
    return state


def as_text(path: FilePath) -> str:
    """Return a path as a text.

    Raises
    ------
    TypeError
        For what is no path.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):     # an int would be a file descriptor
        raise TypeError(f"path must be a str, bytes or os.PathLike, got {type(path).__name__}")
    return os.fsdecode(path)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Let errors of the system name the file that the user knows."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error


def _target(path: str) -> tuple[str, os.stat_result | None]:
    """Return where a save to `path` goes, links followed, and what lies there.

    Raises
    ------
    OSError
        Unless that is a regular file that may be written, or nothing.
    """
    old = None
    with contextlib.suppress(FileNotFoundError):    # perhaps a link to a file still to come
        old = os.stat(path)
    if old is not None:
        if stat.S_ISDIR(old.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(old.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", path)
        effective = os.access in os.supports_effective_ids
        if not os.access(path, os.W_OK, effective_ids=effective):   # a rename asks the folder alone
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    target = path
    while os.path.islink(target):
        target = os.path.join(os.path.dirname(target), os.readlink(target))
    if not os.path.basename(target):
        number = errno.EISDIR if target else errno.ENOENT
        raise OSError(number, os.strerror(number), path)
    return target, old


def _create(path: str, old: os.stat_result | None) -> BinaryIO:
    """Create a file as `open` does, or with the mode, and where possible the owner, of an old one.

    It has no permission, at any time, that the old one had not.
    """
    mode = 0o666 if old is None else stat.S_IMODE(old.st_mode) & 0o777
    file = open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
    if old is not None and hasattr(os, "fchown"):
        for owner in ((-1, old.st_gid), (old.st_uid, -1)):
            with contextlib.suppress(OSError):      # who may not give files away
                os.fchown(file.fileno(), *owner)
        with contextlib.suppress(OSError):          # file systems that keep no modes
            os.fchmod(file.fileno(), mode)
    return file


def _sync_folder(folder: str) -> None:
    """Sync the names in a folder to the disk, as far as its file system and permissions go."""
    if hasattr(os, "O_DIRECTORY"):
        # The new file is in place: an error now would tell of a failure that was none.
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _header(metadata: dict[str, str], tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return what comes before the tensors in a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        entries[name] = {
            "dtype": CODES[_type_name(array)], "shape": array.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)     # aligns what follows
    if len(text) > MOST_HEADER_BYTES:
        raise OSError(
            errno.EFBIG, f"The header has {len(text)} bytes, of {MOST_HEADER_BYTES} allowed"
        )
    return len(text).to_bytes(8, "little") + text


def write(path: FilePath, state: Mapping[str, Any]) -> None:
    """Write a state to `path`; whoever is killed meanwhile leaves the old file or the new one.

    Links are followed, and a file that is replaced keeps its mode and, where possible, its owner.

    Raises
    ------
    OSError
        With errno and filename, where the file cannot be written or `path` is no regular file.
        The old file stays.
    TypeError
        For a state that cannot be put in a file, and for a `path` that is none.
    MemoryError
        Where the texts of names and options have no room; arrays need none, if in C order.
    """
    path = as_text(path)
    target, old = _target(path)
    text, tensors = split(state)
    # wider types first, so that each tensor is aligned
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "optimizer": text,
        "sha256": digest(text, tensors),
    }
    # In the same folder, since a rename is atomic within a file system only; of a name of its
    # own, since others may be saving there too; a short one, since theirs may be the longest.
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".optcore-{os.urandom(8).hex()}.tmp")
    with _naming(path):
        try:
            header = _header(metadata, tensors)
            with _create(temporary, old) as file:
                file.write(header)
                for array in tensors.values():
                    file.write(_as_bytes(array))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    _sync_folder(folder or os.curdir)


def _read_header(file: BufferedReader) -> tuple[dict[str, str], dict[str, Any], int]:
    """Return a safetensors file's metadata, its tensors' descriptions, and the bytes they take."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    n_bytes = size - 8 - length
    if length > MOST_HEADER_BYTES or n_bytes < 0:
        raise ValueError(f"header too large or cut off: {length} bytes, of {size} in the file")
    entries: dict[str, Any] = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    metadata: dict[str, str] = entries.pop("__metadata__", {})
    return metadata, entries, n_bytes


def _read_tensors(
    file: BufferedReader, entries: Mapping[str, Any], n_bytes: int
) -> dict[str, np.ndarray]:
    """Read tensors that are described truly: end to end, and just what the file has room for."""
    tensors = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, place = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        size = math.prod(shape[:64])        # NumPy has no more dimensions
        begin, end = end, end + size * dtype.itemsize
        if place != [begin, end] or end > n_bytes:
            raise ValueError(f"{name!r} lies at {place!r} of {n_bytes}, not at {[begin, end]}")
        array = np.empty(shape, dtype)
        file.readinto(array.reshape(-1).view(np.uint8).data)    # the hash sees what is not read
        array = array.astype(dtype.newbyteorder("="), copy=False)
        tensors[name] = array.view(bfloat16) if entry["dtype"] == "BF16" else array
    if end != n_bytes:
        raise ValueError(f"tensors take {end} bytes, of {n_bytes} in the file")
    return tensors


def read(path: FilePath) -> dict[str, Any]:
    """Read the state that `write` wrote.

    Raises
    ------
    CheckpointError
        For a file that is not a checkpoint, or not as it was written, and for what is no file.
    OSError
        With errno and filename, where there is nothing, or nothing that may be read.
    TypeError
        For a `path` that is none.
    MemoryError
        Where there is no room for what the file holds.
    """
    path = as_text(path)
    if not stat.S_ISREG(os.stat(path).st_mode):     # opening a pipe would wait for a writer
        raise CheckpointError(f"{path} is not a file")
    broken = "is not a whole safetensors file"
    with _naming(path), open(path, "rb") as file:
        with refusing(path, broken):
            metadata, entries, n_bytes = _read_header(file)
            written_by, version = metadata.get("format"), metadata.get("format_version")
        if written_by != FORMAT:
            raise CheckpointError(f"{path} is a safetensors file, but no optcore checkpoint")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version!r}; this optcore reads {FORMAT_VERSION!r}"
            )
        with refusing(path, broken):
            tensors = _read_tensors(file, entries, n_bytes)
            text = metadata.get("optimizer", "")
            found = digest(text, tensors)
    if metadata.get("sha256") != found:
        raise CheckpointError(f"{path} is damaged: its content does not have the SHA-256 it names")
    with refusing(path):
        return _joined(text, tensors)


@contextlib.contextmanager
def refusing(path: FilePath, complaint: str = "does not fit") -> Iterator[None]:
    """Turn a refusal of what a checkpoint holds into a `CheckpointError` that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise CheckpointError(f"{os.fsdecode(path)} {complaint}: {reason}") from error

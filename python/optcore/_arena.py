"""Memory the optimizer owns: one zeroed arena for many arrays."""
from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

LINE = 64
HUGE_PAGE = 2 << 20


def _zeroed(n_bytes: int) -> tuple[np.ndarray, int]:
    """Return zeroed bytes and the offset of their first usable, well-aligned one."""
    if n_bytes >= HUGE_PAGE and hasattr(mmap, "MAP_PRIVATE"):
        # Private: a forked child must not share its parent's velocity.
        try:
            memory = mmap.mmap(
                -1, n_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except OSError as error:        # no file is at fault, whatever mmap raises
            raise MemoryError(
                f"there is no room for {n_bytes} bytes of the optimizer's own: {error.strerror}"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        data = np.frombuffer(memory, dtype=np.uint8)
        return data, -data.ctypes.data % HUGE_PAGE
    data = np.zeros(n_bytes + LINE, dtype=np.uint8)
    return data, -data.ctypes.data % LINE


def allocate_like(
    params: Sequence[np.ndarray], dtypes: Sequence[Any] | None = None
) -> list[np.ndarray]:
    """Return zeros in each parameter's shape and order, of its dtype or another, in one arena.

    Each array begins as far past a cache line as its parameter does, so that the loop that
    peels to the parameter's boundary reaches its own there too; one of another width on a line.
    """
    params = [np.asarray(param) for param in params]    # a subclass may tell tales of its size
    types = [param.dtype if dtypes is None else np.dtype(dtypes[i])
             for i, param in enumerate(params)]
    starts = []
    end = 0
    for param, dtype in zip(params, types, strict=True):
        past = param.ctypes.data % LINE if dtype.itemsize == param.itemsize else 0
        starts.append(end + past)
        end = -(-(starts[-1] + param.size * dtype.itemsize) // LINE) * LINE
    data, base = _zeroed(end)
    return [
        np.ndarray(
            param.shape,
            dtype,
            buffer=data,
            offset=base + start,
            order="C" if param.flags.c_contiguous else "F",
        )
        for param, dtype, start in zip(params, types, starts, strict=True)
    ]

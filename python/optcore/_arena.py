"""Memory the optimizer owns: one zeroed arena for many arrays."""
from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

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


def allocate_like(params: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return zeros in the shape, dtype and order of each parameter, in one arena.

    Each array begins as far past a cache line as its parameter does, so that the loop that
    peels to the parameter's boundary reaches its own there too.
    """
    params = [np.asarray(param) for param in params]    # a subclass may tell tales of its size
    starts = []
    end = 0
    for param in params:
        starts.append(end + param.ctypes.data % LINE)
        end = -(-(starts[-1] + param.nbytes) // LINE) * LINE
    data, base = _zeroed(end)
    return [
        np.ndarray(
            param.shape,
            param.dtype,
            buffer=data,
            offset=base + start,
            order="C" if param.flags.c_contiguous else "F",
        )
        for param, start in zip(params, starts, strict=True)
    ]

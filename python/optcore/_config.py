"""What this build and this process are."""
from __future__ import annotations

from pathlib import Path

from optcore.runtime import config


def get_include() -> str:
    """Return the folder of ``optcore.h``, for the ``include_dirs`` of an extension module.

    Code in C, C++ or Cython that calls the kernels needs it to compile, and nothing to link.

    Examples
    --------
    >>> import os, optcore
    >>> os.listdir(optcore.get_include())
    ['optcore.h']
    """
    return str(Path(__file__).parent / "include")


def show_config(mode: str = "stdout") -> dict[str, object] | None:
    """Print version, compiler, flags, SIMD levels built, available and used, and threads.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default "stdout"
        As in `numpy.show_config`: print, or return a dictionary.

    Raises
    ------
    ValueError
        For any other mode.
    """
    if mode == "dicts":
        return config()
    if mode != "stdout":
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    for key, value in config().items():
        print(f"{key + ':':16}{value}")
    return None

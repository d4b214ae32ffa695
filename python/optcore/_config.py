"""What this build and this process are."""
from __future__ import annotations

from optcore.runtime import config


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

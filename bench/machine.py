"""What a report says of the machine and the software, and no more."""
from __future__ import annotations

import os
import platform
import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from optcore.runtime import config

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def describe() -> dict[str, Any]:
    """Return CPU, cores, caches, versions and date, as a report prints them."""
    core = config()
    return {
        "CPU": _cpu(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "optcore": f"{core['optcore']} ({core['compiler']}, {core['simd used']})",
        "load before": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "date": date.today().isoformat(),
    }


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> float:
    """Return the bytes that nobody uses; infinity where the system does not say."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return float("inf")
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, flags=re.MULTILINE))
    name = found.get("model name", platform.machine())
    if "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


def _caches() -> str:
    found = []
    for index in sorted(CACHES.glob("index*")):
        kind = (index / "type").read_text().strip()
        if kind != "Instruction":
            found.append(f"L{(index / 'level').read_text().strip()} "
                         f"{(index / 'size').read_text().strip()}B")
    return ", ".join(found) or "unknown"

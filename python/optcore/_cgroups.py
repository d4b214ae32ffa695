"""Where Linux keeps the CPU quotas that this process runs under."""
from __future__ import annotations

from pathlib import Path


def cpu_quota_files(proc: str = "/proc/self") -> list[tuple[Path, Path | None]]:
    """Return the files of the process's CPU cgroup and of those around it, innermost first.

    Parameters
    ----------
    proc : str, default "/proc/self"
        The folder that says which groups the process is in (``cgroup``), and where they are
        mounted (``mountinfo``).

    Returns
    -------
    list of (quota, period)
        Version 2 keeps both in one file, ``cpu.max``, and has None for the period; version 1 has
        ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``. Empty where there are no cgroups.
    """
    try:
        groups = Path(proc, "cgroup").read_text().splitlines()
        mounts = Path(proc, "mountinfo").read_text().splitlines()
    except OSError:     # not Linux, or no /proc here
        return []
    paths = {}          # by file system
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            paths["cgroup"] = path
    files: list[tuple[Path, Path | None]] = []
    for line in mounts:
        mount, _, system = line.partition(" - ")
        root, top = mount.split()[3:5]
        kind, _, options = system.split()[:3]
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        # A container may see another path than the one that was mounted for it: then its own
        # group is the top one.
        inner = Path(paths[kind])
        inner = inner.relative_to(root) if inner.is_relative_to(root) else Path()
        for folder in [inner, *inner.parents]:
            if ".." in folder.parts:
                continue
            group = Path(top, *folder.parts)
            if kind == "cgroup2":
                quota, period = group / "cpu.max", None
            else:
                quota, period = group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"
            if quota.exists():
                files.append((quota, period))
    return files

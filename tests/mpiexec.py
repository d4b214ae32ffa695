"""Finding an MPI launcher, and running Python on several ranks of it."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Open MPI's words for: more ranks than cores, no pinning (other jobs run here), root in a
# container. Other implementations need none of them and read none.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMP_NUM_THREADS": "1",
}


def find_mpiexec() -> str | None:
    """Return the launcher: the environment's own, where a wheel brought one, or the system's."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("mpiexec", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))


def run_ranks(n: int, *arguments: object, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ``python -m mpi4py *arguments`` on `n` ranks: one that raises ends the others."""
    command = [find_mpiexec(), "-n", n, sys.executable, "-m", "mpi4py", *arguments]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True, text=True, timeout=timeout, check=False,
        env={**os.environ, **ENVIRONMENT},
    )

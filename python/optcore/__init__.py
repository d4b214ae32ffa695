"""Fused, bit-reproducible optimizer steps on NumPy arrays."""
from typing import TYPE_CHECKING

from optcore._config import get_include as get_include
from optcore._config import show_config as show_config
from optcore._version import __version__ as __version__
from optcore.adaptive import AdaGrad as AdaGrad
from optcore.adaptive import Adam as Adam
from optcore.adaptive import AdamW as AdamW
from optcore.adaptive import RMSProp as RMSProp
from optcore.arrays import bfloat16 as bfloat16
from optcore.checkpoint import CheckpointError as CheckpointError
from optcore.functional import *  # noqa: F403 - the step functions, and nothing else
from optcore.rows import Rows as Rows
from optcore.runtime import get_num_threads as get_num_threads
from optcore.runtime import set_num_threads as set_num_threads
from optcore.sgd import SGD as SGD

if not TYPE_CHECKING:       # for a checker, the imports say it
    # What compiled modules import cannot be seen by tools that bundle an application.
    from optcore import (  # noqa: F401
        _arena,
        _cgroups,
        arrays,
        functional,
        groups,
        kernels,
        memory,
        norm,
        options,
        parallel,
        plan,
        rows,
        runtime,
        structure,
        sweep,
        table,
    )
    __all__ = ["__version__", "bfloat16", *[
        name for name, value in list(globals().items())
        if getattr(value, "__module__", "").startswith("optcore.")
    ]]

    def __dir__() -> list[str]:
        return sorted(__all__)      # not the modules that make it up

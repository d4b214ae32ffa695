"""Fused, bit-reproducible SGD, momentum and Nesterov steps on NumPy arrays."""
from optcore._config import get_include, show_config
from optcore._version import __version__
from optcore.checkpoint import CheckpointError
from optcore.functional import momentum_step, nesterov_step, sgd_step
from optcore.runtime import get_num_threads, set_num_threads
from optcore.sgd import SGD

__all__ = [
    "SGD",
    "CheckpointError",
    "__version__",
    "get_include",
    "get_num_threads",
    "momentum_step",
    "nesterov_step",
    "set_num_threads",
    "sgd_step",
    "show_config",
]

"""Fused, bit-reproducible SGD, momentum and Nesterov steps on NumPy arrays."""
from optcore._config import get_include as get_include
from optcore._config import show_config as show_config
from optcore._version import __version__ as __version__
from optcore.checkpoint import CheckpointError as CheckpointError
from optcore.functional import *  # noqa: F403 - one function for each rule, and nothing else
from optcore.runtime import get_num_threads as get_num_threads
from optcore.runtime import set_num_threads as set_num_threads
from optcore.sgd import SGD as SGD

"""Embedding layers of PyTorch, which say which rows of a table they are about to read."""
from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from optcore.torch import _Optimizer

# Optimizers that have stepped parameters by rows
_optimizers: weakref.WeakSet[_Optimizer] = weakref.WeakSet()
_hooks: list[Any] = []      # the one, once there is such an optimizer


def watch(opt: _Optimizer) -> None:
    """Bring rows of an optimizer's parameters up to date before embedding layers read them."""
    _optimizers.add(opt)
    if not _hooks:
        _hooks.append(torch.nn.modules.module.register_module_forward_pre_hook(_catch_up))


def _catch_up(module: Any, inputs: tuple[Any, ...]) -> None:
    """Before a forward pass: rows that are not among the positional inputs may be any."""
    if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        for opt in list(_optimizers):
            if opt._steps(module.weight):
                opt.catch_up(module.weight, inputs[0] if inputs else None)

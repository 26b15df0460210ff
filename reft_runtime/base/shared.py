"""Attention modules that several decoder layers share, each with keys and values of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from reft_runtime.base.attention import LAYER

_TOLD = "layer_idx"
"""The argument by which a shared module is told the layer that it runs for."""


def tell_layers(model: PreTrainedModel) -> None:
    """Let shared attention modules say which layer attends; `ModelState.restore` undoes it."""
    for module in model.modules():
        if hasattr(module, _TOLD) and _TOLD in (
            names := list(inspect.signature(module.forward).parameters)
        ):
            module.forward = _noted(module, module.forward, names.index(_TOLD))


def _noted(module: nn.Module, own: Callable[..., Any], index: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        layer = args[index] if len(args) > index else kwargs.get(_TOLD)
        if layer is not None:
            setattr(module, LAYER, layer)
        return own(*args, **kwargs)

    return forward

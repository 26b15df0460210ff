"""Tracks which engine or training owns a model object, and restores it for its caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from reft_runtime.base.attention import LAYER, REACH
from reft_runtime.base.experts import plain_experts
from reft_runtime.base.latent import EXPAND
from reft_runtime.base.linears import plain_weight
from reft_runtime.base.own_attention import METHOD
from reft_runtime.base.support import TUNED
from reft_runtime.errors import ConfigError

_CHANGED = ("forward", METHOD, "training", REACH, LAYER, TUNED, EXPAND)
"""Attributes of modules that are set or changed while a model serves."""

_lock = threading.Lock()
_claimed: WeakSet[nn.Module] = WeakSet()
"""The embeddings of models in use, because a language model taken out of another shares them."""


def claim(model: PreTrainedModel) -> None:
    """Take a model object until `release`. Raises `ConfigError` if it has an owner already."""
    with _lock:
        if model.get_input_embeddings() in _claimed:
            raise ConfigError(
                "model: an Engine or a training has this model object. Close that first"
                " (engine.close(), or `with Engine(...)`), or give a copy (copy.deepcopy before).",
                param="model",
            )
        _claimed.add(model.get_input_embeddings())


def release(model: PreTrainedModel) -> None:
    """Let go of a model object; does nothing if nobody claimed it."""
    with _lock:
        _claimed.discard(model.get_input_embeddings())


@dataclass(slots=True)
class _Weight:
    """One parameter of a model, held weakly, because packed weights are kept without it.

    `find` returns the parameter while anybody holds it, else None.
    """

    find: Callable[[], nn.Parameter | None]
    requires_grad: bool
    grad: Tensor | None

    def restored(self, module: nn.Module, name: str) -> nn.Parameter:
        """The parameter itself or, if nobody holds it any more, a new one with the same weight."""
        found = self.find()
        if found is None:
            plain = plain_experts(module, name)
            if plain is None:
                linear = isinstance(module, nn.Linear) and name == "weight"
                plain = plain_weight(module) if linear else getattr(module, name).detach()
            made = nn.Parameter(plain, requires_grad=self.requires_grad)
            made.grad = self.grad
            self.find = lambda: made  # for modules that shared it
            return made
        found.requires_grad_(self.requires_grad)
        return found


class ModelState:
    """A model's state except its weights' values, taken before any of it is changed.

    That is its attention, frozen or not, training mode, the modules' own forwards, and the layout
    of its weights. The values of weights never change, so they are not copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._device = model.device
        self._attention = [(one, one._attn_implementation) for one in _configs(model)]
        self._attributes: list[tuple[nn.Module, dict[str, Any]]] = []
        self._weights: list[tuple[nn.Module, str, _Weight]] = []
        weights: dict[nn.Parameter, _Weight] = {}
        for module in model.modules():
            own = vars(module)
            self._attributes.append((module, {key: own[key] for key in _CHANGED if key in own}))
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    weight = _Weight(ref(parameter), parameter.requires_grad, parameter.grad)
                    self._weights.append((module, name, weights.setdefault(parameter, weight)))

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def restore(self) -> None:
        """Restore the model's state; it may be called again."""
        for module, name, weight in self._weights:
            module._parameters[name] = weight.restored(module, name)
        self._restore_attributes()
        for config, attention in self._attention:
            config._attn_implementation = attention
        if self._model.device != self._device:
            self._model.to(self._device)  # type: ignore[arg-type]

    def discard(self) -> None:
        """Take the weights from the model, which frees them at once, whoever holds the model.

        Forwards that were replaced hold weights, too, and their own modules: such circles wait for
        a collection of garbage, which may be long in coming.
        """
        self._restore_attributes()
        for module, name, _ in self._weights:
            module._parameters[name] = None

    def _restore_attributes(self) -> None:
        for module, attributes in self._attributes:
            for key in _CHANGED:
                vars(module).pop(key, None)
            vars(module).update(attributes)


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """The configurations of a model and of the models in it, the outermost first."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, PretrainedConfig] = {}
    for config in (one.config for one in models):
        found.setdefault(id(config), config)
    return list(found.values())

"""Single modules of a base model, without the rest of its weights."""

from __future__ import annotations

import os
from collections.abc import Set
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from reft_runtime.base.demo import locate
from reft_runtime.base.pretrained import read_config
from reft_runtime.errors import ConfigError
from reft_runtime.interventions.hub import HUB, fetched


class StoredModules:
    """The modules of `demo`, a folder or a hub id; none is read before it is asked for."""

    def __init__(self, model: str) -> None:
        self._model = model

    def __call__(self, path: str) -> nn.Module:
        """The module of a path, in float32 on the CPU.

        Raises `ConfigError`, whose `param` is `base`, if it is not there, or has no weights in the
        model's safetensors files.
        """
        folder, model = self._opened
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ConfigError(
                f"base: {self._model} has no module {path[:200]}; check --base.", param="base"
            ) from None
        weights: dict[str, Tensor] = {}
        for name in module.state_dict():
            full = f"{path}.{name}"  # a checkpoint may lack the prefix of the model without head
            short = full.removeprefix(f"{model.base_model_prefix}.")
            weight = _read(folder, {full, short})
            if weight is None:
                raise ConfigError(
                    f"base: {self._model} has no {full[:200]} in its model*.safetensors.",
                    param="base",
                )
            weights[name] = weight.float()
        module.load_state_dict(weights, assign=True)
        return module

    @cached_property
    def _opened(self) -> tuple[Path, PreTrainedModel]:
        """The folder of the weights, and the model without any."""
        path, _ = locate(self._model)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                read_config(path), trust_remote_code=False
            )
        source = path if os.path.isdir(path) else f"{HUB}{path}"
        return fetched(source, ["model*.safetensors"], param="base"), model


def _read(folder: Path, names: Set[str]) -> Tensor | None:
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as content:
            for name in names & set(content.keys()):
                tensor: Tensor = content.get_tensor(name)
                return tensor
    return None

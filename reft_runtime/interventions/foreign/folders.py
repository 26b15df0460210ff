"""Folders that adapters are saved in: their configuration, and their weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign.damage import check_floats
from reft_runtime.interventions.pyreft.checkpoint import read_json
from reft_runtime.interventions.pyreft.states import read_states
from reft_runtime.interventions.pyreft.unpickle import plain_state

CONFIG = "adapter_config.json"
"""The file that both PEFT and AdapterHub's library put beside the weights."""


def folder_of(path: Path) -> Path:
    """The folder of an adapter, named itself or by one of its files."""
    return path if os.path.isdir(path) else path.parent  # pathlib's raises where a name is too long


def is_adapter(path: Path) -> bool:
    """Whether this is the folder of an adapter, or a file of one in its folder."""
    named = os.path.isdir(path) or path.name.startswith(("adapter", "pytorch_adapter"))
    return named and os.path.isfile(folder_of(path) / CONFIG)


def read_config(path: Path) -> dict[str, Any]:
    """An adapter's configuration; raises `InvalidFile`."""
    return read_json(folder_of(path) / CONFIG)


def read_weights(path: Path, files: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of the first of `files` that is there, orthogonal ones plain, in floats.

    Pickles are read by a process of their own. Raises `ConfigError` and `InvalidFile`.
    """
    folder = folder_of(path)
    file = next((folder / name for name in files if (folder / name).is_file()), None)
    if file is None:
        raise ConfigError(f"{path}: has no {' or '.join(files)} beside {CONFIG}.", param="source")
    weights = _of_safetensors(file) if file.suffix == ".safetensors" else read_states([file])[0]
    for name, tensor in weights.items():
        check_floats(file, tensor, name)
    return weights


def _of_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return plain_state(safetensors.torch.load_file(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidFile(f"{file}: {str(error).splitlines()[0][:300]}.") from None


def field(config: Mapping[str, Any], name: str, *types: type, where: str = "") -> Any:
    """A field that must be there and be of one of the types; raises `InvalidFile`."""
    if name not in config:
        raise InvalidFile(f"{CONFIG}, {where}{name}: missing.")
    if type(config[name]) not in types:  # a bool is an int
        names = " or ".join("null" if each is type(None) else each.__name__ for each in types)
        raise InvalidFile(
            f"{CONFIG}, {where}{name}: {str(config[name])[:80]!r}; it must be {names}."
        )
    return config[name]

"""Edits of what modules are given or give, from tensors that are named by a module's path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.format.components import normalise
from reft_runtime.interventions.format.intervention import Edit
from reft_runtime.interventions.format.manifest import BaseShape


def by_module(
    weights: Mapping[str, Tensor], endings: Sequence[str], of: str, prefix: str = ""
) -> dict[str, dict[str, Tensor]]:
    """The weights named `<prefix><path>.<ending>` by the path, and by the last name in the ending.

    `of` says whose they are. Raises `InvalidFile` for one of another name.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        fitting = [each for each in endings if name.endswith(f".{each}")]
        if not (name.startswith(prefix) and fitting):
            raise InvalidFile(
                f"{name[:200]!r}: no tensor of {of}, whose names are {prefix}MODULE."
                f"{' or '.join(endings)}."
            )
        module = name.removeprefix(prefix).removesuffix(f".{fitting[0]}")
        found.setdefault(module, {})[fitting[0].rpartition(".")[2]] = tensor
    return found


def edit_at(
    base: BaseShape,
    positions: str | None,
    place: str,
    kind: str,
    tensors: Mapping[str, Tensor],
    act: str | None = None,
) -> Edit:
    """An edit at a module's path with `.input` or `.output` behind it, as wide as its tensors are.

    It is at `all` positions unless others are given. Raises `InvalidFile` for a layer that the base
    model does not have.
    """
    written = re.sub(r"\.(\d{1,4})(?=\.)", r"[\1]", place)
    number = re.search(r"\[(\d+)\]", written)
    layer, component = normalise(int(number[1]) if number else 0, written)
    if layer >= base.num_layers:
        raise InvalidFile(
            f"{place[:200]}: {base.model} has layers 0 to {base.num_layers - 1}; check --base."
        )
    width = next(iter(tensors.values())).shape[-1]
    other = None if width == base.hidden_size else width
    where = "all" if positions is None else positions
    return Edit(layer, where, tensors, kind, component, act, other)

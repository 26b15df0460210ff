"""Gains and offsets of what modules give, as RED (arXiv 2402.15179) and BREP save them.

`<module>.delta_vector.activation_scaling` and `.activation_bias`, each [1, d], make s * y + b of an
output y. RED edits every token, BREP those of the prompt and the first generated ones.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.foreign.damage import check_floats
from reft_runtime.interventions.foreign.modules import by_module, edit_at
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.interventions.pyreft.states import read_states

FILE = "delta_vector.pth"

_SCALING, _BIAS = "activation_scaling", "activation_bias"
_NORM = ".delta_vector.activation_ln."
_HIDDEN_SIZED = ("down_proj", "o_proj", "c_proj")
"""Modules whose outputs are added to the residual stream."""

ASSUMED = (
    "every token is edited, as RED does; of a file of BREP's, with the first P generated tokens,"
    " give --positions 'prompt+decode[:P]'"
)
"""What is told where no positions are given: the files of both are alike."""


def is_red(path: Path) -> bool:
    """Whether this is a file of RED's, which goes by its name, or the folder of one."""
    return path.name == FILE or os.path.exists(path / FILE)


def import_red(
    source: str | Path,
    *,
    base: BaseShape,
    positions: str | None = None,
    template: str | None = None,
) -> Intervention:
    """Read a `delta_vector.pth`, or the folder that it is in.

    `positions` are `all` unless others are given. A file may hold gains alone, or offsets alone. It
    is read by a process of its own. `base` is the base model's shape (`reft_runtime.base_shape`).
    Raises `ConfigError` and `InvalidFile`.
    """
    path = Path(source)
    path = path / FILE if os.path.isdir(path) else path
    weights = read_states([path])[0]
    for name, tensor in weights.items():
        check_floats(path, tensor, name)
        if _NORM in name:
            raise InvalidFile(
                f"{name[:200]}: normalises each row after its gain and offset, and no edit stands"
                " for that; only layer types all, scaling and bias can be served."
            )
    endings = [f"delta_vector.{each}" for each in (_SCALING, _BIAS)]
    edits = []
    for module, found in by_module(weights, endings, "RED").items():
        width = next(iter(found.values())).shape[-1:].numel()
        for name, tensor in found.items():
            if tensor.shape != (1, width):
                raise InvalidFile(
                    f"{module[:200]}.{name}: shape {list(tensor.shape)}, expected [1, {width}]."
                )
        if module.endswith(_HIDDEN_SIZED) and width != base.hidden_size:
            raise InvalidFile(
                f"{module[:200]}: its output is {width} wide, but {base.model} is"
                f" {base.hidden_size} wide; check --base."
            )
        tensors = {
            "s": found.get(_SCALING, torch.ones(1, width))[0].float(),
            "b": found.get(_BIAS, torch.zeros(1, width))[0].float(),
        }
        edits.append(edit_at(base, positions, f"{module}.output", "red", tensors))
    edits.sort(key=lambda edit: edit.layer)
    training = {"source": "RED or BREP"} | ({"assumed": ASSUMED} if positions is None else {})
    return Intervention.build(base, edits, template=template, training=training)

"""A direction that is ablated everywhere, as refusal_direction (arXiv 2406.11717) saves one."""

from __future__ import annotations

from pathlib import Path

import torch

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign.steering import (
    Layers,
    one_layer,
    read_object,
    steering_edits,
)
from reft_runtime.interventions.format.intervention import Edit, Intervention
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.interventions.pyreft.states import read_states
from reft_runtime.interventions.pyreft.unpickle import ALONE

DIRECTION, METADATA = "direction.pt", "direction_metadata.json"
PLACES = ("block_input", "attention_output", "mlp_output")


def import_direction(
    source: str | Path,
    *,
    base: BaseShape,
    kind: str = "consreft",
    layer: Layers = None,
    positions: str = "all",
    scale: float = 1.0,
    template: str | None = None,
) -> Intervention:
    """Read a folder with a `direction.pt`: an ablation, or with `kind` `steering` an addition.

    The ablation takes the direction out of the input of every block and out of what attention and
    the MLP give. The addition, `scale` times the direction, is to the input of block `layer`, which
    `direction_metadata.json` records. `base` is the base model's shape (`reft_runtime.base_shape`).
    Raises `InvalidFile` and `ConfigError`.
    """
    folder, layer = Path(source), one_layer(layer)
    if kind not in ("consreft", "steering"):
        raise ConfigError(
            f"kind: a direction is ablated (consreft) or added (steering), not {kind[:80]!r}.",
            param="kind",
        )
    found = read_states([folder / DIRECTION])[0]
    vector = found.get(ALONE)
    if vector is None or vector.shape != (base.hidden_size,) or not vector.is_floating_point():
        raise InvalidFile(
            f"{folder / DIRECTION}: must be one vector of {base.hidden_size} floats, as wide as"
            f" {base.model} is; check --base."
        )
    vector = vector.float()
    if not vector.any():
        raise InvalidFile(f"{folder / DIRECTION}: is zero.")
    training = {"source": "refusal_direction"}
    if kind == "steering":
        layer = _layer(folder) if layer is None else layer
        edits = steering_edits(
            folder,
            {layer: vector},
            base,
            positions=positions,
            layers=layer,
            scale=scale,
            component=PLACES[0],
        )
        return Intervention.build(base, edits, template=template, training=training)
    if scale != 1:
        raise ConfigError(
            "scale: an ablation has none; leave it out, or add the direction (--kind steering).",
            param="scale",
        )
    if layer is not None:
        raise ConfigError(
            "layer: an ablation is of all layers; leave it out, or add the direction to one"
            " (--kind steering).",
            param="layer",
        )
    tensors = {"c": torch.zeros(1), "R": (vector / vector.norm())[:, None]}
    edits = [
        Edit(each, positions, tensors, kind="consreft", component=place)
        for each in range(base.num_layers)
        for place in PLACES
    ]
    return Intervention.build(base, edits, template=template, training=training)


def _layer(folder: Path) -> int:
    layer = read_object(folder / METADATA).get("layer")
    if type(layer) is not int:
        raise InvalidFile(f"{folder / METADATA}: layer: must be a number; give --layer.")
    return layer

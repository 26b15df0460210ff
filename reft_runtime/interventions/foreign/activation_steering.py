"""activation-steering's `.svec` files: directions that are added to the inputs of blocks."""

from __future__ import annotations

from pathlib import Path

import torch

from reft_runtime.errors import InvalidFile
from reft_runtime.interventions.foreign.steering import Layers, read_object, steering_edits
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.manifest import BaseShape


def import_svec(
    source: str | Path,
    *,
    base: BaseShape,
    layer: Layers = None,
    positions: str = "all",
    scale: float = 1.0,
    template: str | None = None,
) -> Intervention:
    """Read a file of IBM's activation-steering: direction L is added to the input of block L.

    `layer` chooses the `behavior_layer_ids`, and `scale` is the `behavior_vector_strength`, which
    the file does not record. `base` is the base model's shape (`reft_runtime.base_shape`). Raises
    `InvalidFile` and `ConfigError`.
    """
    path = Path(source)
    found = read_object(path)
    directions = found.get("directions")
    if not isinstance(directions, dict):
        raise InvalidFile(f"{path}: directions: must be an object of vectors by layer.")
    vectors = {}
    for name, numbers in directions.items():
        if not (name.isascii() and name.isdecimal() and len(name) <= 5):
            raise InvalidFile(f"{path}: directions: {name[:80]!r} is no layer's number.")
        if not isinstance(numbers, list) or not all(type(each) in (int, float) for each in numbers):
            raise InvalidFile(f"{path}: directions.{name}: must be a list of numbers.")
        if len(numbers) != base.hidden_size:
            raise InvalidFile(
                f"{path}: directions.{name} has {len(numbers)} numbers, but {base.model} is"
                f" {base.hidden_size} wide; check --base."
            )
        try:
            vectors[int(name)] = torch.tensor([float(each) for each in numbers])
        except OverflowError:
            raise InvalidFile(f"{path}: directions.{name}: holds infinite values.") from None
    edits = steering_edits(
        path, vectors, base, positions=positions, layers=layer, scale=scale, component="block_input"
    )
    training = {"source": "activation-steering", "model_type": str(found.get("model_type"))[:80]}
    return Intervention.build(base, edits, template=template, training=training)

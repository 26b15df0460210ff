"""Vectors by layer as steering edits: what several formats are made of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.format.intervention import Edit
from reft_runtime.interventions.format.manifest import BaseShape


def steering_edits(
    source: str | Path,
    vectors: Mapping[int, Tensor],
    base: BaseShape,
    positions: str,
    layer: int | None,
) -> list[Edit]:
    """Edits that add vectors to the outputs of layers: all of them, or the one of `layer`.

    `source` is where they are from. Raises `ConfigError` for a layer that is not there, and
    `InvalidFile` for vectors that change nothing.
    """
    last = base.num_layers - 1
    if layer is not None and not 0 <= layer <= last:
        raise ConfigError(f"layer: {layer}; {base.model} has 0 to {last}.", param="layer")
    if vectors and max(vectors) > last:
        raise InvalidFile(
            f"{source}: has layer {max(vectors)}, but {base.model} has 0 to {last}; check --base."
        )
    if layer is not None and layer not in vectors:
        there = ", ".join(map(str, sorted(vectors)))
        raise ConfigError(f"layer: {source} has none for {layer}, but for {there}.", param="layer")
    edits = [
        Edit(one, positions, {"v": vector.float()}, kind="steering")
        for one, vector in sorted(vectors.items())
        if layer in (None, one) and vector.any()  # layers that are not steered may be zeros
    ]
    if not edits:
        raise InvalidFile(f"{source}: has no direction that is not zero.")
    return edits

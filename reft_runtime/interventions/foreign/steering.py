"""Vectors by layer as steering edits: what several formats are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.format.components import HIDDEN_SIZED, normalise
from reft_runtime.interventions.format.intervention import Edit
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.interventions.pyreft.checkpoint import read_json

Layers = int | Sequence[int] | None
"""The layers to take of those that are there: one, some, or all."""

PLAIN = frozenset(
    f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "GPTNeoX")
) | {"GPT2LMHeadModel"}
"""Architectures whose blocks add what attention and the MLP give, as it is, to the residual stream,
and normalise nothing but what these two are given."""

MAX_JSON_BYTES = 1 << 28
"""Most bytes of an object in JSON: that of vectors, as text, for each layer."""


def check_scale(scale: float) -> None:
    """Raise `ConfigError` for a factor that leaves no vector."""
    if not (math.isfinite(scale) and scale):
        raise ConfigError(
            f"scale: must be a finite number other than 0, not {scale}.", param="scale"
        )


def steering_edits(
    source: str | Path,
    vectors: Mapping[int, Tensor],
    base: BaseShape,
    *,
    positions: str,
    layers: Layers,
    scale: float = 1.0,
    component: str = "block_output",
) -> list[Edit]:
    """Edits that add vectors to a component of their layers: all of them, or those of `layers`.

    `scale` multiplies them, so that strength 1 is a sensible one where they have length 1.
    `source` is where they are from. Raises `ConfigError` for a layer that is not there or not that
    of the component, and `InvalidFile` for vectors that change nothing.
    """
    check_scale(scale)
    wanted = chosen(layers, base)
    last = base.num_layers - 1
    if vectors and max(vectors) > last:
        raise InvalidFile(
            f"{source}: has layer {max(vectors)}, but {base.model} has 0 to {last}; check --base."
        )
    for layer in wanted or ():
        if layer not in vectors:
            there = ", ".join(map(str, sorted(vectors)))
            raise ConfigError(
                f"layer: {source} has none for {layer}, but for {there}.", param="layer"
            )
    for layer, vector in vectors.items():
        if not bool(vector.float().isfinite().all()):
            raise InvalidFile(f"{source}: holds NaN or infinite values for layer {layer}.")
    edits = [
        Edit(
            layer,
            positions,
            {"v": scale * vector.float()},
            kind="steering",
            component=in_layer(layer, component),
            width=None if len(vector) == base.hidden_size else len(vector),
        )
        for layer, vector in sorted(vectors.items())
        # Layers that are not steered may be zeros.
        if (wanted is None or layer in wanted) and vector.any()
    ]
    if not edits:
        raise InvalidFile(f"{source}: has no direction that is not zero.")
    return edits


def chosen(layers: Layers, base: BaseShape) -> list[int] | None:
    """The numbers of layers that were given. Raises `ConfigError` for one that is not there."""
    wanted = [layers] if isinstance(layers, int) else layers
    last = base.num_layers - 1
    for layer in wanted or ():
        if not 0 <= layer <= last:
            raise ConfigError(f"layer: {layer}; {base.model} has 0 to {last}.", param="layer")
    return None if wanted is None else list(wanted)


def one_layer(layers: Layers) -> int | None:
    """The number of a layer, if one was given. Raises `ConfigError` for several."""
    if layers is None or isinstance(layers, int):
        return layers
    if len(layers) != 1:
        raise ConfigError("layer: only one is possible for this source.", param="layer")
    return layers[0]


def in_layer(layer: int, component: str) -> str:
    """The one way to write a component of a layer. Raises `ConfigError` for what is not in it."""
    try:
        found, component = normalise(layer, component)
    except InvalidFile as error:
        raise ConfigError(error.message, param="component") from None
    if found != layer:
        raise ConfigError(
            f"component: {component} lies in layer {found}, but a vector is that of layer {layer};"
            f" take that one alone (--layer {found}).",
            param="component",
        )
    return component


def width_of(component: str, base: BaseShape) -> int | None:
    """How wide a component's rows are, None where the base model's shape does not say it."""
    return base.hidden_size if in_no_layer(component) in HIDDEN_SIZED else None


def in_no_layer(component: str) -> str:
    """The name of a component, whatever its layer, or its path. Raises `ConfigError`."""
    try:
        return normalise(0, component)[1]
    except InvalidFile as error:
        raise ConfigError(error.message, param="component") from None


def check_there(path: Path) -> None:
    """Raise `ConfigError` for a file that cannot be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.", param="source") from None


def read_object(path: Path) -> dict[str, Any]:
    """An object that another library wrote. Raises `InvalidFile`, and `ConfigError` if missing."""
    check_there(path)
    return read_json(path, MAX_JSON_BYTES)

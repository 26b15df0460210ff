"""steerling (arXiv 2603.00425): adapters, or vectors, behind blocks, norms of the MLP, and MLPs.

An adapter makes h + act(h downᵀ) upᵀ of a row, a vector is added to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign.modules import edit_at
from reft_runtime.interventions.format.intervention import Edit
from reft_runtime.interventions.format.kinds import ACTS
from reft_runtime.interventions.format.manifest import BaseShape

NAMES = r"(?:adapters|deltas)\..*|.*\.lora_A\..*"
"""The names of what is read, as a regular expression; the last ones are refused."""

ASSUMED = (
    "every token is edited, as in steerling's own runs; of a training with --intervene-last give"
    " --positions '[-1:]+decode'"
)
"""What is told where no positions are given, which are not recorded."""

_NAME = re.compile(
    r"(?:adapters\.layer(\d{1,4})_(block|attn|mlp)\.(down|up)\.weight"
    r"|deltas\.layer(\d{1,4})_(block|attn|mlp))"
)
_PLACES = {"block": "output", "attn": "post_attention_layernorm.output", "mlp": "mlp.output"}


def has_edits(weights: Mapping[str, Tensor]) -> bool:
    """Whether any of the weights is one that `NAMES` fits."""
    return any(re.fullmatch(NAMES, name) for name in weights)


def steering(
    weights: Mapping[str, Tensor], base: BaseShape, positions: str | None, act: str | None
) -> tuple[list[Edit], dict[str, str]]:
    """The edits, by layer, and whose they are; `act` is that of adapters, `linear` for none.

    Raises `ConfigError` for an act that is missing or wrong, and `InvalidFile`.
    """
    found: dict[tuple[int, str, bool], dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise InvalidFile(_refusal(name))
        layer, place, part = match[1] or match[4], match[2] or match[5], match[3] or "v"
        _check(name, tensor, part, base)
        found.setdefault((int(layer), place, part == "v"), {})[part] = tensor
    act = _act(act, not all(is_vector for _, _, is_vector in found))
    edits = []
    for (layer, place, is_vector), parts in sorted(found.items()):
        where = f"model.layers.{layer}.{_PLACES[place]}"
        name = f"adapters.layer{layer}_{place}"
        if is_vector:
            if parts["v"].any():
                edits.append(edit_at(base, positions, where, "steering", parts))
            continue
        for part in ("down", "up"):
            if part not in parts:
                raise InvalidFile(f"{name}.{part}.weight: missing beside its other half.")
        if parts["down"].shape[0] != parts["up"].shape[1]:
            raise InvalidFile(
                f"{name}.up.weight: rank {parts['up'].shape[1]}, but {name}.down.weight has"
                f" {parts['down'].shape[0]}."
            )
        tensors = {"W": parts["down"], "W2": parts["up"].T.contiguous()}
        edits.append(edit_at(base, positions, where, "nodireft", tensors, act))
    if not edits:
        raise InvalidFile("deltas: all are zero; were they trained?")
    return edits, {"source": "steerling"}


def _check(name: str, tensor: Tensor, part: str, base: BaseShape) -> None:
    """Raise `InvalidFile` for what is not of its shape, as wide as the base model is."""
    along = {"v": 0, "down": 1, "up": 0}[part]
    expected = {"v": "[d]", "down": "[r, d]", "up": "[d, r]"}[part]
    if tensor.ndim != (1 if part == "v" else 2):
        raise InvalidFile(f"{name}: shape {list(tensor.shape)}, expected {expected}.")
    if tensor.shape[along] != base.hidden_size:
        raise InvalidFile(
            f"{name}: shape {list(tensor.shape)}, expected {expected}, but {base.model} is"
            f" {base.hidden_size} wide; check --base."
        )


def _act(act: str | None, adapters: bool) -> str | None:
    if not adapters:
        if act is not None:
            raise ConfigError("act: fixed vectors have none; leave it out.", param="act")
        return None
    if act is None:
        raise ConfigError(
            "act: steerling does not record its nonlinearity: give --act, `silu` for its default,"
            " `linear` for a training with --linear.",
            param="act",
        )
    if act not in ACTS:
        raise ConfigError(f"act: {act[:80]!r} is unknown; silu is steerling's.", param="act")
    return None if act == "linear" else act


def _refusal(name: str) -> str:
    if ".lora_A." in name:
        return (
            f"{name[:200]}: a LoRA, which changes weights; of steerling only adapters that were"
            " trained without one can be served."
        )
    return f"{name[:200]!r}: no tensor of steerling's."

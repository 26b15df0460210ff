"""Attention of one packed step, registered with transformers.

The model's own code runs unchanged: it calls this function, by the name `ATTENTION`, with the
packed queries, keys and values [1, heads, T, dim] of all scheduled tokens, and `step`, which it
passes through from the call of the model. How the step attends depends on where keys and values
lie: see `row_attention` and `page_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from reft_runtime.errors import UnsupportedModel

ATTENTION = "reft_packed"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one attention layer's cache entries."""

    kv_heads: int
    key_dim: int
    value_dim: int


class AttentionStep(Protocol):
    """What attention needs to know about the step."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """Store the step's keys and values [T, kv_heads, dim], attend; [T, heads, dim]."""


class RotatingStep(AttentionStep, Protocol):
    """A step that can rotate queries and keys while it stores the keys: one operator less."""

    @property
    def rotates(self) -> bool:
        """Whether it does; a step that says nothing of it does not."""

    def attend_rotated(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: tuple[Tensor, Tensor],
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """`Operators.rotate_` by `angles`, cosines and sines [T, dim], and then `attend`."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: AttentionStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: hands one layer's work to the step."""
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel("logit soft-capping and attention sinks are not supported")
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    return step.attend(layer, query, key, value, scaling, sliding_window)[None], None


AttentionInterface.register(ATTENTION, packed_attention)


@dataclass(frozen=True, slots=True)
class ProbedLayer:
    """What one layer asked of attention."""

    shape: LayerShape
    heads: int
    scaling: float | None
    window: int | None


@dataclass(slots=True)
class ShapeProbe:
    """An `AttentionStep` for one short prompt that stores nothing; notes what every layer asks."""

    layers: dict[int, ProbedLayer] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        """Note the layer, and attend as the engine does: causally, within the window."""
        if layer in self.layers:
            raise UnsupportedModel("a layer attends more than once")
        shape = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        self.layers[layer] = ProbedLayer(shape, query.shape[1], scaling, window)
        return attend_causally(query, key, value, scaling, window)


def attend_causally(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Attention of the last n tokens of a sequence, by torch's own operators: the reference.

    `query` is [n, heads, dim]; `key` and `value` are [length, kv_heads, dim] of all its tokens.
    """
    at = torch.arange(len(key), device=query.device)
    last = at[len(key) - len(query) :, None]
    seen = at <= last
    if window is not None:
        seen &= at > last - window
    result = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=seen,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result[0].transpose(0, 1)

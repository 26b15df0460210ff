"""Attention of one packed step, registered with transformers.

The model's own code runs unchanged: it calls this function, by the name `ATTENTION`, with the
packed queries, keys and values [1, heads, T, dim] of all scheduled tokens. The step that it belongs
to is the one that `running` names. How the step attends depends on where keys and values lie: see
`row_attention` and `page_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from reft_runtime.base.latent import latent_of
from reft_runtime.errors import UnsupportedModel
from reft_runtime.kernels.operators import HeadScoring

ATTENTION = "reft_packed"
REACH = "reft_reach"
"""Attribute of an attention module that holds the `Reach` of its mask."""

LAYER = "reft_layer"
"""Attribute of an attention module that several layers share: the layer that it runs for."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's cache entries; all are 0 for a layer without attention.

    With `values_in_keys`, the values are the first numbers of the keys. `source` is the layer whose
    keys and values this one attends with, if it has none of its own.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    values_in_keys: bool = False
    source: int | None = None

    @property
    def numbers(self) -> int:
        """Numbers that are stored for one token."""
        if self.source is not None:
            return 0
        return self.kv_heads * (self.key_dim + (0 if self.values_in_keys else self.value_dim))


NO_ATTENTION = LayerShape(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back queries see, in tokens; see `Scoring`."""

    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class Scoring:
    """How the queries of a layer score keys, and which keys they see: all up to their own, but for

    `window`: only the last `window` of these, the own one included;
    `chunk`: only those of the own chunk, where chunks of `chunk` tokens begin at position 0.
    Scores are multiplied by `scaling` (1 / sqrt(dim) if None), then, with `softcap`, bounded as
    softcap * tanh(score / softcap). `sinks` [heads], in any float dtype, are scores of one more key
    for each head, whose value is zero.
    """

    scaling: float | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = field(default=None, compare=False)

    def scale(self, dim: int) -> float:
        """What scores of heads `dim` wide are multiplied by."""
        return dim**-0.5 if self.scaling is None else self.scaling

    def of_heads(self, dim: int) -> HeadScoring:
        """The same for compiled operators, and heads `dim` wide."""
        sinks = self.sinks
        if sinks is not None:
            sinks = sinks.detach().to(torch.float32).contiguous()
        return HeadScoring(
            self.scale(dim), self.window or 0, self.chunk or 0, self.softcap or 0.0, sinks
        )

    def first(self, position: int) -> int:
        """The first position that a query at `position` sees."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position // self.chunk * self.chunk)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries see keys, by their positions, which are broadcast; bool."""
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (keys > queries - self.window)
        if self.chunk is not None:
            seen = seen & (keys >= queries - queries % self.chunk)
        return seen

    @property
    def span(self) -> int | None:
        """Tokens of the window or the chunk; None if queries see all before them."""
        return self.chunk if self.window is None else self.window

    @property
    def is_softmax(self) -> bool:
        """Whether the weights of the keys that are seen are the softmax of scaled products."""
        return self.softcap is None and self.sinks is None


class AttentionStep(Protocol):
    """What attention needs to know about the step."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """Store the step's keys and values [T, kv_heads, dim] and attend; gives [T, heads, dim]."""


class RotatingStep(AttentionStep, Protocol):
    """A step that can rotate queries and keys while it stores the keys: one operator less."""

    @property
    def rotates(self) -> bool:
        """Whether the step rotates; a step without this attribute does not."""

    def attend_rotated(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        angles: tuple[Tensor, Tensor],
        scoring: Scoring,
    ) -> Tensor:
        """Rotate as `Operators.rotate_` by `angles`, cosines and sines [T, dim], then `attend`."""


_running: ContextVar[AttentionStep | None] = ContextVar("_running", default=None)


def running_step() -> AttentionStep | None:
    """The step that the model computes in this thread now, None if there is none."""
    return _running.get()


@contextmanager
def running(step: AttentionStep) -> Iterator[None]:
    """Let the model's forward passes inside the `with` block compute `step`."""
    token = _running.set(step)
    try:
        yield
    finally:
        _running.reset(token)


def layer_of(module: nn.Module) -> int:
    """The decoder layer that an attention module runs for."""
    layer: Any = getattr(module, LAYER, None)
    return int(module.layer_idx if layer is None else layer)  # type: ignore[arg-type]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: hands one layer's work to the running step.

    Window and chunk are those that `probe_attention` saw in the layer's mask, if it saw one.
    `softcap` and `s_aux` are `softcap` and `sinks` of `Scoring`. Raises `UnsupportedModel` for a
    call without a step.
    """
    step = running_step()
    if step is None:
        raise UnsupportedModel(
            "An Engine or a training has this model, and transformers' interface to its attention:"
            " call close() of the Engine, and the model runs by itself again."
        )
    latent = latent_of(module)
    if latent is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        query = latent.absorbed(query)
    reach: Reach | None = getattr(module, REACH, None)
    if reach is None:
        reach = Reach(sliding_window)
    scoring = Scoring(scaling, reach.window, reach.chunk, softcap, s_aux)
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    result = step.attend(layer_of(module), query, key, value, scoring)
    return (result if latent is None else latent.values(result))[None], None


AttentionInterface.register(ATTENTION, packed_attention)


def attend_causally(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Attention of the last n tokens of a sequence, by torch's own operators: the reference.

    `query` is [n, heads, dim]; `key` and `value` are [length, kv_heads, dim] of all its tokens.
    Returns [n, heads, dim of the values].
    """
    at = torch.arange(len(key), device=query.device)
    seen = scoring.sees(at[len(key) - len(query) :, None], at)
    query, key, value = (heads.transpose(0, 1)[None] for heads in (query, key, value))
    return attend_seen(query, key, value, seen, scoring)[0].transpose(0, 1)


def attend_seen(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scoring: Scoring
) -> Tensor:
    """Attention of queries [rows, heads, n, dim] to the keys that `seen` shows, differentiable.

    `key` and `value` are [rows, kv_heads, length, dim], `seen` is broadcast to [rows, heads, n,
    length]. Returns [rows, heads, n, dim of the values].
    """
    if scoring.is_softmax:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            scale=scoring.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, 1)
    scores = query.float() @ keys.transpose(2, 3) * scoring.scale(query.shape[3])
    if scoring.softcap is not None:
        scores = (scores / scoring.softcap).tanh() * scoring.softcap
    # Not -inf: a query that sees no key, as padding may, must have a gradient.
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if scoring.sinks is not None:
        sinks = scoring.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value.float().repeat_interleave(group, 1)).to(value.dtype)

"""Attention of one packed step, registered with transformers.

The model's own code runs unchanged: it calls this function, by the name `ATTENTION`, with the
packed queries, keys and values [1, heads, T, dim] of all scheduled tokens. The step that it belongs
to is the one that `running` names. How the step attends depends on where keys and values lie: see
`row_attention` and `page_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from reft_runtime.errors import UnsupportedModel

ATTENTION = "reft_packed"
PROBE = "reft_probe"
"""Name of the attention function that probes a model; masks then come as `AskedMask`."""

WINDOW = "reft_window"
"""Attribute of an attention module that holds its mask's window in tokens, or None."""

_AFTER = 64
"""This many keys after a query are checked; a causal mask hides them all."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's cache entries; all are 0 for a layer without attention."""

    kv_heads: int
    key_dim: int
    value_dim: int


NO_ATTENTION = LayerShape(0, 0, 0)


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

    @property
    def plain(self) -> bool:
        """Whether there is no more to it than a scaling and a window."""
        return self.chunk is None and self.softcap is None and self.sinks is None


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

    The window is the one that `probe_attention` saw in the layer's mask, if it saw one. Raises
    `UnsupportedModel` for soft-capping, attention sinks, and a call without a step.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel("logit soft-capping and attention sinks are not supported")
    step = running_step()
    if step is None:
        raise UnsupportedModel(
            "An Engine or a training has this model, and transformers' interface to its attention:"
            " call close() of the Engine, and the model runs by itself again."
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    window: Any = getattr(module, WINDOW, sliding_window)
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    return step.attend(layer, query, key, value, Scoring(scaling, window))[None], None


AttentionInterface.register(ATTENTION, packed_attention)


@dataclass(frozen=True, slots=True)
class ProbedLayer:
    """What one layer asked of attention."""

    shape: LayerShape
    heads: int
    scoring: Scoring


class CausalStep:
    """An `AttentionStep` for one short prompt, which stores nothing."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """Attend as the engine does."""
        return attend_causally(query, key, value, scoring)


@dataclass(slots=True)
class ShapeProbe(CausalStep):
    """A step that records what every layer asks of attention.

    `max_tokens` is the longest sequence to be served, `dtype` that of the keys and values to be
    kept.
    """

    max_tokens: int
    dtype: torch.dtype
    layers: dict[int, ProbedLayer] = field(default_factory=dict)

    def look_at_mask(self, module: nn.Module, mask: AskedMask | Tensor | None) -> None:
        """Keep the window of a layer's mask as an attribute of its module.

        Raises `UnsupportedModel` if transformers' mask interface did not make the mask: what it is
        at other lengths would not be known.
        """
        if not isinstance(mask, AskedMask):
            raise UnsupportedModel("its attention masks are not those of transformers' interface")
        setattr(module, WINDOW, mask.window(self.max_tokens))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """Record the layer, then attend."""
        if layer in self.layers:
            raise UnsupportedModel("a layer attends more than once")
        if {query.dtype, key.dtype, value.dtype} != {self.dtype}:
            raise UnsupportedModel(
                f"its attention does not work in the dtype of its weights, {self.dtype}; take"
                " another dtype, such as float32"
            )
        shape = LayerShape(key.shape[1], key.shape[2], value.shape[2])
        self.layers[layer] = ProbedLayer(shape, query.shape[1], scoring)
        return attend_causally(query, key, value, scoring)


def probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AskedMask | Tensor | None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Record the layer's mask at the `ShapeProbe`, then call `packed_attention`.

    A mask says more than what a layer passes on. The running step must be a `ShapeProbe`.
    """
    step = running_step()
    assert isinstance(step, ShapeProbe)
    step.look_at_mask(module, attention_mask)
    return packed_attention(module, query, key, value, None, **more)


@dataclass(frozen=True, slots=True)
class AskedMask:
    """A mask as transformers' mask interface describes it: who sees whom, by their positions."""

    sees: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """Maps indices of sequence, head, query and key to whether the query sees the key."""

    def window(self, length: int) -> int | None:
        """The sliding window of a causal mask over `length` tokens; None if there is no window.

        Raises `UnsupportedModel` for any other mask.
        """
        last = length - 1
        count = int(self._row(last, length).sum())
        window = None if count == length else count
        near = 0 if window is None else window
        for query in {0, 1, near - 1, near, near + 1, 2 * near + 1, length // 2, last}:
            if not 0 <= query <= last:
                continue
            width = min(query + _AFTER, length)
            keys = torch.arange(width)
            wanted = keys <= query
            if window is not None:
                wanted &= keys > query - window
            if not torch.equal(self._row(query, width), wanted):
                raise UnsupportedModel("its attention mask is neither causal nor a sliding window")
        return window

    def _row(self, query: int, keys: int) -> Tensor:
        first = torch.zeros((), dtype=torch.long)
        seen = self.sees(first, first, torch.tensor(query), torch.arange(keys))
        return seen.expand(keys)


def _asked_mask(*_: Any, mask_function: Any, **__: Any) -> AskedMask:
    return AskedMask(mask_function)


AttentionInterface.register(PROBE, probe_attention)
AttentionMaskInterface.register(PROBE, _asked_mask)


def attend_causally(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Attention of the last n tokens of a sequence, by torch's own operators: the reference.

    `query` is [n, heads, dim]; `key` and `value` are [length, kv_heads, dim] of all its tokens.
    Returns [n, heads, dim].
    """
    at = torch.arange(len(key), device=query.device)
    last = at[len(key) - len(query) :, None]
    seen = at <= last
    if scoring.window is not None:
        seen &= at > last - scoring.window
    result = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=seen,
        scale=scoring.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result[0].transpose(0, 1)

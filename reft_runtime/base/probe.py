"""Finds out what the layers of a model ask of attention, in one short forward pass.

A mask says more than what a layer hands on: masks come as `AskedMask`, by transformers' mask
interface, and are compared with those that the engine has at full length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from reft_runtime.base.attention import (
    REACH,
    LayerShape,
    Reach,
    Scoring,
    attend_causally,
    packed_attention,
    running_step,
)
from reft_runtime.errors import UnsupportedModel

PROBE = "reft_probe"
"""Name of the attention function that probes a model; masks then come as `AskedMask`."""

_AFTER = 64
"""This many keys after a query are checked; a causal mask hides them all."""


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
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values by layer: while they are held, no other tensors can lie where they do."""

    def look_at_mask(self, module: nn.Module, mask: AskedMask | Tensor | None) -> None:
        """Keep the reach of a layer's mask as an attribute of its module.

        Raises `UnsupportedModel` if transformers' mask interface did not make the mask: what it is
        at other lengths would not be known.
        """
        if not isinstance(mask, AskedMask):
            raise UnsupportedModel("its attention masks are not those of transformers' interface")
        setattr(module, REACH, mask.reach(self.max_tokens))

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
        source = next(
            (i for i, kept in self.kept.items() if _same_memory(kept, (key, value))), None
        )
        if source is None:
            self.kept[layer] = key, value
        shape = LayerShape(key.shape[1], key.shape[2], value.shape[2], source=source)
        self.layers[layer] = ProbedLayer(shape, query.shape[1], scoring)
        return attend_causally(query, key, value, scoring)


def _same_memory(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(
        (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())
        for a, b in zip(one, other, strict=True)
    )


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

    def reach(self, length: int) -> Reach:
        """How far back the queries of a causal mask over `length` tokens see.

        Raises `UnsupportedModel` for a mask that is neither causal nor causal within a sliding
        window or within chunks.
        """
        # The first key is seen by the queries of a window or of a chunk, and then no more.
        near = int(self._seen(torch.arange(length), torch.zeros((), dtype=torch.long)).sum())
        reach = Reach()
        if near < length:
            next_sees_others = near > 1 and bool(self._row(near, near + 1)[near - 1])
            reach = Reach(window=near) if next_sees_others else Reach(chunk=near)
        scoring = Scoring(window=reach.window, chunk=reach.chunk)
        around = {multiple * near + off for multiple in (1, 2) for off in (-1, 0, 1)}
        for query in {0, 1, length // 2, length - 1, *around}:
            if not 0 <= query < length:
                continue
            width = min(query + _AFTER, length)
            wanted = scoring.sees(torch.tensor(query), torch.arange(width))
            if not torch.equal(self._row(query, width), wanted):
                raise UnsupportedModel(
                    "its attention mask is neither causal nor a sliding window or chunks"
                )
        return reach

    def _row(self, query: int, keys: int) -> Tensor:
        return self._seen(torch.tensor(query), torch.arange(keys))

    def _seen(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries see keys: one of them is a number, the other a vector."""
        first = torch.zeros((), dtype=torch.long)
        return self.sees(first, first, queries, keys).expand((queries + keys).shape)


def _asked_mask(*_: Any, mask_function: Any, **__: Any) -> AskedMask:
    return AskedMask(mask_function)


AttentionInterface.register(PROBE, probe_attention)
AttentionMaskInterface.register(PROBE, _asked_mask)

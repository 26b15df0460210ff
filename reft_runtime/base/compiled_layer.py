"""A decoder layer as one compiled function, for the steps and weights that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from reft_runtime.base.attention import AttentionStep, Scoring
from reft_runtime.base.linears import Merged, packed_parts
from reft_runtime.kernels.cpu import Kernels
from reft_runtime.kernels.operators import DecoderLayer, LayerWeights, Norm, PackedLinear


class LayerStep(AttentionStep, Protocol):
    """A step that knows where a compiled layer finds its keys and values.

    Other steps lack the method.
    """

    def whole_layer(
        self, index: int, layer: DecoderLayer, rows: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor | None:
        """The output [T, d] of decoder layer `index` for its input; None where it cannot be."""


class CompiledLayer:
    """Makes the function at the first step that could use it: until then weights may be packed.

    `make` returns it, or None.
    """

    def __init__(self, index: int, make: Callable[[], DecoderLayer | None]) -> None:
        self._index = index
        self._make = make
        self._made: DecoderLayer | None = None
        self._asked = False

    def compute(self, rows: Tensor, cos: Tensor, sin: Tensor, step: object) -> Tensor | None:
        """The layer's output for rows [T, d]; None where its operators have to be called."""
        whole_layer = getattr(step, "whole_layer", None)
        if whole_layer is None:
            return None
        if not self._asked:
            self._made, self._asked = self._make(), True
        if self._made is None:
            return None
        made: Tensor | None = whole_layer(self._index, self._made, rows, cos, sin)
        return made


def layer_of_weights(
    operators: Kernels,
    norms: tuple[Norm, Norm],
    qkv: Merged,
    o: nn.Module,
    gate_up: Merged,
    down: nn.Module,
    heads: tuple[int, int],
    scoring: Scoring,
) -> DecoderLayer | None:
    """The function of a layer with these parts; None unless all its linear layers are packed.

    `heads` are the number of key heads and the width of a head.
    """
    packed = [packed_parts(each) for each in (qkv.product, o, gate_up.product, down)]
    linears = [PackedLinear(*parts) for parts in packed if parts is not None]
    if len(linears) < len(packed):
        return None
    return operators.decoder_layer(
        LayerWeights(
            norms[0],
            linears[0],
            linears[1],
            norms[1],
            linears[2],
            linears[3],
            *heads,
            scoring.of_heads(heads[1]),
        )
    )

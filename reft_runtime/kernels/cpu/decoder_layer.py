"""Whole decoder layers of the Llama family as one call; see `decoder_layer.h`.

A layer takes as long as its products and little more: calls one by one add a third of a millisecond
to each layer on a slow core, and hold Python's lock meanwhile. A call for each layer still takes
40 microseconds of Python, 5 % of a decode step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_runtime.kernels.cpu.low_rank import RowEdits
from reft_runtime.kernels.cpu.product import ProductKernels
from reft_runtime.kernels.cpu.torch_functions import (
    Handles,
    TorchFunctions,
    padded_rows,
    row_blocks,
    torch_functions,
)
from reft_runtime.machine.dtypes import name_of


@dataclass(frozen=True, slots=True)
class HeadScoring:
    """How queries score keys, and which they see: `base.attention.Scoring`, 0 for None.

    `sinks` are float32 [heads], one behind the other.
    """

    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer: a weight [out, in] as `base.linears` keeps it, and a bias [out] if any."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm: its weight [d], and what it adds before it divides."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What a decoder layer is made of.

    Queries, keys and values are the outputs of `qkv`, gate and up those of `gate_up`, in this
    order.
    """

    first_norm: Norm
    qkv: PackedLinear
    o: PackedLinear
    second_norm: Norm
    gate_up: PackedLinear
    down: PackedLinear
    key_heads: int
    head_dim: int
    scoring: HeadScoring


@dataclass(frozen=True, slots=True)
class StepPlaces:
    """Where a step's tokens are kept.

    `single` are those of tokens that come first and attend one by one (`Kernels.attend`), and
    `segments` those of the others (`Kernels.attend_prompts`); `before`, int64 [layers, 2], has for
    each layer the two numbers that they call so.
    """

    single: Tensor
    segments: Tensor
    before: Tensor


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What layers have in common that are computed by one call.

    `takes_segments` says whether tokens may attend together, as those of prompts do.
    """

    dtype: torch.dtype
    width: int
    key_heads: int
    head_dim: int
    takes_segments: bool


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias", "plain", "plain_bias")),
        ("inputs", c_int64),
        ("outputs", c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("torch", TorchFunctions),
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
        ("first_norm", c_void_p),
        ("second_norm", c_void_p),
        ("first_epsilon", c_float),
        ("second_epsilon", c_float),
        *((name, c_int64) for name in ("width", "heads", "key_heads", "dim", "inner")),
        ("window", c_int64),
        ("chunk", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
    )


class _LayerEdits(ctypes.Structure):
    _fields_ = (("edits", c_void_p), ("strengths", c_void_p), ("count", c_int64))


_P, _I = c_void_p, c_int64


class DecoderLayer:
    """One decoder layer, to be computed in a `LayerRun`; it holds the weights that it was made of.

    `function` computes such layers. Layers of one `kind` can be computed by one call.
    """

    def __init__(
        self,
        function: Any,
        weights: LayerWeights,
        functions: TorchFunctions,
        *,
        takes_segments: bool,
    ) -> None:
        self.function, self._weights, self._handles = function, weights, Handles()
        first, second, scoring = weights.first_norm, weights.second_norm, weights.scoring
        width = len(first.weight)
        dim, inner = weights.head_dim, weights.gate_up.weight.shape[0] // 2
        heads = weights.qkv.weight.shape[0] // dim - 2 * weights.key_heads
        self.layer = _Layer(
            functions,
            *(self._linear(getattr(weights, n)) for n in ("qkv", "o", "gate_up", "down")),
            first.weight.data_ptr(),
            second.weight.data_ptr(),
            first.epsilon,
            second.epsilon,
            *(width, heads, weights.key_heads, dim, inner),
            scoring.window,
            scoring.chunk,
            scoring.scale,
            scoring.softcap,
            None if scoring.sinks is None else scoring.sinks.data_ptr(),
        )
        self.kind = LayerKind(first.weight.dtype, width, weights.key_heads, dim, takes_segments)
        self.room: int = width + 2 * (heads + weights.key_heads) * dim + inner
        """Numbers that a step needs for each of its rows."""

    def _linear(self, linear: PackedLinear) -> _Linear:
        weight, bias = linear.weight, linear.bias
        outs, width = weight.shape
        if weight.is_mkldnn:
            held = None if bias is None else self._handles.of(bias)
            return _Linear(self._handles.of(weight), held, None, None, width, outs)
        held = None if bias is None else bias.data_ptr()
        return _Linear(None, None, weight.data_ptr(), held, width, outs)


class LayerRun:
    """Decoder layers of one kind, each computed from what the one before it gave, in one call."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self._layers = layers
        self.kind = layers[0].kind
        assert all(layer.kind == self.kind for layer in layers)
        pointers = [ctypes.pointer(layer.layer) for layer in layers]
        self._pointers = (POINTER(_Layer) * len(layers))(*pointers)
        self._room = max(layer.room for layer in layers)

    def __len__(self) -> int:
        return len(self._layers)

    def room_for(self, tokens: int) -> int:
        """Numbers that a step of so many tokens needs."""
        return padded_rows(tokens) * self._room

    def compute(
        self,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        places: StepPlaces,
        room: Tensor,
        edits: Sequence[RowEdits | None] = (),
    ) -> Tensor | None:
        """The outputs [layers, T, d] for rows [T, d]; None, with nothing but keys and values
        written, if anything went wrong: the layers' operators one by one then tell what.

        `cos` and `sin` are [T, head_dim], `room` has `room_for(T)` numbers; all are contiguous,
        of the weights' dtype. `edits` are those of the outputs, one for each layer or none at all;
        the operator must take them (`LowRankKernels.edits_rows`).
        """
        tokens, width = rows.shape
        kind = self.kind
        if (
            width != kind.width
            or rows.dtype != kind.dtype
            or not cos.numel() == sin.numel() == tokens * kind.head_dim
            or len(places.before) < len(self)
            or room.numel() < self.room_for(tokens)
            or (len(places.segments) and not kind.takes_segments)
            or len(edits) not in (0, len(self))
            or not all(each is None or each.fit(tokens, width) for each in edits)
        ):
            return None
        outs, threads = rows.new_empty((len(self), tokens, width)), torch.get_num_threads()
        status = self._layers[0].function(
            self._pointers,
            len(self),
            rows.data_ptr(),
            outs.data_ptr(),
            tokens,
            padded_rows(tokens),
            row_blocks(tokens, threads),
            cos.data_ptr(),
            sin.data_ptr(),
            places.single.data_ptr(),
            len(places.single),
            places.segments.data_ptr(),
            len(places.segments),
            places.before.data_ptr(),
            _told(edits),
            room.data_ptr(),
            threads,
        )
        return None if status else outs


def _told(edits: Sequence[RowEdits | None]) -> ctypes.Array[_LayerEdits] | None:
    if not any(edits):
        return None
    return (_LayerEdits * len(edits))(
        *(
            _LayerEdits(None, None, 0)
            if each is None
            else _LayerEdits(each.told.data_ptr(), each.strengths.data_ptr(), len(each))
            for each in edits
        )
    )


class LayerKernels(ProductKernels):
    """Makes decoder layers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        pointers = POINTER(POINTER(_Layer))
        self._bind(
            {
                "attend_layers": [
                    pointers,
                    _I,
                    _P,
                    _P,
                    *[_I] * 3,
                    *[_P] * 3,
                    _I,
                    _P,
                    _I,
                    *[_P] * 3,
                    c_int,
                ]
            }
        )

    def decoder_layer(self, weights: LayerWeights) -> DecoderLayer | None:
        """The layer as part of a `LayerRun`; None where the operators do not take its weights."""
        norms = weights.first_norm.weight, weights.second_norm.weight
        linears = weights.qkv, weights.o, weights.gate_up, weights.down
        dtype, width, dim = norms[0].dtype, len(norms[0]), weights.head_dim
        biases = [linear.bias for linear in linears if linear.bias is not None]
        heads, rest = divmod(weights.qkv.weight.shape[0], dim)
        query_heads, sinks = heads - 2 * weights.key_heads, weights.scoring.sinks
        if (
            dtype not in self._dtypes
            or rest
            or query_heads <= 0
            or query_heads % weights.key_heads
            or dim % 2
            or any(len(norm) != width or not norm.is_contiguous() for norm in norms)
            or not all(x.weight.is_mkldnn or self.multiplies(x.weight) for x in linears)
            or not all(bias.is_contiguous() for bias in biases)
            or any(part.dtype != dtype for part in (*norms, *biases, *(x.weight for x in linears)))
            or tuple(weights.o.weight.shape) != (width, query_heads * dim)
            or weights.qkv.weight.shape[1] != width
            or weights.gate_up.weight.shape[1] != width
            or weights.gate_up.weight.shape[0] % 2
            or tuple(weights.down.weight.shape) != (width, weights.gate_up.weight.shape[0] // 2)
            or (sinks is not None and sinks.shape != (query_heads,))
            or not self._library.can_attend(dim, dim)
        ):
            return None
        functions = torch_functions(name_of(dtype))
        if functions is None:
            return None
        return DecoderLayer(
            self._functions["attend_layers", dtype],
            weights,
            functions,
            takes_segments=bool(self._library.can_attend_prompts(dim, dim, False)),
        )

"""A whole decoder layer of the Llama family as one call; see `decoder_layer.h`.

Between two calls of Python a layer takes as long as its products and little more: calls one by one
add a third of a millisecond to each layer on a slow core, and hold Python's lock meanwhile.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    `segments` those of the others (`Kernels.attend_prompts`); `before` is as for these.
    """

    single: Tensor
    segments: Tensor
    before: tuple[int, int]


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


_P, _I = c_void_p, c_int64


class DecoderLayer:
    """One decoder layer; it holds the weights that it was made of."""

    def __init__(
        self,
        function: Any,
        weights: LayerWeights,
        functions: TorchFunctions,
        *,
        takes_segments: bool,
    ) -> None:
        self._function, self._weights, self._handles = function, weights, Handles()
        self._takes_segments = takes_segments
        first, second, scoring = weights.first_norm, weights.second_norm, weights.scoring
        width = len(first.weight)
        dim, inner = weights.head_dim, weights.gate_up.weight.shape[0] // 2
        heads = weights.qkv.weight.shape[0] // dim - 2 * weights.key_heads
        self._layer = _Layer(
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
        self._pointer = ctypes.byref(self._layer)
        self.key_heads, self.head_dim = weights.key_heads, dim
        self._room: int = width + 2 * (heads + weights.key_heads) * dim + inner

    def room_for(self, tokens: int) -> int:
        """Numbers that a step of so many tokens needs."""
        return padded_rows(tokens) * self._room

    def compute(
        self, rows: Tensor, cos: Tensor, sin: Tensor, places: StepPlaces, room: Tensor
    ) -> Tensor | None:
        """The layer's output for rows [T, d]; None, with nothing but keys and values written, if
        anything went wrong: the layer's operators one by one then tell what.

        `cos` and `sin` are [T, head_dim], `room` has `room_for(T)` numbers; all are contiguous,
        of the weights' dtype.
        """
        tokens, width = rows.shape
        if (
            width != self._layer.width
            or rows.dtype != self._weights.first_norm.weight.dtype
            or not cos.numel() == sin.numel() == tokens * self.head_dim
            or room.numel() < self.room_for(tokens)
            or (len(places.segments) and not self._takes_segments)
        ):
            return None
        out, threads = torch.empty_like(rows), torch.get_num_threads()
        status = self._function(
            self._pointer,
            rows.data_ptr(),
            out.data_ptr(),
            tokens,
            padded_rows(tokens),
            row_blocks(tokens, threads),
            cos.data_ptr(),
            sin.data_ptr(),
            places.single.data_ptr(),
            len(places.single),
            places.segments.data_ptr(),
            len(places.segments),
            *places.before,
            room.data_ptr(),
            threads,
        )
        return None if status else out

    def _linear(self, linear: PackedLinear) -> _Linear:
        weight, bias = linear.weight, linear.bias
        outs, width = weight.shape
        if weight.is_mkldnn:
            held = None if bias is None else self._handles.of(bias)
            return _Linear(self._handles.of(weight), held, None, None, width, outs)
        held = None if bias is None else bias.data_ptr()
        return _Linear(None, None, weight.data_ptr(), held, width, outs)


class LayerKernels(ProductKernels):
    """Makes decoder layers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        pointer = POINTER(_Layer)
        self._bind(
            {
                "attend_layer": [
                    pointer,
                    _P,
                    _P,
                    _I,
                    _I,
                    _I,
                    *[_P] * 3,
                    _I,
                    _P,
                    _I,
                    _I,
                    _I,
                    _P,
                    c_int,
                ]
            }
        )

    def decoder_layer(self, weights: LayerWeights) -> DecoderLayer | None:
        """The layer as one function; None where the operators do not take its weights."""
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
            self._functions["attend_layer", dtype],
            weights,
            functions,
            takes_segments=bool(self._library.can_attend_prompts(dim, dim, False)),
        )

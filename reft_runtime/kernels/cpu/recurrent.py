"""The CPU's operators for recurrent layers; see `reft_runtime.kernels.operators.MixerOperators`."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_runtime.kernels.cpu.compiled import CompiledOperators

_P, _I, _F = c_void_p, c_int64, c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "gated_rms_norm": [_P, _P, _P, _P, _I, _I, _F, c_int, c_int],
    "delta_rule": [*[_P] * 7, *[_I] * 9, c_int, c_int],
    "convolve": [*[_P] * 5, *[_I] * 6, c_int, c_int],
    "gated_delta_net": [*[_P] * 9, *[_I] * 9, _F, c_int],
}


@dataclass(frozen=True, slots=True)
class DeltaNetWeights:
    """What a gated delta net has beside its products.

    `convolution` [channels, taps]; `decay_rate` and `time_bias` [value_heads], float32; the weight
    `norm` [value_dim] and the `epsilon` of the gated norm. The channels are those of queries and
    keys, `key_heads` heads each, and of values.
    """

    convolution: Tensor
    decay_rate: Tensor
    time_bias: Tensor
    norm: Tensor
    epsilon: float
    key_heads: int

    @property
    def values(self) -> int:
        """The width of all value heads."""
        return len(self.decay_rate) * len(self.norm)

    @property
    def key_dim(self) -> int:
        """The width of a query or key head."""
        return (len(self.convolution) - self.values) // (2 * self.key_heads)


class RecurrentKernels(CompiledOperators):
    """Operators of recurrent layers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._bind(_ARGUMENTS)
        for name in ("widest_delta_key", "widest_delta_value", "most_taps"):
            getattr(library, name).restype = _I
        self._widest_delta_key: int = library.widest_delta_key()
        self._widest_delta_value: int = library.widest_delta_value()
        self._most_taps: int = library.most_taps()

    def delta_rule_(
        self,
        heads: tuple[Tensor, Tensor, Tensor],
        gate: Tensor,
        beta: Tensor,
        state: Tensor,
        *,
        normalised: bool,
    ) -> Tensor | None:
        """See `MixerOperators.delta_rule_`."""
        query, key, value = heads
        count, tokens, key_heads, key_dim = key.shape
        value_heads, value_dim = value.shape[2:]
        if (
            query.shape != key.shape
            or value.shape[:2] != (count, tokens)
            or value_heads % key_heads
            or not gate.shape == beta.shape == (count, tokens, value_heads)
            or state.shape != (count, value_heads, key_dim, value_dim)
        ):
            shapes = [tuple(tensor.shape) for tensor in (*heads, gate, beta, state)]
            raise ValueError(f"delta_rule: shapes disagree: {shapes}")
        if key_dim > self._widest_delta_key or not state.is_cpu or not state.is_contiguous():
            return None
        if state.dtype != torch.float32 or any(t.requires_grad for t in (gate, beta, state)):
            return None
        packed = [_packed(tensor) for tensor in heads]
        if not self.packs(*packed):
            return None
        gate, beta = gate.float().contiguous(), beta.float().contiguous()
        out = value.new_empty(count, tokens, value_heads, value_dim)
        self._functions["delta_rule", value.dtype](
            *(tensor.data_ptr() for tensor in (*packed, gate, beta, state, out)),
            *(count, tokens, key_heads, value_heads, key_dim, value_dim),
            *(tensor.stride(0) for tensor in packed),
            normalised,
            torch.get_num_threads(),
        )
        return out

    def convolve_(
        self, inputs: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool
    ) -> Tensor | None:
        """See `MixerOperators.convolve_`."""
        count, channels, kept = state.shape
        tokens, taps = inputs.shape[1], weight.shape[-1]
        if (
            inputs.shape != (count, tokens, channels)
            or weight.shape != (channels, taps)
            or kept < taps - 1
        ):
            shapes = [tuple(tensor.shape) for tensor in (inputs, state, weight)]
            raise ValueError(f"convolve: shapes disagree: {shapes}")
        rows = inputs.flatten(0, 1)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        given = rows[:1], state, weight, *(() if bias is None else (bias,))
        if not self.supports(*given) or taps > self._most_taps:
            return None
        out = inputs.new_empty(count, tokens, channels)
        self._functions["convolve", rows.dtype](
            rows.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            state.data_ptr(),
            out.data_ptr(),
            *(count, tokens, channels, rows.stride(0), taps, kept),
            silu,
            torch.get_num_threads(),
        )
        return out

    def gated_rms_norm(
        self, rows: Tensor, gate: Tensor, weight: Tensor, epsilon: float, *, once: bool = False
    ) -> Tensor | None:
        """See `MixerOperators.gated_rms_norm`."""
        width = weight.shape[0]
        if weight.ndim != 1 or rows.shape[-1] != width or gate.shape != rows.shape:
            shapes = tuple(rows.shape), tuple(gate.shape), tuple(weight.shape)
            raise ValueError(f"gated_rms_norm: shapes disagree: {shapes}")
        if not self.supports(rows, gate, weight):
            return None
        out = torch.empty_like(rows)
        self._functions["gated_rms_norm", rows.dtype](
            rows.data_ptr(),
            gate.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows.numel() // width,
            width,
            epsilon,
            once,
            torch.get_num_threads(),
        )
        return out

    def gated_delta_net_(
        self,
        rows: Tensor,
        weights: DeltaNetWeights,
        inputs: Tensor,
        state: Tensor,
        out: Tensor,
    ) -> None:
        """See `MixerOperators.gated_delta_net_`."""
        count, value_heads, key_dim, value_dim = state.shape
        channels, taps = weights.convolution.shape
        kept, width = inputs.shape[2], channels + weights.values + 2 * value_heads
        tokens = len(rows) // max(1, count)
        small = weights.decay_rate, weights.time_bias
        if (
            rows.shape != (count * tokens, width)
            or inputs.shape != (count, channels, kept)
            or not taps - 1 <= kept
            or any(tensor.shape != (value_heads,) for tensor in small)
            or weights.norm.shape != (value_dim,)
            or value_heads % weights.key_heads
            or channels != 2 * weights.key_heads * key_dim + weights.values
            or out.shape != (count * tokens, weights.values)
        ):
            shapes = [tuple(tensor.shape) for tensor in (rows, inputs, state, out, *small)]
            raise ValueError(f"gated_delta_net: shapes disagree: {shapes}")
        if (
            not self.supports(rows, weights.convolution, inputs, weights.norm, out)
            or not self.supports(state, *small)
            or state.dtype != torch.float32
            or key_dim > self._widest_delta_key
            or value_dim > self._widest_delta_value
            or taps > self._most_taps
        ):
            raise ValueError("gated_delta_net: it does not take tensors of this kind or size")
        mixed = rows.new_empty(len(rows), channels)
        self._functions["gated_delta_net", rows.dtype](
            rows.data_ptr(),
            weights.convolution.data_ptr(),
            weights.decay_rate.data_ptr(),
            weights.time_bias.data_ptr(),
            weights.norm.data_ptr(),
            inputs.data_ptr(),
            state.data_ptr(),
            mixed.data_ptr(),
            out.data_ptr(),
            *(count, tokens, width, taps, kept),
            *(weights.key_heads, key_dim, value_heads, value_dim),
            weights.epsilon,
            torch.get_num_threads(),
        )


def _packed(heads: Tensor) -> Tensor:
    """Heads [n, T, heads, dim] as [n * T, heads, dim], those of a token side by side."""
    rows = heads.flatten(0, 1)
    _, between, within = rows.stride()
    return rows if within == 1 and between == rows.shape[2] else rows.contiguous()

"""Fused operators for a CPU, compiled at first use; None where there is no compiler.

Arguments are contiguous CPU tensors of one dtype, float32 or bfloat16, as `supports` says (heads:
as `packs` says). Shapes that disagree raise ValueError: a kernel would write out of bounds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from reft_runtime.kernels.cpu.build import load_library
from reft_runtime.kernels.cpu.picking import Picking, Picks, pick
from reft_runtime.machine.dtypes import DTYPES, name_of

_NO_MEMORY = 2
"""Status of an operator that could not allocate; 0 is success, 1 a token beyond its row or step."""

_P, _I, _F = c_void_p, c_int64, c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "rms_norm": [_P, _P, _P, _I, _I, _F, c_int, c_int],
    "gated_rms_norm": [_P, _P, _P, _P, _I, _I, _F, c_int],
    "add_rms_norm": [_P, _P, _P, _P, _P, _I, _I, _F, c_int],
    "silu_mul": [_P, _P, _I, _I, c_int],
    "pick": [*[_P] * 5, _I, _P, _I, _I, c_int],
    "rotate": [*[_P] * 4, *[_I] * 6, c_int],
    "delta_rule": [*[_P] * 7, *[_I] * 9, c_int, c_int],
    "convolve": [*[_P] * 5, *[_I] * 5, c_int, c_int],
    "attend": [*[_P] * 5, *[_I] * 13, _F, _F, _P, c_int],
    "attend_prompts": [*[_P] * 5, *[_I] * 13, _F, _F, _P, c_int],
}


@dataclass(slots=True)
class HeadScoring:
    """How queries score keys, and which they see: `base.attention.Scoring`, 0 for None.

    `sinks` are float32 [heads], one behind the other.
    """

    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None


class Kernels:
    """The operators, by dtype; see `reft_runtime.kernels.operators.Operators`.

    The library tells which dtypes and heads they take.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        self._dtypes = {
            dtype for name, dtype in DTYPES.items() if hasattr(library, f"rms_norm_{name}")
        }
        for operator, arguments in _ARGUMENTS.items():
            for dtype in self._dtypes:
                function = getattr(library, f"{operator}_{name_of(dtype)}")
                function.argtypes = arguments
                function.restype = c_int if operator.startswith("attend") else None
                self._functions[operator, dtype] = function
        library.can_attend.argtypes = [_I, _I]
        library.can_attend_prompts.argtypes = [_I, _I, c_int]
        self._can_attend: Callable[[int, int], int] = cache(library.can_attend)
        library.picking_room.argtypes = [_I]
        library.picking_room.restype = _I
        self._picking_room: Callable[[int], int] = library.picking_room
        library.widest_delta_key.restype = _I
        self._widest_delta_key: int = library.widest_delta_key()
        library.most_taps.restype = _I
        self._most_taps: int = library.most_taps()
        self._can_attend_prompts: Callable[[int, int, bool], int] = cache(
            library.can_attend_prompts
        )
        library.instructions.restype = c_char_p
        self.name = f"C++ kernels ({library.instructions().decode()})"

    def supports(self, *tensors: Tensor) -> bool:
        """See `Operators.supports`; the tensors must be on a CPU."""
        dtype = tensors[0].dtype
        for tensor in tensors:
            if tensor.dtype != dtype or not tensor.is_contiguous():
                return False
            if tensor.requires_grad or not tensor.is_cpu:
                return False
        return dtype in self._dtypes

    def packs(self, *heads: Tensor) -> bool:
        """See `Operators.packs`; the tensors must be on a CPU."""
        dtype = heads[0].dtype
        for tensor in heads:
            _, between, within = tensor.stride()
            if within != 1 or between != tensor.shape[2]:
                return False
            if tensor.dtype != dtype or tensor.requires_grad or not tensor.is_cpu:
                return False
        return dtype in self._dtypes

    def attends(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether `attend` takes these heads [T, heads, dim], once the heads of a token are packed.

        That is, once they lie side by side as `packs` says.
        """
        dtype = query.dtype
        for heads in (query, key, value):
            if heads.dtype != dtype or heads.requires_grad or not heads.is_cpu:
                return False
        return dtype in self._dtypes and bool(self._can_attend(key.shape[2], value.shape[2]))

    def attends_prompts(self, key: Tensor, value: Tensor, *, values_in_keys: bool = False) -> bool:
        """Whether `attend_prompts` takes heads that `attend` does; for the values, see there."""
        return bool(self._can_attend_prompts(key.shape[2], value.shape[2], values_in_keys))

    def rms_norm(
        self, rows: Tensor, weight: Tensor, epsilon: float, *, from_one: bool = False
    ) -> Tensor:
        """See `Operators.rms_norm`."""
        width = weight.shape[0]
        if weight.ndim != 1 or rows.shape[-1] != width or weight.dtype != rows.dtype:
            raise ValueError(f"rms_norm: {tuple(weight.shape)} for rows {tuple(rows.shape)}")
        out = torch.empty_like(rows)
        self._functions["rms_norm", rows.dtype](
            rows.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows.numel() // width,
            width,
            epsilon,
            from_one,
            torch.get_num_threads(),
        )
        return out

    def gated_rms_norm(
        self, rows: Tensor, gate: Tensor, weight: Tensor, epsilon: float
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
            torch.get_num_threads(),
        )
        return out

    def add_rms_norm(
        self, rows: Tensor, more: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """The sum of two tensors [..., d], and `rms_norm` of it."""
        width = weight.shape[0]
        if (
            weight.ndim != 1
            or rows.shape[-1] != width
            or more.shape != rows.shape
            or not weight.dtype == more.dtype == rows.dtype
        ):
            shapes = tuple(rows.shape), tuple(more.shape), tuple(weight.shape)
            raise ValueError(f"add_rms_norm: shapes disagree: {shapes}")
        total, out = torch.empty_like(rows), torch.empty_like(rows)
        self._functions["add_rms_norm", rows.dtype](
            rows.data_ptr(),
            more.data_ptr(),
            weight.data_ptr(),
            total.data_ptr(),
            out.data_ptr(),
            rows.numel() // width,
            width,
            epsilon,
            torch.get_num_threads(),
        )
        return total, out

    def silu_mul(self, both: Tensor) -> Tensor:
        """silu(gate) * up [..., d] of rows [..., 2 d] that hold gate and up side by side."""
        width, odd = divmod(both.shape[-1], 2)
        if odd:
            raise ValueError(f"silu_mul: gate and up in {tuple(both.shape)}")
        out = both.new_empty(*both.shape[:-1], width)
        self._functions["silu_mul", both.dtype](
            both.data_ptr(),
            out.data_ptr(),
            both.numel() // (2 * width),
            width,
            torch.get_num_threads(),
        )
        return out

    def pick(self, logits: Tensor, rows: Sequence[Picking]) -> Picks:
        """Pick a token for each row of logits [rows, vocabulary], which are left as they are."""
        (count, width), threads = logits.shape, torch.get_num_threads()
        places = threads if count >= threads else 1  # else the threads share each row
        room = torch.empty(places * self._picking_room(width), dtype=torch.uint8)
        call = partial(self._functions["pick", logits.dtype], logits.data_ptr())
        return pick(call, rows, count, width, room, threads)

    def rotate_(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotary positions in place: heads [T, heads, dim], `cos` and `sin` [T, dim].

        The halves of a head are rotated against each other (`rotate_half` in transformers).
        Heads of a token must lie side by side, as `packs` says.
        """
        tokens, _, dim = query.shape
        if (
            key.shape[::2] != (tokens, dim)
            or cos.shape[-2:] != (tokens, dim)
            or cos.numel() != tokens * dim
            or sin.shape != cos.shape
            or dim % 2
            or not query.dtype == key.dtype == cos.dtype == sin.dtype
        ):
            shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in (query, key, cos, sin)]
            raise ValueError(f"rotate: shapes disagree: {shapes}")
        self._functions["rotate", query.dtype](
            query.data_ptr(),
            key.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            query.shape[0],
            query.shape[1],
            key.shape[1],
            query.shape[2],
            query.stride(0),
            key.stride(0),
            torch.get_num_threads(),
        )

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
        inputs = inputs.contiguous()
        if not self.supports(inputs, state, weight, *(() if bias is None else (bias,))):
            return None
        if taps > self._most_taps:
            return None
        out = torch.empty_like(inputs)
        self._functions["convolve", inputs.dtype](
            inputs.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            state.data_ptr(),
            out.data_ptr(),
            *(count, tokens, channels, taps, kept),
            silu,
            torch.get_num_threads(),
        )
        return out

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        places: Tensor,
        before: tuple[int, int],
        scoring: HeadScoring,
    ) -> None:
        """Store keys and values [T, kv_heads, dim], attend with queries [T, heads, dim] into `out`.

        `places` int64 [T, 3] holds for each token the address of its KV row, the row's capacity,
        and the token's position in it. A KV row holds keys and values of all layers, each
        [kv_heads, capacity, dim]; `before` is how many numbers of a token come before the layer's
        keys, and before its values. If these are equal, the values are the first numbers of the
        keys, and are not stored again. All tokens are stored before any attends. Raises ValueError,
        and writes nothing, if shapes disagree or a position is beyond its row.
        """
        if len(places) != len(query):
            raise ValueError(f"attend: {len(places)} places for {len(query)} tokens")
        self._attend("attend", query, key, value, out, places, 3, before, scoring)

    def attend_prompts(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        places: Tensor,
        before: tuple[int, int],
        scoring: HeadScoring,
    ) -> None:
        """Like `attend` for consecutive tokens of prompts: many tokens go over the keys together.

        `places` int64 [count, 5] holds for each run of tokens the address of the KV row, its
        capacity, the first token, the position of that in the KV row, and the number of tokens.
        Raises `MemoryError` if memory runs out, and then writes nothing.
        """
        self._attend("attend_prompts", query, key, value, out, places, 5, before, scoring)

    def _attend(
        self,
        operator: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        places: Tensor,
        columns: int,
        before: tuple[int, int],
        scoring: HeadScoring,
    ) -> None:
        tokens, heads, dim = query.shape
        key_heads, width = key.shape[1], value.shape[2]
        sinks = scoring.sinks
        if (
            key.shape != (tokens, key_heads, dim)
            or value.shape != (tokens, key_heads, width)
            or out.shape != (tokens, heads, width)
            or not out.is_contiguous()
            or heads % key_heads
            or (before[0] == before[1] and width > dim)
            or places.shape[1:] != (columns,)
            or places.dtype != torch.int64
            or not places.is_contiguous()
        ):
            shapes = [tuple(tensor.shape) for tensor in (query, key, value, out, places)]
            raise ValueError(f"{operator}: shapes disagree: {shapes}")
        if sinks is not None and (sinks.shape != (heads,) or sinks.dtype != torch.float32):
            raise ValueError(f"{operator}: sinks {tuple(sinks.shape)} for {heads} heads")
        status = self._functions[operator, query.dtype](
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            places.data_ptr(),
            len(places),
            tokens,
            *before,
            key_heads,
            heads // key_heads,
            dim,
            width,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            scoring.window,
            scoring.chunk,
            scoring.scale,
            scoring.softcap,
            None if sinks is None else sinks.data_ptr(),
            torch.get_num_threads(),
        )
        if status == _NO_MEMORY:
            raise MemoryError(f"{operator}: out of memory")
        if status:
            raise ValueError(f"{operator}: a token is beyond its row or the step")


def _packed(heads: Tensor) -> Tensor:
    """Heads [n, T, heads, dim] as [n * T, heads, dim], those of a token side by side."""
    rows = heads.flatten(0, 1)
    _, between, within = rows.stride()
    return rows if within == 1 and between == rows.shape[2] else rows.contiguous()


@cache
def kernels() -> Kernels | None:
    """The compiled operators; None without a compiler. The first call may take some seconds."""
    library = load_library()
    return None if library is None else Kernels(library)

"""Fused operators for a CPU, compiled at first use; None where there is no compiler.

Arguments are contiguous CPU tensors of one dtype, float32 or bfloat16, as `supports` says (heads:
as `rotates` says). Shapes that disagree raise ValueError: a kernel would write out of bounds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from reft_runtime.kernels.cpu.build import load_library
from reft_runtime.kernels.cpu.decoder_layer import HeadScoring as HeadScoring
from reft_runtime.kernels.cpu.decoder_layer import LayerKernels
from reft_runtime.kernels.cpu.low_rank import LowRankKernels
from reft_runtime.kernels.cpu.low_rank import RowEdit as RowEdit
from reft_runtime.kernels.cpu.low_rank import RowEdits as RowEdits
from reft_runtime.kernels.cpu.picking import Picking, Picks, pick
from reft_runtime.kernels.cpu.recurrent import DeltaNetWeights as DeltaNetWeights
from reft_runtime.kernels.cpu.recurrent import RecurrentKernels
from reft_runtime.kernels.norms import NormForm

_NO_MEMORY = 2
"""Status of an operator that could not allocate; 0 is success, 1 a token beyond its row or step."""

_P, _I, _F = c_void_p, c_int64, c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "rms_norm": [_P, _P, _P, _I, _I, _F, c_int, c_int, c_int],
    "add_rms_norm": [_P, _P, _P, _P, _P, _I, _I, _F, c_int],
    "silu_mul": [_P, _P, _I, _I, c_int],
    "pick": [*[_P] * 5, _I, _P, _I, _I, c_int],
    "rotate": [*[_P] * 4, *[_I] * 8, c_int],
    "attend": [*[_P] * 5, *[_I] * 13, _F, _F, _P, c_int],
    "attend_prompts": [*[_P] * 5, *[_I] * 13, _F, _F, _P, c_int],
}


class Kernels(RecurrentKernels, LowRankKernels, LayerKernels):
    """The operators, by dtype; see `reft_runtime.kernels.operators.Operators`.

    The library tells which dtypes and heads they take.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(library)
        self._bind(_ARGUMENTS)
        library.can_attend.argtypes = [_I, _I]
        library.can_attend_prompts.argtypes = [_I, _I, c_int]
        self._can_attend: Callable[[int, int], int] = cache(library.can_attend)
        library.picking_room.argtypes = [_I]
        library.picking_room.restype = _I
        self._picking_room: Callable[[int], int] = library.picking_room
        self._can_attend_prompts: Callable[[int, int, bool], int] = cache(
            library.can_attend_prompts
        )
        library.instructions.restype = c_char_p
        self.name = f"C++ kernels ({library.instructions().decode()})"

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
        self,
        rows: Tensor,
        weight: Tensor,
        epsilon: float,
        form: NormForm = NormForm.LLAMA,
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
            form is NormForm.OLMO2,
            form is NormForm.GEMMA,
            torch.get_num_threads(),
        )
        return out

    def add_rms_norm(
        self, rows: Tensor, more: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """See `Operators.add_rms_norm`."""
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
        """See `Operators.rotate_`."""
        tokens, _, width = query.shape
        if (
            key.shape[::2] != (tokens, width)
            or cos.shape[-2:] != (tokens, width)
            or cos.numel() != tokens * width
            or sin.shape != cos.shape
            or width % 2
            or not query.dtype == key.dtype == cos.dtype == sin.dtype
        ):
            shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in (query, key, cos, sin)]
            raise ValueError(f"rotate: shapes disagree: {shapes}")
        self._functions["rotate", query.dtype](
            query.data_ptr(),
            key.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            tokens,
            query.shape[1],
            key.shape[1],
            width,
            *query.stride()[:2],
            *key.stride()[:2],
            torch.get_num_threads(),
        )

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


@cache
def kernels() -> Kernels | None:
    """The compiled operators; None without a compiler. The first call may take some seconds."""
    library = load_library()
    return None if library is None else Kernels(library)

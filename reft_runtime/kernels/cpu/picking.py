"""The settings by which the compiled operator picks tokens, and what it returns."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_LAYOUT = struct.Struct("7d10q")
"""`Picking` of sampling.h."""

_NONE = -1
_OUTSIDE = -2
"""In the place of a token: an edited or scored token lies outside the row."""


class Picking(NamedTuple):
    """How one row's token is picked.

    `temperature` 0 takes the best. `top_k` 0 keeps all tokens, as `top_p` 1 and `min_p` 0 do.
    `point` in [0, 1) is where the cumulated weights are cut. `allowed` has a bit for each token
    that is allowed, int32 [words], lowest bit first. `added` are token ids ("q") and what is added
    to their scores ("d"). `seen` are the ids ("q") that penalties apply to, each once, and how
    often the answer has each ("q"). `logprobs` is the number of best tokens whose
    log-probabilities are wanted, beside that of the picked token, or of `scored`.
    """

    temperature: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    point: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    allowed: Tensor | None = None
    added: tuple[array[int], array[float]] | None = None
    seen: tuple[array[int], array[int]] | None = None
    logprobs: int | None = None
    scored: int | None = None


class Picks(NamedTuple):
    """The picked tokens, -1 for a row that holds NaN or +inf or in which nothing is left.

    `logprobs` are for each row the log-probabilities of its token and of the best tokens, whose
    ids are `ids`; as many as the row with the most has, only a row's own are meant.
    """

    tokens: list[int]
    logprobs: list[list[float]]
    ids: list[list[int]]


def pick(
    call: Callable[..., None],
    rows: Sequence[Picking],
    count: int,
    width: int,
    room: Tensor,
    threads: int,
) -> Picks:
    """Call the operator for `count` rows of `width` logits; `room` is what its threads write."""
    if len(rows) != count:
        raise ValueError(f"pick: {len(rows)} settings for {count} rows")
    told = b"".join([_packed(row, width) for row in rows])
    asked = [row.logprobs for row in rows if row.logprobs is not None]
    most = max(asked, default=0)
    tokens = torch.empty(count, dtype=torch.long)
    values = torch.empty(count if asked else 0, 1 + most)
    ids = torch.empty(count if asked else 0, most, dtype=torch.long)
    addresses = (tensor.data_ptr() for tensor in (tokens, values, ids))
    call(told, *addresses, most, room.data_ptr(), count, width, threads)
    found: list[int] = tokens.tolist()
    if _OUTSIDE in found:
        raise ValueError(f"pick: a token lies outside the {width} tokens of row {found}")
    return Picks(found, values.tolist(), ids.tolist())


def _packed(row: Picking, width: int) -> bytes:
    allowed, added, seen = row.allowed, row.added, row.seen
    if allowed is not None and (
        allowed.ndim != 1
        or allowed.dtype != torch.int32
        or 32 * len(allowed) < width
        or not allowed.is_contiguous()
    ):
        raise ValueError(f"pick: {allowed.dtype} words {tuple(allowed.shape)} for {width} tokens")
    return _LAYOUT.pack(
        row.temperature,
        row.min_p,
        row.top_p,
        row.point,
        row.repetition,
        row.presence,
        row.frequency,
        row.top_k,
        _NONE if row.logprobs is None else row.logprobs,
        _NONE if row.scored is None else row.scored,
        0 if allowed is None else allowed.data_ptr(),
        *((0, 0, 0) if added is None else (*_addresses(*added), len(added[0]))),
        *((0, 0, 0) if seen is None else (*_addresses(*seen), len(seen[0]))),
    )


def _addresses(ids: array[int], numbers: array[int] | array[float]) -> tuple[int, int]:
    if ids.typecode != "q" or numbers.typecode not in "qd" or len(ids) != len(numbers):
        raise ValueError(f"pick: {len(ids)} ids {ids.typecode}, {len(numbers)} numbers")
    return ids.buffer_info()[0], numbers.buffer_info()[0]

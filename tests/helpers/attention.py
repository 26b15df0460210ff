"""Attention written out in float64, one query at a time: what every backend is compared with."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from reft_runtime.base.attention import Scoring

HEADS = 6
"""Query heads for which `SINKS` are."""

SINKS = torch.tensor([0.0, 4.0, -3.0, 1.5, -0.5, 30.0])

SCORINGS = [
    Scoring(0.3, window, chunk, softcap, sinks)
    for window, chunk, softcap, sinks in product(
        (None, 5, 70), (None, 6, 65), (None, 1.5), (None, SINKS)
    )
]
"""Every combination, with windows and chunks shorter and longer than a block of keys."""


def described(scoring: Scoring) -> str:
    """A name for a test's parameter."""
    sinks = "" if scoring.sinks is None else "-sinks"
    return f"window{scoring.window}-chunk{scoring.chunk}-cap{scoring.softcap}{sinks}"


def attention(query: Tensor, keys: Tensor, values: Tensor, start: int, scoring: Scoring) -> Tensor:
    """Attention of queries [n, heads, dim] at positions from `start` on, in float64.

    `keys` and `values` are [length, kv_heads, dim] of positions from 0 on.
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (each.double().repeat_interleave(group, 1) for each in (keys, values))
    rows = []
    for at, own in enumerate(query.double(), start):
        seen = [
            k
            for k in range(at + 1)
            if (scoring.window is None or at - k < scoring.window)
            and (scoring.chunk is None or at // scoring.chunk == k // scoring.chunk)
        ]
        scores = torch.einsum("hd,khd->hk", own, keys[seen]) * scoring.scale(query.shape[2])
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        weights = scores.exp()
        total = weights.sum(1)
        if scoring.sinks is not None:
            total = total + scoring.sinks.double().exp()
        rows.append(torch.einsum("hk,khd->hd", weights / total[:, None], values[seen]))
    return torch.stack(rows)

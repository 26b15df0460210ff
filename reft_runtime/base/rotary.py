"""Replaces a model's rotary function by a fused operator if it rotates halves of heads."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from reft_runtime.base.trial import ROWS, Operator, angles, random_rows
from reft_runtime.kernels.operators import Operators

ROTARY = "apply_rotary_pos_emb"
"""The name of the rotary function in models' code."""


def rotates(module: nn.Module) -> bool:
    """Whether a module's own code calls a rotary function."""
    own = type(module).forward
    return isinstance(own, FunctionType) and ROTARY in own.__code__.co_names


def rotating(rotary: Operator, operators: Operators, device: torch.device) -> Operator | None:
    """A function that does what `rotary` does, in place; None if it does not give the same."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # In the layout that a linear layer gives, [1, T, heads, dim], no other code shares them.
        query, key = q.transpose(1, 2)[0], k.transpose(1, 2)[0]
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1] and len(q) == len(cos) == 1
        if (
            args
            or kwargs
            or not whole
            or not operators.packs(query, key)
            or not operators.supports(cos, sin)
            or cos.dtype != q.dtype  # what a model computes in a wider dtype stays its own
        ):
            rotated: tuple[Tensor, Tensor] = rotary(q, k, cos, sin, *args, **kwargs)
            return rotated
        operators.rotate_(query, key, cos, sin)
        return q, k

    like = torch.empty(0, device=device)
    heads = [random_rows(n * 8, like).view(1, ROWS, n, 8).transpose(1, 2) for n in (2, 1)]
    try:
        wanted = rotary(*heads, *angles(8, like))
        given = rotate(*heads, *angles(8, like))
        same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, given, strict=True))
    except Exception:
        return None  # it takes other arguments, so it is not a function that can be replaced
    return rotate if same else None

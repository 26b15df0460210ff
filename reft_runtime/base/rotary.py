"""Replaces a model's rotary function by a fused operator if it rotates halves of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reft_runtime.base.rebinding import code_of
from reft_runtime.base.trial import ROWS, Operator, angles, random_rows
from reft_runtime.kernels.operators import Operators

ROTARY = "apply_rotary_pos_emb"
"""The name of the rotary function in models' code."""


def rotates(module: nn.Module) -> bool:
    """Whether a module's own code calls a rotary function."""
    own = code_of(type(module).forward)
    return own is not None and ROTARY in own.__code__.co_names


def rotary_width(model: nn.Module, head: int) -> int:
    """How many numbers of a head `head` wide a model rotates: all, unless its angles are fewer."""
    widths = {2 * len(b) for name, b in model.named_buffers() if name.endswith("inv_freq")}
    return min(widths.pop(), head) if len(widths) == 1 else head


def rotating(rotary: Operator, operators: Operators, device: torch.device) -> Operator | None:
    """A function that does what `rotary` does, in place; None if it does not give the same.

    It takes heads wider than the angles if `rotary` leaves the numbers behind them as they are.
    """
    like = torch.empty(0, device=device)

    def same(rotate: Operator, head: int) -> bool:
        heads = [random_rows(n * head, like).view(1, ROWS, n, head).transpose(1, 2) for n in (2, 1)]
        try:
            wanted = rotary(*heads, *angles(8, like))
            given = rotate(*heads, *angles(8, like))
            return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, given, strict=True))
        except Exception:
            return False  # it takes other arguments, so it is not a function that can be replaced

    whole = _rotate(rotary, operators, parts=False)
    if not same(whole, 8):
        return None
    first = _rotate(rotary, operators, parts=True)
    return first if same(first, 16) else whole


def _rotate(rotary: Operator, operators: Operators, *, parts: bool) -> Operator:
    """A function that rotates whole heads, and with `parts` also the first numbers of heads."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        width, head = cos.shape[-1], q.shape[-1]
        fits = head == k.shape[-1] and (width == head or (parts and width < head))
        if not args and not kwargs and fits and len(q) == len(cos) == 1:
            # In a linear layer's layout, [1, T, heads, dim], no other code shares them.
            query, key = (heads.transpose(1, 2)[0, ..., :width] for heads in (q, k))
            # What a model computes in a wider dtype stays its own.
            known = cos.dtype == q.dtype and operators.supports(cos, sin)
            if known and operators.rotates(query, key):
                operators.rotate_(query, key, cos, sin)
                return q, k
        rotated: tuple[Tensor, Tensor] = rotary(q, k, cos, sin, *args, **kwargs)
        return rotated

    return rotate

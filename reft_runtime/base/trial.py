"""Whether a module's replacement gives what the module gives: tried before it is used.

Twice: on a float32 copy, where a formula that is not the same shows, however small what it leaves
out; and on the module itself, where dtypes meet that do not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reft_runtime.base.attention import CausalStep

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Relative distance by dtype. In float32 it tells formulas apart; in bfloat16, whose rounding can
be large where attention is sharp, dtypes that do not fit, which give another order of magnitude."""

ROWS = 3

SHORTEST = 2**-10
"""To how much of their length rows are shortened, where a layer adds little to them."""

SMALL = 64
"""Numbers of a tensor up to which it is taken for a setting of a formula."""

Operator = Callable[..., Any]


class Planned(Protocol):
    """What is to take a module's place."""

    @property
    def forward(self) -> Operator:
        """Its forward."""

    @property
    def width(self) -> int:
        """Width of the rows that it takes."""


class Trials:
    """Tries replacements; a formula that held for one module holds for those that are alike.

    `head` is the width of an attention's heads, whose modules also take rotary positions and a
    step. What `adds` to its rows is judged by what it adds.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, bool] = {}

    def holds(
        self,
        module: nn.Module,
        build: Callable[[Any], Planned | None],
        kind: Hashable,
        head: int | None = None,
        *,
        adds: bool = False,
    ) -> bool:
        """Whether what `build` makes of a float32 copy gives what the copy gives.

        `kind` is what is built, and for what.
        """
        formula = kind, _formula(module)
        if formula not in self._held:
            plain = copy.deepcopy(module).float()
            plan = build(plain)
            self._held[formula] = plan is not None and self.same(
                plain, plan.forward, plan.width, head, adds=adds
            )
        return self._held[formula]

    def same(
        self,
        module: nn.Module,
        other: Operator,
        width: int,
        head: int | None = None,
        *,
        adds: bool = False,
    ) -> bool:
        """Whether `other` gives what the module gives, of random rows [1, ROWS, width]."""
        weight = next(module.parameters())
        like = torch.empty(0, dtype=weight.dtype, device=weight.device)  # weights may be packed
        given: dict[str, Any] = {}
        if head is not None:
            given = {
                "position_embeddings": angles(head, like),
                "attention_mask": None,
                "step": CausalStep(),
            }

        def changes(function: Operator, rows: Tensor) -> Tensor:
            made = function(rows.clone(), **given)
            out: Tensor = made[0] if isinstance(made, tuple) else made
            return out.float() - rows.float() if adds else out.float()

        rows = random_rows(width, like)
        try:
            if adds:
                # Rows far longer than what is added would drown it, and round it away. Norms come
                # before all else, so that shorter rows get the same added.
                share = changes(module.forward, rows).norm() / rows.float().norm()
                rows = rows * float(share.clamp(SHORTEST, 1))
            wanted = changes(module.forward, rows)
            found = changes(other, rows)
        except Exception:
            return False  # it wants other arguments: it is none of those that are replaced
        return bool((found - wanted).norm() <= TOLERANCE[like.dtype] * wanted.norm())


def _formula(module: nn.Module) -> Hashable:
    """What two modules have in common that compute the same, of other weights."""
    return tuple(
        (
            name,
            type(part),
            tuple(
                (key, _told(value))
                for key, value in sorted({**vars(part), **part._buffers}.items())
                if isinstance(value, int | float | str | tuple | list | Tensor | None)
                and key not in ("layer_idx",)
            ),
            tuple(
                (key, weight.shape, weight.dtype)
                for key, weight in part._parameters.items()
                if weight is not None
            ),
        )
        for name, part in module.named_modules()
    )


def _told(value: Any) -> Hashable:
    """A module's attribute, to be compared with another's; a large tensor's shape stands for it."""
    if isinstance(value, Tensor):
        return tuple(value.shape), repr(value.tolist()) if value.numel() <= SMALL else ""
    return repr(value) if isinstance(value, tuple | list) else value


def random_rows(width: int, like: Tensor) -> Tensor:
    """The same numbers [1, ROWS, width] on any device, on the device and in the dtype of `like`."""
    return torch.randn(1, ROWS, width, generator=torch.Generator().manual_seed(0)).to(like)


def angles(width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines [1, ROWS, width], in the dtype of `like`."""
    found = random_rows(width // 2, like.float()).repeat(1, 1, 2)
    return found.cos().to(like.dtype), found.sin().to(like.dtype)

"""Tests whether a module's replacement gives what the module gives, before it is used.

There are two tests. One is on a float32 copy, which shows a formula that is not the same, however
small the part that it leaves out. The other is on the module itself, which shows dtypes that do not
fit together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reft_runtime.base.attention import running
from reft_runtime.base.probe import CausalStep

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
"""Largest relative distance, by dtype. In float32 it tells formulas apart. In bfloat16, whose
rounding can be large where attention is sharp, it finds dtypes that do not fit: these give another
order of magnitude."""

ROWS = 3

SHORTEST = 2**-10
"""Smallest factor by which rows are shortened if a layer adds little to them."""

SMALL = 64
"""Tensors of up to this many numbers are taken for settings of a formula."""

Operator = Callable[..., Any]


def near(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results of a formula are the same but for rounding in their dtype.

    That is not known of a dtype without a tolerance.
    """
    tolerance = TOLERANCE.get(wanted.dtype, -1.0)
    found, wanted = found.float(), wanted.float()
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


def nearer(wanted: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether `other` is nearer to a result than `one`."""
    return bool((other.float() - wanted).norm() < (one.float() - wanted).norm())


class Planned(Protocol):
    """The replacement of a module."""

    @property
    def forward(self) -> Operator:
        """The function that replaces the module's forward."""

    @property
    def width(self) -> int:
        """Width of the rows that it takes."""


class Trials:
    """Tests replacements; a formula that held for one module holds for modules like it.

    `head` is the width of an attention's heads; modules with heads also take rotary positions and a
    step. With `adds`, the module adds to its rows, and only what it adds is compared.
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
        """Whether what `build` makes of a float32 copy of the module gives what the copy gives.

        `kind` is what is built, and for what; results are remembered by it and by the formula.
        """
        key = kind, formula(module)
        if key not in self._held:
            plain = copy.deepcopy(module).float()
            plan = build(plain)
            self._held[key] = plan is not None and self.same(
                plain, plan.forward, plan.width, head, adds=adds
            )
        return self._held[key]

    def same(
        self,
        module: nn.Module,
        other: Operator,
        width: int,
        head: int | None = None,
        *,
        adds: bool = False,
    ) -> bool:
        """Whether `other` gives what the module gives for random rows [1, ROWS, width]."""
        weight = next(module.parameters())
        like = torch.empty(0, dtype=weight.dtype, device=weight.device)  # weights may be packed
        given: dict[str, Any] = {}
        if head is not None:
            given = {
                "position_embeddings": angles(head, like),
                "attention_mask": None,
            }

        def changes(function: Operator, rows: Tensor) -> Tensor:
            with running(CausalStep()):
                made = function(rows.clone(), **given)
            out: Tensor = made[0] if isinstance(made, tuple) else made
            return out.float() - rows.float() if adds else out.float()

        rows = random_rows(width, like)
        try:
            if adds:
                # If rows are far longer than what is added, rounding hides it. Norms come
                # before all else, so that the same is added to shorter rows.
                share = changes(module.forward, rows).norm() / rows.float().norm()
                rows = rows * float(share.clamp(SHORTEST, 1))
            wanted = changes(module.forward, rows)
            found = changes(other, rows)
        except Exception:
            return False  # it wants other arguments, so it is not a module that can be replaced
        return bool((found - wanted).norm() <= TOLERANCE[like.dtype] * wanted.norm())


def formula(module: nn.Module) -> Hashable:
    """A key that is equal for two modules that compute the same formula with other weights."""
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
    """A module's attribute as a comparable value; only the shape counts for a large tensor."""
    if isinstance(value, Tensor):
        return tuple(value.shape), repr(value.tolist()) if value.numel() <= SMALL else ""
    return repr(value) if isinstance(value, tuple | list) else value


def random_rows(width: int, like: Tensor) -> Tensor:
    """Random rows [1, ROWS, width], equal on every device, in the device and dtype of `like`."""
    return torch.randn(1, ROWS, width, generator=torch.Generator().manual_seed(0)).to(like)


def angles(width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines [1, ROWS, width], in the dtype of `like`."""
    found = random_rows(width // 2, like.float()).repeat(1, 1, 2)
    return found.cos().to(like.dtype), found.sin().to(like.dtype)

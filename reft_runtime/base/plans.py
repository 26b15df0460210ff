"""What replaces a module's forward, and when the replacement gives way to the module's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reft_runtime.base.attention import running_step
from reft_runtime.base.linears import Merged
from reft_runtime.base.trial import Operator
from reft_runtime.kernels.operators import NormForm, Operators

Compute = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""Maps rows [T, d], rotary cosines and sines [1, T, dim] and the step to rows [T, d]. For attention
the result is what its output projection gets."""


Hooks = SequenceOf[dict[int, Any]]
"""Dictionaries of hooks; some of them may be empty."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The forward that replaces a module's own, and the width of the rows that it takes."""

    forward: Operator
    width: int


@dataclass(frozen=True, slots=True)
class NormPlan(Plan):
    """The plan of a norm: its weight [width], the number that it adds, and its form."""

    weight: Tensor
    epsilon: float
    form: NormForm


@dataclass(frozen=True, slots=True)
class PartPlan(Plan):
    """The plan of a part of a decoder layer: attention or MLP.

    `compute` is all before the part's last product, `last` the linear layer of that product, and
    `merged` are the part's first linear layers.
    """

    compute: Operator
    merged: Merged
    last: nn.Linear


def or_own(
    operators: Operators,
    compute: Compute,
    own: Operator,
    inner: Hooks,
    width: int,
) -> Operator:
    """A forward that uses `compute` for a plain step, and a module's `own` code for all else.

    A step is not plain if any of the hooks `inner` is set, or if it does not rotate the first
    `width` numbers of a head.
    """

    def forward(
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None,
        **kwargs: Any,
    ) -> Any:
        step = running_step()
        if step is not None and position_embeddings is not None and not any(inner):
            cos, sin = position_embeddings
            if cos.shape[-1] == width and operators.supports(hidden_states, cos, sin):
                return compute(hidden_states[0], cos, sin, step)[None]
        return own(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)

    return forward


def hooks_of(modules: Iterable[nn.Module]) -> Hooks:
    """The hook dictionaries of the modules; a module has hooks when one of them is not empty."""
    return [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def epsilon_of(norm: nn.Module) -> float | None:
    """The number that a norm adds before it divides; None if it has none that is known."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return epsilon if isinstance(epsilon, float) else None

"""Runs gated delta nets of a known form as two products and one operator between them.

The form is that of Qwen3.5: four projections of one input, a convolution, the gated delta rule, a
gated norm, and the output projection. A module's own code does not run; so the form is used only
where trials show that it gives the same, and only while no module inside has a hook.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Set
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor, nn

from reft_runtime.base.linears import Merged
from reft_runtime.base.packed_delta import (
    CONV_STATE,
    DELTA_STATE,
    PackedDeltaNet,
    Part,
    gives_the_same,
)
from reft_runtime.base.plans import epsilon_of, hooks_of
from reft_runtime.base.recurrent import StateKey, StateShape
from reft_runtime.base.trial import formula
from reft_runtime.kernels.operators import DeltaNetWeights, MixerOperators

_PROJECTIONS = tuple(f"in_proj_{part}" for part in ("qkv", "z", "b", "a"))
_PARTS = {*_PROJECTIONS, "conv1d", "norm", "out_proj"}


class DeltaNetForm:
    """A gated delta net that calls no module but its output projection.

    `weights` are those beside the products, and `merged` are its projections, in the order of the
    operator's rows.
    """

    def __init__(
        self,
        last: nn.Module,
        merged: Merged,
        weights: DeltaNetWeights,
        operators: MixerOperators,
    ) -> None:
        self.merged = merged
        self.weights = weights
        self._operators = operators
        self._last = last

    def __call__(self, parts: SequenceOf[Part], hidden_states: Tensor) -> Tensor:
        """The output [1, T, d] of packed rows [1, T, d]; see `PackedDeltaNet`."""
        rows = self.merged.product(hidden_states[0])
        mixed = rows.new_empty(len(rows), self.weights.values)
        for part in parts:
            own, at = part.states, slice(part.first, part.stop)
            if part.begins:
                for state in own.values():
                    state.zero_()
            self._operators.gated_delta_net_(
                rows[at], self.weights, own[CONV_STATE], own[DELTA_STATE], mixed[at]
            )
        made: Tensor = self._last(mixed)
        return made[None]


class FusedDeltaNet:
    """A gated delta net that runs in its `form` where that is the same, else its `packed` code."""

    def __init__(self, module: nn.Module, form: DeltaNetForm, packed: PackedDeltaNet) -> None:
        self._form = form
        self._packed = packed
        self._hooks = hooks_of(one for one in module.modules() if one is not module)

    def __call__(self, parts: SequenceOf[Part], **given: Any) -> Tensor:
        """See `PackedDeltaNet`."""
        rows = given["hidden_states"]
        plain = rows.dtype == self._form.weights.norm.dtype and not rows.requires_grad
        # Flags are for other modules: this one hands them to functions that ignore them.
        plain = plain and all(one is rows or isinstance(one, bool | None) for one in given.values())
        if plain and not any(self._hooks):
            return self._form(parts, rows)
        return self._packed(parts, **given)


def runs_fused(mixer: nn.Module) -> bool:
    """Whether steps run a mixer in its fused form."""
    return isinstance(getattr(mixer.forward, "packed", None), FusedDeltaNet)


class DeltaNetFuser:
    """Makes fused forms; a formula that held for one module holds for modules like it.

    `read` are the linear layers whose weights models' code reads, which must stay as they are.
    """

    def __init__(self, operators: MixerOperators, read: Set[nn.Module]) -> None:
        self._operators = operators
        self._read = read
        self._held: dict[Hashable, bool] = {}

    def fused(
        self,
        module: nn.Module,
        cache: str,
        shapes: Mapping[StateKey, StateShape],
        own: Callable[..., Any],
        packed: PackedDeltaNet,
    ) -> FusedDeltaNet | None:
        """The module with a fused form, its projections merged; None if it has no such form.

        The arguments are those of `packed_delta_net`, and what that gave.
        """
        made = self._form(module)
        if made is None:
            return None
        kind = formula(module)
        if kind not in self._held:
            self._held[kind] = self._holds(module, cache, shapes)
        if not self._held[kind] or not gives_the_same(module, cache, shapes, own, made):
            return None
        made.merged.merge()
        return FusedDeltaNet(module, made, packed)

    def _holds(self, module: nn.Module, cache: str, shapes: Mapping[StateKey, StateShape]) -> bool:
        """Whether the fused form of a float32 copy gives what the copy gives."""
        plain = copy.deepcopy(module).float()
        for part in plain.modules():
            vars(part).pop("forward", None)  # a replaced one is that of the module itself
        wide = {key: StateShape(shape.sizes, torch.float32) for key, shape in shapes.items()}
        made = self._form(plain)
        return made is not None and gives_the_same(plain, cache, wide, plain.forward, made)

    def _form(self, module: Any) -> DeltaNetForm | None:
        parts: dict[str, Any] = dict(module.named_children())
        if parts.keys() != _PARTS or module._parameters.keys() != {"A_log", "dt_bias"}:
            return None
        projections, convolution = [parts[name] for name in _PROJECTIONS], parts["conv1d"]
        norm, last = parts["norm"], parts["out_proj"]
        epsilon = epsilon_of(norm)
        if (
            not Merged.possible(projections)
            or not self._read.isdisjoint(projections)
            or any(linear.bias is not None for linear in projections)
            or type(convolution) is not nn.Conv1d
            or convolution.bias is not None
            or list(norm._parameters) != ["weight"]
            or epsilon is None
            or not isinstance(getattr(module, "num_k_heads", None), int)
        ):
            return None
        weights = DeltaNetWeights(
            convolution.weight.detach().flatten(1),
            module.A_log.detach().float().exp(),
            module.dt_bias.detach().float(),
            norm.weight.detach(),
            epsilon,
            module.num_k_heads,
        )
        return DeltaNetForm(last, Merged(projections), weights, self._operators)

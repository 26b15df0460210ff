"""Runs a gated delta net once for all sequences of a step, so that its linear layers see all rows.

The module's own code runs on the packed rows [1, T, d] as if they were one text that begins. The
functions by which it mixes tokens, a convolution and the gated delta rule, are bound to ones that
take the rows apart by sequence, and go on from each sequence's states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from reft_runtime.base.rebinding import code_of, rebound
from reft_runtime.base.recurrent import StateCache, StateKey, StateShape
from reft_runtime.base.trial import Operator, near
from reft_runtime.kernels.operators import MixerOperators

_CONVOLUTION = "causal_conv1d_fn"
_RULE = "torch_chunk_gated_delta_rule"
CONV_STATE, DELTA_STATE = StateKey("conv", 0), StateKey("recurrent", 0)


@dataclass(frozen=True, slots=True)
class Part:
    """Packed rows [first, stop): one token of each of several sequences, or one sequence's tokens.

    `states` are those of the sequences, [sequences, ...], changed in place. If the sequence
    `begins`, what lies in them is not read.
    """

    first: int
    stop: int
    states: Mapping[StateKey, Tensor]
    begins: bool = False

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return len(self.states[DELTA_STATE])

    def of(self, packed: Tensor) -> Tensor:
        """The part's rows of `packed` [1, T, ...], as a view [sequences, tokens of each, ...]."""
        own = packed[:, self.first : self.stop]
        return own.transpose(0, 1) if self.sequences > 1 else own


class PackedCache:
    """What the own code takes for transformers' `Cache`: the states are the functions' business."""

    def has_previous_state(self, layer_idx: int, state_idx: int | None = None) -> bool:
        """No: the code shall go the way of a text that begins."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Nothing, as above."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Nothing, as above."""

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **_: Any) -> Tensor:
        """The inputs as they are."""
        return conv_states

    def update_recurrent_state(self, recurrent_states: None, layer_idx: int, **_: Any) -> None:
        """Nothing to keep: the states have been changed in place."""


class PackedDeltaNet:
    """A gated delta net that runs on all sequences of a step at once."""

    def __init__(
        self, module: nn.Module, own: FunctionType, cache: str, operators: MixerOperators
    ) -> None:
        self._operators = operators
        self._own_rule: Operator = own.__globals__[_RULE]
        self._parts: SequenceOf[Part] = ()
        self._cache = cache
        names = {_CONVOLUTION: self._convolution, _RULE: self._rule}
        self._forward = rebound(own, module, names)

    def __call__(self, parts: SequenceOf[Part], **given: Any) -> Tensor:
        """The output [1, T, d]; `given` are the arguments that the module gets, without a cache."""
        self._parts = parts
        try:
            made: Tensor = self._forward(**given, **{self._cache: PackedCache()})
        finally:
            self._parts = ()
        return made

    def _convolution(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> Tensor:
        """Causal convolutions of packed inputs [1, channels, T] by `weight` [channels, taps]."""
        if activation not in (None, "silu"):
            raise ValueError(f"a convolution with {activation}")
        rows = hidden_states[0].T
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for part in self._parts:
            inputs, state = rows[part.first : part.stop], part.states[CONV_STATE]
            if part.begins:
                state.zero_()
            made = self._operators.convolve_(
                inputs.view(part.sequences, -1, len(weight)),
                state,
                weight,
                bias,
                silu=activation is not None,
            )
            if made is None:
                made = self._convolved(inputs, state, weight, bias)
                made = made if activation is None else silu(made)
            out[part.first : part.stop] = made.view_as(inputs)
        return out.T[None]

    def _convolved(
        self, inputs: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Convolutions [n, channels]; changes the state [sequences, channels, kept]."""
        taps, kept = weight.shape[1], state.shape[2]
        if len(state) == 1:
            every = torch.cat([state[0].T, inputs])
            seen = every[len(every) - len(inputs) - taps + 1 :].float()
            windows = [seen[tap : tap + len(inputs)] for tap in range(taps)]
            state[0].copy_(every[-kept:].T)
        else:
            after = torch.cat([state, inputs[..., None]], 2)
            windows = [after[..., tap - taps].float() for tap in range(taps)]
            state.copy_(after[..., -kept:])
        by_tap = weight.T.float()
        made = windows[0] * by_tap[0]
        for tap in range(1, taps):
            made.addcmul_(windows[tap], by_tap[tap])
        made = made if bias is None else made.add_(bias)
        return made.to(inputs.dtype)

    def _rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """The gated delta rule over packed heads [1, T, heads, dim]."""
        out = torch.empty_like(value, memory_format=torch.contiguous_format)
        for part in self._parts:
            state = part.states[DELTA_STATE]
            if part.begins:
                state.zero_()
            heads = part.of(query), part.of(key), part.of(value)
            made = self._operators.delta_rule_(
                heads, part.of(g), part.of(beta), state, normalised=use_qk_l2norm_in_kernel
            )
            if made is None:
                made, last = self._own_rule(
                    *heads,
                    g=part.of(g),
                    beta=part.of(beta),
                    initial_state=state,
                    output_final_state=True,
                    use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                )
                state.copy_(last)
            part.of(out).copy_(made)
        return out, None


def packed_delta_net(
    module: nn.Module,
    cache: str,
    shapes: Mapping[StateKey, StateShape],
    own: Callable[..., Any],
    operators: MixerOperators,
) -> PackedDeltaNet | None:
    """The module for packed rows; None if it is not known, or does not give what `own` gives.

    `cache` is the name of the cache's argument, and `shapes` are the module's states.
    """
    code = code_of(type(module).forward)
    if code is None or not {_CONVOLUTION, _RULE} <= set(code.__code__.co_names):
        return None
    if shapes.keys() != {CONV_STATE, DELTA_STATE}:
        return None
    packed = PackedDeltaNet(module, code, cache, operators)
    return packed if gives_the_same(module, cache, shapes, own, packed) else None


def gives_the_same(
    module: nn.Module,
    cache: str,
    shapes: Mapping[StateKey, StateShape],
    own: Callable[..., Any],
    packed: Callable[..., Tensor],
) -> bool:
    """Whether `packed` gives for the parts of a step what `own` gives for each sequence."""
    try:
        wanted, found = _outputs(module, cache, shapes, own, packed)
    except Exception:
        return False  # the module's code is not the one that is known
    return near(found, wanted)


def _outputs(
    module: nn.Module,
    cache: str,
    shapes: Mapping[StateKey, StateShape],
    own: Callable[..., Any],
    packed: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """Outputs by the own code and by `packed`: two prompts, then one and two more tokens."""
    weight = next(p for p in module.parameters() if p.ndim == 2)
    like = torch.empty(0, dtype=weight.dtype, device=weight.device)
    width: Any = module.hidden_size
    rows = torch.randn(1, 7, width, generator=torch.Generator().manual_seed(0)).to(like)

    def states() -> dict[StateKey, Tensor]:
        return {
            key: torch.zeros(2, *shape.sizes, dtype=shape.dtype, device=like.device)
            for key, shape in shapes.items()
        }

    def of(states: Mapping[StateKey, Tensor], at: int) -> dict[StateKey, Tensor]:
        return {key: tensor[at : at + 1] for key, tensor in states.items()}

    # The rows of each sequence: its prompt, then what comes behind it.
    plan = ((0, slice(0, 2), True), (1, slice(2, 5), True), (0, slice(5, 6), False))
    theirs, ours = states(), states()
    wanted = [
        own(rows[:, at], **{cache: StateCache(of(theirs, number), begins=begins)})
        for number, at, begins in (*plan, (1, slice(6, 7), False))
    ]
    prompts = [Part(at.start, at.stop, of(ours, n), begins) for n, at, begins in plan[:2]]
    found = [
        packed(prompts, hidden_states=rows[:, :5]),
        packed([Part(0, 2, ours)], hidden_states=rows[:, 5:7]),
    ]
    return torch.cat(wanted, 1), torch.cat(found, 1)

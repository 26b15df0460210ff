"""Replaces what gated delta nets compute beside their linear layers by fused operators.

A module's own code runs, with the names of the gated delta rule and of the convolution bound to
ours. Each function is tried on random tensors before it is replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Set
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor, nn

from reft_runtime.base.fused_delta import DeltaNetFuser
from reft_runtime.base.packed_delta import packed_delta_net
from reft_runtime.base.plans import epsilon_of
from reft_runtime.base.rebinding import code_of, rebound
from reft_runtime.base.recurrent import MixerForward, MixerStates
from reft_runtime.base.trial import Operator, near, nearer
from reft_runtime.kernels.operators import MixerOperators, operators_for

_RULES = ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule")
_CONVOLUTION = "causal_conv1d_update"

_CLOSE = 1e-5
"""Largest distance between numbers of order 1 in float32 that are taken for the same."""


def fuse_delta_nets(
    mixers: SequenceOf[nn.Module],
    states: Mapping[int, MixerStates],
    read: Set[nn.Module],
    device: torch.device,
) -> None:
    """Let steps run gated delta nets among the mixers on a device's operators, if it has them.

    `states` are those of each mixer, by its number, and `read` the linear layers whose weights
    their code reads. Linear layers must not be packed yet.
    """
    operators = operators_for(device)
    if not isinstance(operators, MixerOperators):
        return
    nets, fuser = DeltaNets(operators), DeltaNetFuser(operators, read)
    for number, mixer in enumerate(mixers):
        replaced = mixer.forward
        if not isinstance(replaced, MixerForward):
            continue
        forward = nets.forward_of(mixer, replaced.own)
        if forward is not None:
            shapes, own = states[number].shapes, replaced.own
            replaced.own = forward
            nets.fuse_norms(mixer)
            given = mixer, replaced.cache, shapes, own
            packed = packed_delta_net(*given, operators)
            replaced.packed = packed and (fuser.fused(*given, packed) or packed)


class DeltaNets:
    """Makes forwards of gated delta nets; a function that was tried is not tried again."""

    def __init__(self, operators: MixerOperators) -> None:
        self._operators = operators
        self._known: dict[Operator, Operator | None] = {}

    def forward_of(self, module: nn.Module, own_forward: Operator) -> Operator | None:
        """A forward that does what the module's own does; None if nothing in it is known.

        It changes the states that a cache gives it in place.
        """
        own = code_of(own_forward)
        if own is None:
            return None
        bound = {}
        for name in {*_RULES, _CONVOLUTION}.intersection(own.__code__.co_names):
            function = own.__globals__[name]
            if function not in self._known:
                build = _convolution if name == _CONVOLUTION else _rule
                self._known[function] = build(function, self._operators)
            if (replacement := self._known[function]) is not None:
                bound[name] = replacement
        return rebound(own, module, bound) if bound else None

    def fuse_norms(self, module: nn.Module) -> None:
        """Replace the gated norms inside a module whose formula is known."""
        for norm in module.modules():
            if type(norm).__name__.endswith("RMSNormGated") and "forward" not in vars(norm):
                forward = _gated_norm(norm, self._operators)
                if forward is not None:
                    norm.forward = forward


def _gated_norm(norm: Any, operators: MixerOperators) -> Operator | None:
    """A forward that computes what a gated norm's own does; None if it gives another."""
    epsilon = epsilon_of(norm)
    if epsilon is None or list(norm._parameters) != ["weight"]:
        return None

    def build(norm: Any, *, once: bool) -> Operator:
        own, weight = norm.forward, norm.weight

        def forward(hidden_states: Tensor, gate: Tensor) -> Any:
            made = operators.gated_rms_norm(hidden_states, gate, weight, epsilon, once=once)
            return own(hidden_states, gate) if made is None else made

        return forward

    # A copy in float32 shows the formula, the norm itself whether dtypes fit together.
    once = False
    for tried in (copy.deepcopy(norm).float(), norm):
        rows, gate = _random(2, 5, len(norm.weight)).to(tried.weight)
        try:
            wanted = tried(rows, gate)
            made = [build(tried, once=once)(rows, gate) for once in (False, True)]
            once = nearer(wanted, *made)
            if not near(made[once], wanted):
                return None
        except Exception:
            return None  # it wants other arguments, so it is not the norm that is known
    return build(norm, once=once)


def _rule(own: Operator, operators: MixerOperators) -> Operator | None:
    """A function that computes the gated delta rule as `own` does; None if it gives another."""

    def rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if cu_seqlens is None and seq_idx is None:
            state = initial_state
            if state is None:
                sizes = len(key), value.shape[2], key.shape[3], value.shape[3]
                state = value.new_zeros(sizes, dtype=torch.float32)
            made = operators.delta_rule_(
                (query, key, value), g, beta, state, normalised=use_qk_l2norm_in_kernel
            )
            if made is not None:
                return made, state if output_final_state else None
        given = {"cu_seqlens": cu_seqlens, "seq_idx": seq_idx, **kwargs}
        found: tuple[Tensor, Tensor | None] = own(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            **given,
        )
        return found

    def calls(function: Operator) -> list[Tensor]:
        found = []
        for tokens, begins, normalised in ((1, False, True), (3, False, False), (3, True, True)):
            query, key = _random(2, tokens, 2, 8), _random(2, tokens, 2, 8).flip(0)
            found += function(
                query,
                key,
                _random(2, tokens, 4, 6),
                g=-_random(2, tokens, 4).exp(),
                beta=_random(2, tokens, 4).sigmoid(),
                initial_state=None if begins else _random(2, 4, 8, 6),
                output_final_state=True,
                use_qk_l2norm_in_kernel=normalised,
            )
        return found

    return rule if _same(calls, own, rule) else None


def _convolution(own: Operator, operators: MixerOperators) -> Operator | None:
    """A function that convolves one more token as `own` does; None if it gives another."""

    def convolution(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        if hidden_states.shape[-1] == 1 and activation in (None, "silu"):
            made = operators.convolve_(
                hidden_states.transpose(1, 2),
                conv_state,
                weight,
                bias,
                silu=activation is not None,
            )
            if made is not None:
                return made.transpose(1, 2)
        found: Tensor = own(hidden_states, conv_state, weight, bias, activation)
        return found

    def calls(function: Operator) -> list[Tensor]:
        found = []
        for bias, activation in ((None, "silu"), (_random(6), None)):
            state = _random(2, 6, 4)
            found += [function(_random(2, 6, 1), state, _random(6, 4), bias, activation), state]
        return found

    return convolution if _same(calls, own, convolution) else None


def _same(calls: Callable[[Operator], list[Tensor]], own: Operator, other: Operator) -> bool:
    """Whether two functions give the same results in the same calls."""
    try:
        wanted, found = calls(own), calls(other)
    except Exception:
        return False  # it wants other arguments, so it is not the function that is known
    return all(torch.allclose(a, b, atol=_CLOSE) for a, b in zip(wanted, found, strict=True))


def _random(*sizes: int) -> Tensor:
    """Random numbers, equal for equal sizes."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))

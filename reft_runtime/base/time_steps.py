"""Bounds the time steps of state-space layers for single tokens as for several.

Some models' own code (Nemotron-H, Zamba 2) bounds them only where it computes several tokens at
once. A model was trained that way, so a token behind a state is computed that way, too; else an
answer would depend on where its prompt was cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import softplus

from reft_runtime.base.rebinding import code_of, rebound
from reft_runtime.base.recurrent import MixerForward
from reft_runtime.base.trial import Operator

_UPDATE = "mamba2_selective_state_update"
"""The name by which mixers' code advances a state by one token."""

_UNBOUNDED = (0.0, float("inf"))


def bound_time_steps(mixers: Iterable[nn.Module]) -> None:
    """Let mixers that are run by steps keep to their `time_step_limit` for single tokens."""
    for mixer in mixers:
        own, replaced = code_of(type(mixer).forward), mixer.forward
        limit: Any = getattr(mixer, "time_step_limit", _UNBOUNDED)
        if own is None or tuple(limit) == _UNBOUNDED:
            continue
        if _UPDATE in own.__code__.co_names and isinstance(replaced, MixerForward):
            names = {_UPDATE: partial(_bounded, own.__globals__[_UPDATE], limit)}
            replaced.own = rebound(own, mixer, names)


def _bounded(
    own: Operator,
    limit: tuple[float, float],
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    *args: Any,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **kwargs: Any,
) -> Tensor:
    """What `own` gives for time steps within `limit`."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = softplus(dt)
    made: Tensor = own(state, hidden_states, dt.clamp(*limit), *args, **kwargs)
    return made

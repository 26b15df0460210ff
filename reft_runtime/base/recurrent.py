"""Recurrent layers of packed steps: gated delta nets, state-space layers, short convolutions.

A *mixer* is a module that mixes the tokens of a sequence by states of fixed size, which its own
code keeps in transformers' `Cache`. That code runs unchanged, but not on packed rows [1, T, d]: the
running step takes them apart by sequence, and gives each part a `StateCache` with the states of
its sequences. Where the states lie is the step's business (`kv/states.py`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from reft_runtime.base.attention import AttentionStep, CausalStep, ShapeProbe, running_step
from reft_runtime.errors import UnsupportedModel

_UPDATES = {"update_conv_state", "update_recurrent_state"}
_ATTENDS = {"ALL_ATTENTION_FUNCTIONS"}
_CACHES = ("cache_params", "past_key_values")

Outputs = Tensor | tuple[Tensor, ...]
"""What a mixer returns: a tensor [rows, tokens, ...], or several."""


class StateKey(NamedTuple):
    """Names one state of a mixer, as the mixer's own code does."""

    kind: Literal["conv", "recurrent"]
    index: int


@dataclass(frozen=True, slots=True)
class StateShape:
    """The shape of one state of one sequence, and its dtype."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """The memory that it takes."""
        return math.prod(self.sizes) * self.dtype.itemsize


StateShapes = Mapping[StateKey, StateShape]
"""The states that a mixer keeps of a sequence."""


class StateCache:
    """What a mixer's own code takes for transformers' `Cache`.

    `states` are tensors [sequences, ...], changed in place. If the sequences begin (`begins`) they
    have no state yet: what lies in the tensors is not read. The last dimension of a "conv" state
    are the newest inputs of a convolution.
    """

    def __init__(self, states: Mapping[StateKey, Tensor], *, begins: bool) -> None:
        self._states = states
        self._begins = begins

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The newest inputs of a convolution; None if the sequences begin."""
        return None if self._begins else self._states[StateKey("conv", state_idx)]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The recurrent state; None if the sequences begin."""
        return None if self._begins else self._states[StateKey("recurrent", state_idx)]

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Keep the newest of the inputs [sequences, ..., tokens].

        Returns them behind what was kept before, or, if the sequences begin, behind as many zeros
        as are needed to fill the state.
        """
        kept = self._states[StateKey("conv", state_idx)]
        width = kept.shape[-1]
        if not self._begins:
            every = torch.cat([kept, conv_states], -1)
        else:
            every = pad(conv_states, (max(0, width - conv_states.shape[-1]), 0))
        kept.copy_(every[..., -width:])
        return every

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Keep a recurrent state, and return it."""
        return self._states[StateKey("recurrent", state_idx)].copy_(recurrent_states)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether the sequences have states."""
        return not self._begins

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether a state holds more inputs than its convolution needs: never."""
        return False


class StateRecorder(StateCache):
    """A `StateCache` of one sequence that begins: it learns which states there are."""

    def __init__(self) -> None:
        self._made: dict[StateKey, Tensor] = {}
        super().__init__(self._made, begins=True)

    @property
    def shapes(self) -> StateShapes:
        """The states that were kept."""
        return {key: StateShape(tuple(t.shape[1:]), t.dtype) for key, t in self._made.items()}

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        """See `StateCache`; `conv_kernel_size` is the width of the state."""
        width = conv_kernel_size or conv_states.shape[-1]
        made = conv_states.new_empty(*conv_states.shape[:-1], width)
        self._made[StateKey("conv", state_idx)] = made
        return super().update_conv_state(conv_states, layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """See `StateCache`."""
        self._made[StateKey("recurrent", state_idx)] = torch.empty_like(recurrent_states)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx)


@dataclass(frozen=True, slots=True)
class MixerCall:
    """A call of a mixer on the packed rows of a step, to be run part by part.

    `rows` are the arguments that have a row for each token, [1, T, ...], by name; `others` are
    those that are the same for all tokens. `cache` is the name of the cache's argument.
    """

    own: Callable[..., Any]
    rows: Mapping[str, Tensor]
    others: Mapping[str, Any]
    cache: str

    @property
    def tokens(self) -> int:
        """Number of packed tokens."""
        return next(iter(self.rows.values())).shape[1]

    def alone(self, first: int, stop: int, states: StateCache | None) -> Outputs:
        """The output [1, n, ...] of n consecutive tokens of one sequence.

        Without `states` the sequence begins, and its states are not kept.
        """
        return self._run({name: r[:, first:stop] for name, r in self.rows.items()}, states)

    def together(self, first: int, stop: int, states: StateCache) -> Outputs:
        """The output [1, n, ...] of one token each of n sequences, which all have states."""
        rows = {name: r[:, first:stop].transpose(0, 1) for name, r in self.rows.items()}
        return _each(self._run(rows, states), lambda made: made.transpose(0, 1))

    def rectangle(self, index: Tensor) -> Outputs:
        """The outputs [n * m, ...] of n sequences of m tokens each, all from their beginning.

        `index` [n, m] are their rows among the packed ones. Their states are not kept.
        """
        rows = {name: r[0][index] for name, r in self.rows.items()}
        return _each(self._run(rows, None), lambda made: made.flatten(0, 1))

    def _run(self, rows: Mapping[str, Tensor], states: StateCache | None) -> Outputs:
        made: Outputs = self.own(**{**self.others, **rows, self.cache: states})
        return made


def join(parts: SequenceOf[Outputs]) -> Outputs:
    """Put parts [1, n, ...] one behind the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts, 1)  # type: ignore[arg-type]
    return tuple(torch.cat(each, 1) for each in zip(*parts, strict=True))


def _each(made: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    return change(made) if isinstance(made, Tensor) else tuple(change(one) for one in made)


class RecurrentStep(AttentionStep, Protocol):
    """A step of a model that has mixers."""

    def recur(self, mixer: int, call: MixerCall) -> Outputs:
        """Run a mixer, by its number, for every sequence of the step: [1, T, ...]."""


class StateProbe(ShapeProbe):
    """A `ShapeProbe` that also records the states of every mixer, as `states` by its number."""

    def __init__(self, max_tokens: int, dtype: torch.dtype) -> None:
        super().__init__(max_tokens, dtype)
        self.states: dict[int, StateShapes] = {}

    def recur(self, mixer: int, call: MixerCall) -> Outputs:
        """Record the mixer's states while it runs."""
        if mixer in self.states:
            raise UnsupportedModel("a recurrent layer runs more than once")
        recorder = StateRecorder()
        made = call.alone(0, call.tokens, recorder)
        self.states[mixer] = recorder.shapes
        return made


class EachTokenStep(CausalStep):
    """A `CausalStep` that runs mixers token by token, as if each began a sequence.

    So no module inside a mixer gets packed rows, as in any other step.
    """

    def recur(self, mixer: int, call: MixerCall) -> Outputs:
        """Run the mixer for each token."""
        return join([call.alone(at, at + 1, None) for at in range(call.tokens)])


class _Mixer:
    """The forward that replaces a mixer's own: it asks the running step.

    Without a step, the own code runs as it was called.
    """

    def __init__(self, number: int, module: nn.Module) -> None:
        names = tuple(inspect.signature(module.forward).parameters)
        cache = next((name for name in _CACHES if name in names), None)
        if cache is None:
            raise UnsupportedModel(f"{type(module).__name__} takes its cache by no known name")
        self._number = number
        self._own = module.forward
        self._names = names
        self._cache = cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step: Any = running_step()
        if step is None:
            return self._own(*args, **kwargs)
        given = dict(zip(self._names, args, strict=False), **kwargs)
        given.pop(self._cache, None)
        rows: dict[str, Tensor] = {}
        others: dict[str, Any] = {}
        tokens = None
        for name, value in given.items():
            if isinstance(value, Tensor):
                tokens = tokens or value.shape[1]
                if value.shape[:2] != (1, tokens):
                    raise UnsupportedModel(f"a recurrent layer gets {name} that no token has")
                rows[name] = value
            elif value is None or isinstance(value, bool | int | float | str):
                others[name] = value
            else:
                raise UnsupportedModel(f"a recurrent layer gets {name} that no token has")
        return step.recur(self._number, MixerCall(self._own, rows, others, self._cache))


def find_mixers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The mixers of a model, in order; one inside another belongs to that.

    Raises `UnsupportedModel` if one of them attends, too.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or not _UPDATES & (names := _names(type(module))):
            continue
        if _ATTENDS & names:
            raise UnsupportedModel(f"{type(module).__name__} attends and keeps states in one")
        found.append(module)
        inside.update(module.modules())
    return tuple(found)


def replace(mixers: Iterable[nn.Module]) -> None:
    """Let the running step run the mixers; `ModelState.restore` undoes it."""
    for number, module in enumerate(mixers):
        module.forward = _Mixer(number, module)


def _names(kind: type[nn.Module]) -> set[str]:
    """The names that the code of a module's class uses."""
    found: set[str] = set()
    for one in kind.__mro__:
        if one is nn.Module:
            break
        for member in vars(one).values():
            if callable(member) and (code := getattr(inspect.unwrap(member), "__code__", None)):
                found.update(code.co_names)
    return found

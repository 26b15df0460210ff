"""Recurrent layers of packed steps: gated delta nets, state-space layers, short convolutions.

A *mixer* is a module that mixes the tokens of a sequence by states of fixed size, which its own
code keeps in transformers' `Cache`. That code runs unchanged, but not on packed rows [1, T, d]: the
running step takes them apart by sequence, and gives each part a `StateCache` with the states of
its sequences. Where the states lie is the step's business (`kv/states.py`).
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from reft_runtime.base.attention import AttentionStep, running_step
from reft_runtime.base.probe import CausalStep, ShapeProbe
from reft_runtime.errors import UnsupportedModel

_UPDATES = {"update_conv_state", "update_recurrent_state"}
_ATTENDS = {"ALL_ATTENTION_FUNCTIONS"}
_CACHES = ("cache", "cache_params", "past_key_values")
"""What releases of transformers call the argument for a cache."""

Rows = Tensor | tuple[Tensor, ...]
"""What a mixer takes or returns: a tensor [sequences, tokens, ...], or several."""


class StateKey(NamedTuple):
    """Names one state of a mixer, as the mixer's own code does."""

    kind: Literal["conv", "recurrent"]
    number: int


@dataclass(frozen=True, slots=True)
class StateShape:
    """The shape of one state of one sequence, and its dtype."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """The memory that it takes."""
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class MixerStates:
    """The states that a mixer keeps of a sequence.

    Its code goes on from them with one token, and with several at once only if it `continues`.
    """

    shapes: Mapping[StateKey, StateShape]
    continues: bool


class LayerStates(NamedTuple):
    """The states of a mixer as releases of transformers before 5.22 read them, by number."""

    conv_states: Mapping[int, Tensor]
    recurrent_states: Mapping[int, Tensor]
    record_past: bool = False


class StateCache:
    """What a mixer's own code takes for transformers' `Cache`.

    `states` are tensors [sequences, ...], changed in place. If the sequences begin (`begins`) they
    have no state yet: what lies in the tensors is not read. The last dimension of a "conv" state
    are the newest inputs of a convolution.
    """

    def __init__(self, states: Mapping[StateKey, Tensor], *, begins: bool) -> None:
        self._states = states
        self._begins = begins

    @property
    def layers(self) -> Mapping[int, LayerStates]:
        """The states by layer, whose number is of no matter here; see `LayerStates`."""
        found: dict[str, dict[int, Tensor]] = {"conv": {}, "recurrent": {}}
        for key, state in self._states.items():
            found[key.kind][key.number] = state
        own = LayerStates(found["conv"], found["recurrent"])
        return defaultdict(lambda: own)

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

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
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
    def states(self) -> dict[StateKey, Tensor]:
        """The states that were kept, [1, ...] each."""
        return self._made

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

    `rows` are the arguments that have a row for each of the `tokens`, [1, T, ...], by name;
    `others` are those that are the same for all. `cache` is the name of the cache's argument.
    """

    own: Callable[..., Any]
    tokens: int
    rows: Mapping[str, Rows]
    others: Mapping[str, Any]
    cache: str
    packed: Callable[..., Rows] | None = None
    """Runs the mixer once for all sequences, if it can (see `packed_delta`)."""

    def alone(self, first: int, stop: int, states: StateCache | None) -> Rows:
        """The output [1, n, ...] of n consecutive tokens of one sequence.

        Without `states` the sequence begins, and its states are not kept.
        """
        return self._run(lambda rows: rows[:, first:stop], states)

    def together(self, first: int, stop: int, states: StateCache) -> Rows:
        """The output [1, n, ...] of one token each of n sequences, which all have states."""
        made = self._run(lambda rows: rows[:, first:stop].transpose(0, 1), states)
        return each(made, lambda made: made.transpose(0, 1))

    def rectangle(self, index: Tensor) -> Rows:
        """The outputs [n * m, ...] of n sequences of m tokens each, all from their beginning.

        `index` [n, m] are their rows among the packed ones. Their states are not kept.
        """
        made = self._run(lambda rows: rows[0][index], None)
        return each(made, lambda made: made.flatten(0, 1))

    def _run(self, cut: Callable[[Tensor], Tensor], states: StateCache | None) -> Rows:
        rows = {name: each(given, cut) for name, given in self.rows.items()}
        made: Rows = self.own(**self.others, **rows, **{self.cache: states})
        return made


def join(parts: SequenceOf[Rows]) -> Rows:
    """Put parts [1, n, ...] one behind the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts, 1)  # type: ignore[arg-type]
    return tuple(torch.cat(each, 1) for each in zip(*parts, strict=True))


def each(rows: Rows, change: Callable[[Tensor], Tensor]) -> Rows:
    """Change every tensor of `rows`."""
    return change(rows) if isinstance(rows, Tensor) else tuple(change(one) for one in rows)


class RecurrentStep(AttentionStep, Protocol):
    """A step of a model that has mixers."""

    def recur(self, mixer: int, call: MixerCall) -> Rows:
        """Run a mixer, by its number, for every sequence of the step: [1, T, ...]."""


class StateProbe(ShapeProbe):
    """A `ShapeProbe` that also finds out the states of each of the `mixers`, by its number.

    `read` are the linear layers inside mixers that are not called: the mixers' own code reads
    their weights, which must stay as they are.
    """

    def __init__(self, max_tokens: int, dtype: torch.dtype, mixers: SequenceOf[nn.Module]) -> None:
        super().__init__(max_tokens, dtype)
        self.states: dict[int, MixerStates] = {}
        self.read: set[nn.Module] = set()
        self._mixers = mixers

    def recur(self, mixer: int, call: MixerCall) -> Rows:
        """Record the mixer's states while it runs."""
        if mixer in self.states:
            raise UnsupportedModel("a recurrent layer runs more than once")
        linears = {one for one in self._mixers[mixer].modules() if isinstance(one, nn.Linear)}
        self.read |= linears
        hooks = [
            one.register_forward_pre_hook(lambda one, _: self.read.discard(one)) for one in linears
        ]
        recorder = StateRecorder()
        try:
            made = call.alone(0, call.tokens, recorder)
        finally:
            for hook in hooks:
                hook.remove()
        states = recorder.states
        self.states[mixer] = MixerStates(
            {key: StateShape(tuple(t.shape[1:]), t.dtype) for key, t in states.items()},
            _continues(call, states),
        )
        return made


def _continues(call: MixerCall, states: Mapping[StateKey, Tensor]) -> bool:
    """Whether what a mixer gives for several tokens depends on each recurrent state."""
    if call.tokens < 2:
        return False

    def first(changed: StateKey | None) -> Tensor:
        given = {
            key: state + 1 if key == changed else state.clone() for key, state in states.items()
        }
        made = call.alone(0, 2, StateCache(given, begins=False))
        return made if isinstance(made, Tensor) else torch.cat([m.flatten() for m in made])

    same = first(None)
    return all(key.kind == "conv" or not torch.equal(first(key), same) for key in states)


class EachTokenStep(CausalStep):
    """A `CausalStep` that runs mixers token by token, as if each began a sequence.

    So no module inside a mixer gets packed rows, as in any other step.
    """

    def recur(self, mixer: int, call: MixerCall) -> Rows:
        """Run the mixer for each token."""
        return join([call.alone(at, at + 1, None) for at in range(call.tokens)])


class MixerForward:
    """The forward that replaces a mixer's `own`, and asks the running step to run that.

    Without a step, it runs as it was called.
    """

    def __init__(self, number: int, module: nn.Module) -> None:
        self._number = number
        self.own = module.forward
        self.packed: Callable[..., Rows] | None = None
        self._names = tuple(inspect.signature(module.forward).parameters)
        self.cache = cache_argument(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the mixer's own code, or let the running step run it part by part."""
        step: Any = running_step()
        if step is None:
            return self.own(*args, **kwargs)
        given = dict(zip(self._names, args, strict=False), **kwargs)
        given.pop(self.cache, None)
        tokens: int = given[self._names[0]].shape[1]
        rows: dict[str, Rows] = {}
        others: dict[str, Any] = {}
        for name, value in given.items():
            if value is None or isinstance(value, bool | int | float | str):
                others[name] = value
            elif all(
                isinstance(one, Tensor) and one.shape[:2] == (1, tokens)
                for one in (value if isinstance(value, tuple) else (value,))
            ):
                rows[name] = value
            else:
                raise UnsupportedModel(f"a recurrent layer gets {name} that is not one per token")
        call = MixerCall(self.own, tokens, rows, others, self.cache, self.packed)
        return step.recur(self._number, call)


def cache_argument(module: nn.Module) -> str:
    """What a mixer calls the argument for its cache."""
    names = inspect.signature(module.forward).parameters
    name = next((name for name in _CACHES if name in names), None)
    if name is None:
        raise UnsupportedModel(f"{type(module).__name__} takes its cache by no known name")
    return name


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


def run_by_step(mixers: Iterable[nn.Module]) -> None:
    """Let the running step run the mixers; `ModelState.restore` undoes it."""
    for number, module in enumerate(mixers):
        module.forward = MixerForward(number, module)


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

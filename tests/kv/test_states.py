"""Recurrent states: where they lie, who gets which, and what is never read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reft_runtime.base.recurrent import MixerCall, MixerStates, StateKey, StateShape
from reft_runtime.kernels.staging import send
from reft_runtime.kv.page_attention import GatheredAttention
from reft_runtime.kv.pages import PageStorage
from reft_runtime.kv.rows import RowStorage
from reft_runtime.kv.states import StateStorage
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import StateCopy
from reft_runtime.schedule.sequence import Sequence
from tests.helpers.models import request

SUM = StateKey("recurrent", 0)
LAST = StateKey("conv", 0)
HERE = torch.device("cpu")


def storage(slots: int = 4, places: int = 0, *, continues: bool = True) -> StateStorage:
    shapes = {
        SUM: StateShape((1,), torch.float64),
        LAST: StateShape((1, 2), torch.float32),
    }
    made = StateStorage([MixerStates(shapes, continues)], HERE, slots, places)
    for tensor in made.states[0].values():
        tensor.fill_(torch.nan)  # what nobody has written, nobody may read
    return made


def sequence(name: int, tokens: int = 16) -> Sequence:
    return Sequence(request(str(name), [name] * tokens), 0, name, [name] * tokens)


calls: list[tuple[int, int]] = []


def mixer(hidden: Tensor, cache_params: Any = None) -> Tensor:
    """The running sum of a sequence's rows, plus 100 times the row two before."""
    calls.append((hidden.shape[0], hidden.shape[1]))
    before = cache_params.get_recurrent_state(0)
    rows = hidden[..., 0]
    total = rows.cumsum(1) + (0 if before is None else before)
    inputs = cache_params.update_conv_state(rows[:, None], 0)[:, 0]
    padded = torch.nn.functional.pad(inputs, (2, 0))[:, -rows.shape[1] - 2 : -2]
    cache_params.update_recurrent_state(total[:, -1:], 0)
    return (total + 100 * padded)[..., None]


def run(states: StateStorage, *chunks: Chunk) -> dict[Sequence, list[float]]:
    """What the mixer gives for each chunk; the row of token i of a sequence is name + i / 10."""
    ordered = states.prepare(chunks)
    rows = [c.sequence.order + i / 10 for c in ordered for i in range(c.start, c.stop)]
    hidden = torch.tensor(rows)[None, :, None]
    call = MixerCall(mixer, len(rows), {"hidden": hidden}, {}, "cache_params")
    made = states.step(ordered).recur(0, call)
    assert isinstance(made, Tensor)
    parts = made[0, :, 0].split([c.length for c in ordered])  # type: ignore[no-untyped-call]
    for chunk in chunks:
        chunk.sequence.computed = chunk.stop
        for fork in chunk.forks:
            fork.computed = chunk.shared
    states.check_integrity()
    return {c.sequence: part.tolist() for c, part in zip(ordered, parts, strict=True)}


def wanted(name: int, start: int, stop: int) -> list[float]:
    rows = [name + i / 10 for i in range(stop)]
    return [
        pytest.approx(sum(rows[: i + 1]) + 100 * (rows[i - 2] if i > 1 else 0))  # type: ignore[misc]
        for i in range(start, stop)
    ]


def test_states_are_of_the_dtypes_of_their_shapes() -> None:
    states = storage(places=1)
    for tensors in (states.states, states._kept):
        assert {key: tensor.dtype for key, tensor in tensors[0].items()} == {
            SUM: torch.float64,
            LAST: torch.float32,
        }


@pytest.mark.parametrize(
    "without",
    [
        RowStorage([], torch.float32, 16),
        PageStorage([], torch.float32, HERE, 1, 1, 16, GatheredAttention()),
    ],
)
def test_a_storage_without_states_takes_none(without: RowStorage | PageStorage) -> None:
    without.keep_states([])
    with pytest.raises(ValueError, match="keeps no recurrent states"):
        without.keep_states([StateCopy(sequence(1), 0)])


@pytest.mark.parametrize("continues", [True, False])
def test_each_sequence_goes_on_from_its_own_state(continues: bool) -> None:
    states = storage(continues=continues)
    a, b, c = (sequence(name) for name in (1, 2, 3))
    assert run(states, Chunk(a, 0, 1), Chunk(b, 0, 5)) == {
        a: wanted(1, 0, 1),
        b: wanted(2, 0, 5),
    }
    found = run(states, Chunk(b, 5, 1), Chunk(c, 0, 3), Chunk(a, 1, 1))
    assert found == {a: wanted(1, 1, 2), b: wanted(2, 5, 6), c: wanted(3, 0, 3)}
    calls.clear()
    found = run(states, Chunk(c, 3, 4), Chunk(b, 6, 1), Chunk(a, 2, 1))
    assert found == {a: wanted(1, 2, 3), b: wanted(2, 6, 7), c: wanted(3, 3, 7)}
    assert calls == [(2, 1), *([(1, 4)] if continues else [(1, 1)] * 4)]


def test_sequences_that_decode_apart_and_slots_that_move() -> None:
    states = storage()
    every = [sequence(name) for name in range(4)]
    run(states, *(Chunk(one, 0, 2 + i) for i, one in enumerate(every)))
    assert run(states, Chunk(every[0], 2, 1), Chunk(every[3], 5, 1)) == {
        every[0]: wanted(0, 2, 3),
        every[3]: wanted(3, 5, 6),
    }
    states.release([every[0], every[2]])
    assert [states.slot(one) for one in (every[3], every[1])] == [0, 1]
    new = sequence(7)
    found = run(states, Chunk(new, 0, 1), Chunk(every[1], 3, 1), Chunk(every[3], 6, 1))
    assert found == {new: wanted(7, 0, 1), every[1]: wanted(1, 3, 4), every[3]: wanted(3, 6, 7)}
    states.release([every[1], every[3], new, every[0]])
    states.check_integrity(idle=True)


def test_slots_that_lie_apart_are_sent_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[int]] = []

    def sending(tensor: Tensor, device: torch.device) -> Tensor:
        sent.append(tensor.tolist())
        return send(tensor, device)

    monkeypatch.setattr("reft_runtime.kv.states.send", sending)
    states = storage()
    every = [sequence(name) for name in range(3)]
    run(states, *(Chunk(one, 0, 2) for one in every))
    run(states, Chunk(every[0], 2, 1), Chunk(every[1], 2, 1))
    assert not sent
    run(states, Chunk(every[0], 3, 1), Chunk(every[2], 2, 1))
    assert sent == [[0, 2]]


@pytest.mark.parametrize("first", [3, 5])
def test_forks_get_the_state_behind_what_they_share(first: int) -> None:
    """Also where the chunk goes on behind it, and where it begins there."""
    states = storage()
    parent = Sequence(request("1", [1] * 5), 0, 1, [1] * 8)
    run(states, Chunk(parent, 0, first))
    forks = [Sequence(request(str(1), [1] * 5), choice, 1, [1] * 8) for choice in (1, 2)]
    assert run(states, Chunk(parent, first, 8 - first, forks=forks)) == {
        parent: wanted(1, first, 8)
    }
    found = run(states, Chunk(forks[1], 5, 3), Chunk(forks[0], 5, 1), Chunk(parent, 8, 1))
    assert found == {forks[1]: wanted(1, 5, 8), forks[0]: wanted(1, 5, 6), parent: wanted(1, 8, 9)}


def test_a_kept_state_is_where_another_sequence_goes_on() -> None:
    states = storage(places=2)
    first = sequence(1)
    run(states, Chunk(first, 0, 4))
    states.keep([StateCopy(first, 1)])
    run(states, Chunk(first, 4, 3))
    states.release([first])
    second, third = sequence(1), sequence(1)
    found = run(states, Chunk(second, 4, 1, restored=1), Chunk(third, 4, 2, restored=1))
    assert found == {second: wanted(1, 4, 5), third: wanted(1, 4, 6)}


def test_a_state_never_goes_on_where_it_does_not_end() -> None:
    states = storage(places=1)
    one = sequence(1)
    run(states, Chunk(one, 0, 4))
    states.keep([StateCopy(one, 0)])
    states.step(states.prepare([Chunk(one, 4, 1)]))  # and then its step fails
    with pytest.raises(ValueError, match="5 tokens seen, and a chunk begins at 4"):
        states.step(states.prepare([Chunk(one, 4, 1)]))
    with pytest.raises(AssertionError, match="5 tokens seen, 4 computed"):
        states.check_integrity()
    other = sequence(2)
    with pytest.raises(ValueError, match="4 tokens seen, and a chunk begins at 6"):
        states.step(states.prepare([Chunk(other, 6, 2, restored=0)]))
    states.release([other])
    assert run(states, Chunk(one, 0, 3)) == {one: wanted(1, 0, 3)}
    with pytest.raises(AssertionError, match="1 slots are still used"):
        states.check_integrity(idle=True)

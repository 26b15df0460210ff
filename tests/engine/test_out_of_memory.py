"""Memory that ends while something is computed costs the newest request, and nothing else."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from reft_runtime.edits.step import StepEdits
from reft_runtime.engine import runner
from reft_runtime.engine.events import Event, Failed, TokenMade
from reft_runtime.engine.loop import EngineLoop
from reft_runtime.engine.settle import OUT_OF_MEMORY
from reft_runtime.machine.memory import MappedMemory, check_room, is_out_of_memory
from tests.helpers.models import answers, intervention, make_core, prompt, request, run

ONEDNN = "could not create a primitive"
"""What oneDNN says under `prlimit --as`, through torch."""

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError(ONEDNN), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not execute a primitive"), True),
        (RuntimeError(ALLOCATOR), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError(ONEDNN), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) is memory


def test_mapped_memory() -> None:
    memory = MappedMemory(5000, torch.float32)
    assert memory.numbers.shape == (5000,)
    assert not memory.numbers.any()
    memory.numbers.fill_(1)
    memory.drop(0, 1023)  # less than a page
    memory.drop(1, 2047)
    assert memory.numbers.all()
    memory.drop(1, 2048)
    assert memory.numbers.nonzero().flatten().tolist() == [*range(1024), *range(2048, 5000)]
    with pytest.raises(MemoryError):
        check_room(1 << 60)


def once(real: Callable[..., Any], error: Exception, when: Callable[..., bool]) -> Any:
    """`real`, which raises the first time that it is called and `when` says so."""
    left = [error]

    def call(*args: Any, **options: Any) -> Any:
        if left and when(*args, **options):
            raise left.pop()
        return real(*args, **options)

    return call


@pytest.mark.parametrize("where", ["edits", "sampler", "room", "rows", "blocks"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ALLOCATOR)])
def test_it_costs_the_newest_wherever_it_is_met(
    monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    """Also where another's edit, row or token met it."""
    asked = [request(f"{i}", prompt(40 + i, seed=i), intervention(i)) for i in range(4)]
    wanted = run(make_core(), asked)
    core = make_core()
    storage: Any = core.runner.storage

    def always(*_: Any) -> bool:
        return True

    patches: dict[str, tuple[Any, str]] = {
        "edits": (StepEdits, "_as_row_edits"),
        "sampler": (runner, "sample"),
        "room": (runner, "check_room"),
        "rows": (storage, "ensure"),
        "blocks": (storage, "keep"),
    }
    target, name = patches[where]
    monkeypatch.setattr(target, name, once(getattr(target, name), error, always))
    found = answers(core, asked)
    failed = {name: answer.failed for name, answer in found.items() if answer.failed}
    assert failed == ({} if where == "blocks" else {"3": OUT_OF_MEMORY})
    for name in set(wanted) - set(failed):
        assert found[name].tokens == wanted[name]
    assert run(core, asked) == wanted


class Listener:
    """Notes the events of requests, and tells when all have ended."""

    def __init__(self, requests: int) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self._left = requests

    def __call__(self, events: Sequence[Event]) -> None:
        self.events += events
        for event in events:
            done = isinstance(event, Failed) or (
                isinstance(event, TokenMade) and event.finish_reason
            )
            self._left -= bool(done)
        if not self._left:
            self.ended.set()


def test_a_thread_in_which_no_code_can_be_made_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    spoiled: list[int] = []
    real = core.runner.run

    def fragile(chunks: Any) -> Any:
        """Once it has failed in a thread it fails there for ever, as oneDNN does."""
        here = threading.get_ident()
        if not spoiled or here in spoiled:
            spoiled.append(here)
            raise RuntimeError(ONEDNN)
        return real(chunks)

    monkeypatch.setattr(core.runner, "run", fragile)
    loop = EngineLoop(core, 10, 10_000)
    first = loop._thread
    try:
        listener = Listener(3)
        for i in range(3):
            loop.submit(request(f"{i}", prompt(9, seed=i)), listener)
        assert listener.ended.wait(60)
        failed = [event for event in listener.events if isinstance(event, Failed)]
        assert [event.out_of_memory for event in failed] == [True]
        assert loop.alive
        assert loop._thread is not first
        loop.check_integrity()
    finally:
        loop.close()
    assert not loop.alive
    first.join(10)
    assert not first.is_alive()


def test_a_request_that_cannot_be_taken_in_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    add = once(core.scheduler.add, MemoryError(), lambda s: s.request.id == "1")
    monkeypatch.setattr(core.scheduler, "add", add)
    loop = EngineLoop(core, 10, 10_000)
    try:
        listener = Listener(3)
        for i in range(3):
            loop.submit(request(f"{i}", prompt(9, seed=i)), listener)
        assert listener.ended.wait(60)
        failed = [event for event in listener.events if isinstance(event, Failed)]
        assert [(event.request_id, event.out_of_memory) for event in failed] == [("1", True)]
        loop.check_integrity()
    finally:
        loop.close()

"""Memory that is full: who waits, in which order, and what is evicted meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from reft_runtime.errors import EngineDead, InvalidRequest, NotFound, Overloaded, Unavailable
from reft_runtime.interventions import Registry, Version
from reft_runtime.interventions.registry.holding import Holding
from tests.interventions.make import BASE, digest, edit_bytes, file_bytes, place, ready

FILES = {name: file_bytes(seed) for seed, name in enumerate("abcdef")}
ONE = edit_bytes(FILES["a"])

Make = Callable[..., Registry]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a registry of the files, with room for the tensors of so many of them."""
    for name, data in FILES.items():
        place(tmp_path, name, data)
    made: list[Registry] = []

    def registry(room: float, **options: Any) -> Registry:
        made.append(Registry(BASE, [tmp_path], memory_bytes=int(room * ONE), **options))
        return made[-1]

    yield registry
    for each in made:
        each.close()


def acquired(registry: Registry, *names: str) -> Holding:
    holding = registry.acquire(names)
    holding.ready.result(60)
    return holding


def test_who_waits_is_served_in_order_of_arrival_and_nobody_goes_ahead(make: Make) -> None:
    registry = make(2)
    first, second = acquired(registry, "a"), acquired(registry, "b")
    cold, hot, other = (registry.acquire([name]) for name in "cab")
    assert [each.granted for each in (cold, hot, other)] == [False, False, False]
    assert registry.waiting() == 3
    first.release()
    cold.ready.result(60)  # before those whose tensors were in memory already
    assert (hot.granted, other.granted) == (False, False)
    second.release()
    hot.ready.result(60)
    assert not other.granted
    cold.release()
    other.ready.result(60)
    assert registry.waiting() == 0


def test_all_of_a_request_is_held_together_or_nothing(make: Make) -> None:
    registry = make(3)
    first = acquired(registry, "a", "b")
    waiting = registry.acquire(["c", "d"])
    assert not waiting.granted
    assert registry.held_bytes() == 2 * ONE  # it takes no memory for a part of it
    assert registry.entry("c").in_flight == 1  # but is addressable
    first.release()
    waiting.ready.result(60)
    assert [version.name for version in waiting.versions] == ["c", "d"]


def test_the_same_version_needs_room_once(make: Make) -> None:
    registry = make(1)
    first = acquired(registry, "a", "a")
    second = registry.acquire(["a"])
    assert second.granted
    registry.hold(first.versions[0])
    first.release()
    second.release()
    waiting = registry.acquire(["b"])
    assert not waiting.granted  # a request still holds it
    registry.release(first.versions[0])
    waiting.ready.result(60)


def test_who_leaves_makes_way_for_those_behind(make: Make) -> None:
    registry = make(2)
    first, second = acquired(registry, "a"), acquired(registry, "b")
    large, small = registry.acquire(["c", "d"]), registry.acquire(["c"])
    second.release()
    assert (large.granted, small.granted) == (False, False)
    large.release()
    large.release()
    small.ready.result(60)
    assert registry.entry("d").in_flight == 0
    assert not first.released


@pytest.mark.parametrize("by_request", [False, True])
def test_what_is_let_go_above_the_bound_is_evicted(make: Make, by_request: bool) -> None:
    registry = make(2)
    holding = acquired(registry, "a", "b")
    if by_request:
        for version in holding.versions:
            registry.hold(version)
        holding.release()
    registry.put("f", FILES["f"])  # whose line of the listing nothing could make room for
    assert registry.held_bytes() > 2 * ONE
    if by_request:
        for version in holding.versions:
            registry.release(version)
    else:
        holding.release()
    assert registry.held_bytes() <= 2 * ONE
    assert registry.tiers()["host"] == 1


def test_a_version_that_goes_while_room_is_made_takes_none(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make(1)
    ready(registry, "a")
    replaceable = Version.replaceable

    def gone(version: Version) -> bool:
        if version.name == "a":
            (tmp_path / "a.safetensors").unlink(missing_ok=True)
            with pytest.raises(NotFound):
                registry.resolve("a")
        return replaceable(version)

    monkeypatch.setattr(Version, "replaceable", gone)
    ready(registry, "b")  # in the place of the other, which is the only copy by now
    assert ready(registry, "c").edits()
    assert registry.held_bytes() <= ONE


def test_more_than_there_may_be_is_refused_at_once(make: Make) -> None:
    registry = make(1.5)
    first = acquired(registry, "a")
    with pytest.raises(InvalidRequest, match=f"take {2 * ONE} bytes of memory") as caught:
        registry.acquire(["a", "b"])
    assert caught.value.param == "interventions"
    first.release()
    assert registry.entry("a").in_flight == registry.entry("b").in_flight == 0


def test_so_many_may_wait(make: Make) -> None:
    registry = make(1, max_waiting=2)
    acquired(registry, "a")
    for name in "bc":
        registry.acquire([name])
    with pytest.raises(Overloaded, match="2 requests wait for memory"):
        registry.acquire(["d"])
    assert acquired(registry).versions == []  # the base model's requests wait for nobody


def test_on_a_device_the_tensors_in_use_fit_there_too(make: Make) -> None:
    registry = make(6, device_bytes=2 * ONE)
    first, second = acquired(registry, "a"), acquired(registry, "b")
    third = registry.acquire(["c"])
    assert not third.granted
    assert registry.held_bytes() == 2 * ONE
    first.release()
    third.ready.result(60)
    assert registry.held_bytes() == 3 * ONE  # what nobody uses stays in the host's memory
    second.release()
    third.release()
    alone = registry.acquire(["a", "b", "c"])  # a step of one request may take more there
    assert alone.granted


def test_closing_lets_nobody_wait(make: Make) -> None:
    registry = make(1)
    acquired(registry, "a")
    waiting = registry.acquire(["b"])
    registry.close()
    with pytest.raises(EngineDead):
        waiting.ready.result(60)
    with pytest.raises(EngineDead):
        registry.acquire(["a"])


@pytest.mark.parametrize(
    ("room", "wanted"),
    [
        (6, [*"abcdefabcdef"]),  # most wait for a thread that reads
        (3, ["a", "bcd", "e", "f"]),  # where `bcd` goes, there is room for the others
    ],
)
def test_closing_tells_everybody_also_those_whose_turn_has_come(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: float,
    wanted: list[str],
) -> None:
    registry = make(room)
    reading, go_on = threading.Semaphore(0), threading.Event()
    edits = Version.edits

    def slow(version: Version) -> Any:
        reading.release()
        go_on.wait(60)
        return edits(version)

    monkeypatch.setattr(Version, "edits", slow)
    holdings = [registry.acquire([*names]) for names in wanted]
    assert reading.acquire(timeout=60)
    closing = threading.Thread(target=registry.close)
    closing.start()
    closing.join(60)
    go_on.set()
    errors = [holding.ready.exception(60) for holding in holdings]
    assert {type(error) for error in errors} <= {EngineDead, type(None)}
    assert sum(error is not None for error in errors) >= len(errors) // 2
    assert not caplog.records
    for holding in holdings:
        holding.release()
    assert all(entry.in_flight == 0 for entry in registry.entries())


def test_a_version_is_read_once_and_takes_nobodys_thread(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make(6)
    go, reads = threading.Event(), list[str]()
    load = Version._load

    def slow(version: Version) -> object:
        reads.append(version.name)
        assert go.wait(60)
        return load(version)

    monkeypatch.setattr(Version, "_load", slow)
    holdings = [registry.acquire([name]) for name in "aaabbb"]
    assert all(each.granted for each in holdings)
    assert not any(each.ready.done() for each in holdings)
    go.set()
    for each in holdings:
        each.ready.result(60)
    assert sorted(reads) == ["a", "b"]


def test_a_file_that_goes_while_it_is_waited_for(make: Make, tmp_path: Path) -> None:
    registry = make(1)
    first = acquired(registry, "a")
    gone, new, named = (registry.acquire([ref]) for ref in ("b", "c", f"d@{digest(FILES['d'])}"))
    (tmp_path / "b.safetensors").unlink()
    for name in "cd":
        place(tmp_path, name, FILES["f"])
    first.release()
    with pytest.raises(NotFound):
        gone.ready.result(60)
    new.ready.result(60)
    assert new.versions[0].digest == digest(FILES["f"])
    new.release()
    with pytest.raises(Unavailable, match="changed since"):  # the very version was asked for
        named.ready.result(60)
    assert {entry.in_flight for entry in registry.entries()} == {0}


@pytest.mark.parametrize("seed", range(4))
def test_everybody_is_served_and_the_bound_holds(make: Make, seed: int) -> None:
    """Hot tasks that come all the time do not keep cold ones out."""
    chance = random.Random(seed)
    registry = make(3)
    done: list[Future[None]] = []
    asked = [chance.choice((["a"], ["a", "b"], ["c"], ["d", "e", "f"])) for _ in range(60)]

    def serve(mine: list[list[str]]) -> None:
        for names in mine:
            holding = registry.acquire(names)
            holding.ready.result(60)
            assert all(version.loaded for version in holding.versions)
            assert registry.held_bytes() <= 3 * ONE
            holding.release()
            done.append(holding.ready)

    threads = [threading.Thread(target=serve, args=(asked[first::4],)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 60
    assert registry.waiting() == 0
    assert {entry.in_flight for entry in registry.entries()} == {0}
    assert ready(registry, "a").edits()

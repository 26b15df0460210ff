"""What a follower is told leaves its storage as rank 0's is; here both are in one process."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import Pipe
from typing import Any

import pytest

from reft_runtime.engine import core as engine_core
from reft_runtime.engine.core import EngineCore
from reft_runtime.engine.runner import Runner
from reft_runtime.errors import EngineDead
from reft_runtime.kv.choice import storage_for
from reft_runtime.parallel.channel import receive, send
from reft_runtime.parallel.follower import Mirror, ToldPlaces
from reft_runtime.parallel.leader import Leader
from reft_runtime.schedule.budget import BlockBudget
from tests.helpers.models import DEVICE, intervention, prompt, request, tiny_llama
from tests.helpers.pages import storage_in_pages
from tests.parallel.conftest import CONFIG

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="rows and pages are both on a CPU")


class Pair:
    """Rank 0's core, and a follower's mirror of its runner, which takes what was sent."""

    def __init__(self, storage: Any, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(engine_core, "storage_for", storage)
        here, self.there = Pipe()
        self.lost: list[str] = []
        self.leader = Leader({1: here}, lambda _: "is gone", self.lost.append)
        loaded = tiny_llama()[1]
        self.core = EngineCore(loaded, CONFIG, lambda: 0.0, self.leader)
        places = ToldPlaces()
        budget = BlockBudget(CONFIG.kv_tokens)
        own = storage(loaded, budget, CONFIG.max_running, places)
        self.runner = Runner(loaded, own)
        self.mirror = Mirror(self.runner, places)

    def run(self, seed: int) -> None:
        """Some requests with preemptions and evictions."""
        for i in range(6):
            asked = prompt(60 + 5 * i, seed + i)
            edits = [intervention(i)] if i % 2 else []
            self.core.add(request(f"{seed} {i}", asked, *edits, n=1 + i % 2, max_tokens=20))
        while not self.core.idle:
            self.core.step()
            while self.there.poll():
                self.mirror.do(receive(self.there))


@pytest.fixture(params=[storage_for, storage_in_pages], ids=["rows", "pages"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    made = Pair(request.param, monkeypatch)
    yield made
    made.leader.close()


def test_storages_hold_the_same(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    storages: list[Any] = [pair.core.runner.storage, pair.runner.storage]
    dropped: list[list[set[int]]] = [[], []]
    for storage, told in zip(storages, dropped, strict=True):
        if pool := getattr(storage, "_pool", None):
            monkeypatch.setattr(pool, "drop", lambda places, told=told: told.append(set(places)))
    for turn in range(3):
        pair.run(10 * turn)
    cache = pair.core.scheduler.cache
    assert cache is not None
    assert cache.stats().evictions > 0
    assert pair.core.scheduler.preemptions > 0
    assert dropped[0] == dropped[1]
    if hasattr(storages[0], "_kept"):
        assert storages[0]._kept == storages[1]._kept
        assert storages[0]._free == storages[1]._free
    else:
        assert any(dropped[0])
    pair.runner.check_integrity(idle=True)


def test_a_follower_that_is_gone_ends_the_core(pair: Pair) -> None:
    pair.core.add(request("a", prompt(9)))
    pair.there.close()
    with pytest.raises(EngineDead, match="Rank 1 of --tensor-parallel is gone"):
        pair.core.step()
    assert pair.lost == ["Rank 1 of --tensor-parallel is gone"]


def test_what_a_follower_says_of_its_end_is_told(pair: Pair) -> None:
    send([pair.there], "failed: no memory")
    pair.there.close()
    assert pair.leader.lost(30) == "Rank 1 of --tensor-parallel failed: no memory"

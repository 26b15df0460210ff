"""The simulation of routing: known answers, and what holds for every ring."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import ring
from benchmarks.hashing import Rendezvous, Ring, hashes

RANKED_BY_RAY = {
    "pirate": "cba",
    "emoji": "abc",
    "formal": "abc",
    "sentiment": "cab",
    "tickets": "abc",
    "task-0": "bac",
}
"""What ConsistentHashRouter of Ray 2.60 chooses for replicas with the ids a, b and c."""


def test_a_ring_chooses_what_ray_chooses() -> None:
    three = Ring("abc")
    found = {name: three.ranked(name, 3) for name in RANKED_BY_RAY}
    assert found == {name: ["abc".index(x) for x in by] for name, by in RANKED_BY_RAY.items()}


@pytest.mark.parametrize("way", [Ring, Rendezvous])
def test_many_names_at_once_are_placed_as_one_by_one(way: type[Ring | Rendezvous]) -> None:
    placement, names = way(ring.ids(7)), [f"task-{n}" for n in range(200)]
    every = placement.owners(hashes(names), 3)
    assert every.tolist() == [placement.ranked(name, 3) for name in names]
    assert all(len(set(row)) == 3 for row in every.tolist())
    assert placement.ranked("pirate", 9) == placement.ranked("pirate", 7)


@pytest.mark.parametrize("way", [Ring, Rendezvous])
def test_only_the_names_of_the_replica_that_joins_or_leaves_move(
    way: type[Ring | Rendezvous],
) -> None:
    names = hashes([f"task-{n}" for n in range(4_000)])
    nodes = ring.ids(20)
    shares = ring.moved(way, nodes, names)
    for change, expected in (
        ("one joins", 1 / 21),
        ("one leaves", 1 / 20),
        ("one is replaced", 2 / 20),
        ("a tenth joins", 2 / 22),
    ):
        assert shares[change] == pytest.approx(expected, rel=0.4)
    before, after = way(nodes).owners(names, 1), way([*nodes, "new"]).owners(names, 1)
    assert set(after[before != after].tolist()) == {len(nodes)}


def test_hits_of_a_memory_that_holds_all_half_and_next_to_nothing() -> None:
    equal = np.full(1_000, 1e-3)
    assert ring.hit_rate(equal, 1_000) == 1
    assert ring.hit_rate(equal, 500) == pytest.approx(0.5, abs=1e-3)
    popular = ring.zipf(1_000, 1.0)
    assert ring.hit_rate(popular, 100) > 0.5 > ring.hit_rate(popular, 1)


def test_a_name_that_is_too_much_for_its_replicas_finds_no_room_under_one_key() -> None:
    names, nodes = [f"task-{n}" for n in range(2_000)], ring.ids(40)
    shares = ring.zipf(len(names), 1.2)
    one, several = (
        ring.spill(Ring(nodes), names, shares, 40, {"fallbacks": 2, "several keys": many})
        for many in (False, True)
    )
    # The first name is a fifth of all requests; three of 40 replicas take 3 / 40 / 0.6 of them.
    assert one["no room"] > 0.05
    assert several["no room"] < one["no room"] / 5
    assert sum(several[where] for where in ("own", "stepped in", "no room")) == pytest.approx(1)


def test_the_same_figures_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [ring.simulate(10, 500) for _ in range(2)]
    for result in found:
        del result["cost"]  # times
    assert found[0] == found[1]
    ring.main(10, 500, tmp_path / "ring.json")
    assert "| rendezvous " in capsys.readouterr().out
    assert '"one joins"' in (tmp_path / "ring.json").read_text()

"""Routing by intervention at the size of a thousand replicas and a million interventions.

    python -m benchmarks.ring --out docs/measurements/ring.json

A simulation, without servers. Printed are tables of what a ring costs its router; how evenly it
spreads names; how many names move when replicas come and go; how often a request meets tensors that
are in memory, beside routing at random; and what becomes of names that are asked for more often
than one replica can answer. Popularity follows Zipf's law: the name of rank r is asked for in
proportion to r ** -s. Two minutes.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.hashing import (
    FALLBACKS,
    VIRTUAL_NODES,
    Hashes,
    Indices,
    Placement,
    Rendezvous,
    Ring,
    hashes,
)
from benchmarks.measuring import machine, table

Shares = NDArray[np.float64]
Row = dict[str, Any]

LOOKUPS = 2_000
NODES = (VIRTUAL_NODES, 1_000)
EXPONENTS = (0.8, 1.0)
FILE_BYTES = (50_000, 250_000, 1_000_000)
BUDGET = 2**30
SLOTS = 64
"""Requests that one replica takes at once, before it sends the next one away."""
UTILISATION = 0.6
"""Part of all replicas' slots that is busy on the average."""
SERVICES = 4
"""Mean service times that are simulated; the first is not counted."""


def zipf(names: int, exponent: float) -> Shares:
    """Each name's share of all requests, the most popular first."""
    weights = np.arange(1, names + 1, dtype=np.float64) ** -exponent
    shares: Shares = weights / weights.sum()
    return shares


def ids(count: int, seed: int = 0) -> list[str]:
    """Replica ids as Ray makes them: eight random letters and digits."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=8)) for _ in range(count)]


def cost(make: Callable[[], Placement], names: Sequence[str]) -> Row:
    """What a router pays: seconds and bytes to build it, seconds of a look-up."""
    began = time.perf_counter()
    placement = make()
    built = time.perf_counter() - began
    some = [names[i] for i in random.Random(0).choices(range(len(names)), k=LOOKUPS)]
    began = time.perf_counter()
    for name in some:
        placement.ranked(name, 1 + FALLBACKS)
    lookup = (time.perf_counter() - began) / LOOKUPS
    tracemalloc.start()
    kept = make()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return {"build_ms": 1e3 * built, "bytes": size, "lookup_us": 1e6 * lookup}


def over_mean(loads: NDArray[Any]) -> float:
    """The largest of the loads over their mean."""
    return float(loads.max() / loads.mean())


def spread(owners: Indices, replicas: int) -> Row:
    """How unevenly names, and requests for them, fall on replicas: largest over mean."""
    first = owners[:, 0]
    found: Row = {"names": over_mean(np.bincount(first, minlength=replicas))}
    for exponent in EXPONENTS:
        loads = np.bincount(first, zipf(len(first), exponent), replicas)
        found[f"requests, s={exponent}"] = over_mean(loads)
    return found


def moved(make: Callable[[Sequence[str]], Placement], replicas: list[str], names: Hashes) -> Row:
    """Share of names with another replica after changes of the set of replicas."""

    def owned(by: Sequence[str]) -> NDArray[np.str_]:
        found: NDArray[np.str_] = np.array(by)[make(by).owners(names, 1)[:, 0]]
        return found

    before = owned(replicas)
    more = ids(max(1, len(replicas) // 10), seed=1)
    changes = {
        "one joins": [*replicas, more[0]],
        "one leaves": replicas[1:],
        "one is replaced": [more[0], *replicas[1:]],
        "a tenth joins": [*replicas, *more],
    }
    return {what: float((owned(by) != before).mean()) for what, by in changes.items()}


def hit_rate(shares: Shares, room: int) -> float:
    """Share of requests that meet their tensors in a memory with room for so many names.

    The least recently used are evicted. By Che's approximation: a name is in memory if it was asked
    for within a time t, the same for all names, which is such that as many are there as have room.
    """
    if len(shares) <= room:
        return 1.0
    low, high = 0.0, 1.0 / float(shares.min())
    while float(-np.expm1(-shares * high).sum()) < room:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if float(-np.expm1(-shares * middle).sum()) < room:
            low = middle
        else:
            high = middle
    return float((shares * -np.expm1(-shares * high)).sum() / shares.sum())


def residency(owners: Indices, replicas: int, exponent: float) -> list[Row]:
    """What is in memory where a name always meets its own replica, and where it meets any."""
    shares = zipf(len(owners), exponent)
    order = np.argsort(owners[:, 0], kind="stable")
    per_replica = np.bincount(owners[:, 0], minlength=replicas)
    groups = np.split(shares[order], np.cumsum(per_replica)[:-1])
    rows = []
    for size in FILE_BYTES:
        room = BUDGET // size
        own = sum(float(g.sum()) * hit_rate(g, room) for g in groups if len(g))
        largest = min(int(per_replica.max()), room)
        rows.append(
            {
                "file_bytes": size,
                "resident_bytes_mean": float(np.minimum(per_replica, room).mean() * size),
                "resident_bytes_max": largest * size,
                "hits_by_name": own,
                "hits_at_random": hit_rate(shares, room),
            }
        )
    return rows


def keys_of(shares: Shares, replicas: int, fallbacks: int) -> list[int]:
    """Under how many keys each name is sent, so that no key is too much for its replicas.

    A key may take a third of the slots of its replicas; the rest is for the other names there.
    """
    load = shares * replicas * SLOTS * UTILISATION
    return [max(1, math.ceil(one / (SLOTS * (1 + fallbacks) / 3))) for one in load.tolist()]


def spill(ring: Ring, names: Sequence[str], shares: Shares, replicas: int, choice: Row) -> Row:
    """Where requests find room: at their own replica, at one that steps in, or nowhere.

    They come at random times and take an exponential time; each takes a slot of the first of its
    replicas that has one. One that finds none is counted and leaves (Ray would try again).
    """
    fallbacks = int(choice["fallbacks"])
    count = 1 + fallbacks
    keys = keys_of(shares, replicas, fallbacks) if choice["several keys"] else [1] * len(names)
    hot = {i: [f"{names[i]}#{k}" for k in range(n)] for i, n in enumerate(keys) if n > 1}
    rng, uniform = random.Random(0), np.random.default_rng(0)
    rate = replicas * SLOTS * UTILISATION
    total = int(rate * SERVICES)
    asked = np.searchsorted(shares.cumsum(), uniform.random(total)).clip(max=len(names) - 1)
    busy = [0] * replicas
    ends: list[tuple[float, int]] = []
    found = [0] * (count + 1)
    seen: dict[str, list[int]] = {}
    now = 0.0
    for number in asked.tolist():
        now += rng.expovariate(rate)
        while ends and ends[0][0] <= now:
            busy[heapq.heappop(ends)[1]] -= 1
        key = rng.choice(hot[number]) if number in hot else names[number]
        ranked = seen.get(key)
        if ranked is None:
            ranked = seen[key] = ring.ranked(key, count)
        rank = next((r for r, replica in enumerate(ranked) if busy[replica] < SLOTS), count)
        if rank < count:
            busy[ranked[rank]] += 1
            heapq.heappush(ends, (now + rng.expovariate(1), ranked[rank]))
        if now > 1:
            found[rank] += 1
    all_of_them = sum(found)
    return {
        **choice,
        "own": found[0] / all_of_them,
        "stepped in": sum(found[1:count]) / all_of_them,
        "no room": found[count] / all_of_them,
        "names with several keys": len(hot),
    }


def simulate(replicas: int, names: int) -> Row:
    """All figures, as the file of results holds them."""
    nodes = ids(replicas)
    called = [f"task-{number}" for number in range(names)]
    hashed = hashes(called)
    ways: dict[str, Callable[[Sequence[str]], Placement]] = {
        **{f"ring, {n} virtual nodes": partial(Ring, virtual_nodes=n) for n in NODES},
        "rendezvous": Rendezvous,
    }
    result: Row = {"replicas": replicas, "names": names, "cost": {}, "spread": {}, "moved": {}}
    for way, make in ways.items():
        owners = make(nodes).owners(hashed, 1)
        result["cost"][way] = cost(partial(make, nodes), called)
        result["spread"][way] = spread(owners, replicas)
        result["moved"][way] = moved(make, nodes, hashed)
    ring = Ring(nodes)
    owners = ring.owners(hashed, 1)
    result["residency"] = {f"s={s}": residency(owners, replicas, s) for s in EXPONENTS}
    choices: list[Row] = [
        {"fallbacks": FALLBACKS, "several keys": False},
        {"fallbacks": 16, "several keys": False},
        {"fallbacks": FALLBACKS, "several keys": True},
    ]
    result["spill"] = {
        f"s={s}": [spill(ring, called, zipf(names, s), replicas, one) for one in choices]
        for s in EXPONENTS
    }
    return result


def tables(result: Row) -> str:
    """The figures as tables."""

    def shown(value: object) -> object:
        return float(f"{value:.3g}") if isinstance(value, float) else value

    def one(title: str, rows: Sequence[tuple[str, Row]]) -> str:
        header = [title, *rows[0][1]]
        return table(header, [[name, *map(shown, row.values())] for name, row in rows])

    parts = [one(part, [*result[part].items()]) for part in ("cost", "spread", "moved")]
    parts += [
        one(part, [(s, row) for s, rows in result[part].items() for row in rows])
        for part in ("residency", "spill")
    ]
    return "\n\n".join(parts)


def main(
    replicas: Annotated[int, typer.Option(min=2)] = 1_000,
    names: Annotated[int, typer.Option(min=2, help="Interventions.")] = 1_000_000,
    out: Annotated[Path | None, typer.Option(help="Keep the figures here.")] = None,
) -> None:
    """Simulate, and print tables."""
    result = simulate(replicas, names)
    print(tables(result))
    if out is not None:
        out.write_text(json.dumps({**machine(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

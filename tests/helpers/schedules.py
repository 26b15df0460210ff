"""Requests that come and are aborted at certain steps, and what each must get."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from reft_runtime.engine.core import EngineCore
from reft_runtime.schedule.request import Request
from tests.helpers.models import Answer, step

Timed = tuple[Request, int, int | None]
"""A request, and the steps before which it arrives and is aborted."""


def check_as_alone(
    core: EngineCore,
    requests: SequenceOf[Timed],
    alone: Callable[[Request], dict[int, list[int]]],
) -> None:
    """Run requests; each must get the tokens by choice that `alone` gives, an aborted one some."""
    found: dict[str, Answer] = {}
    aborted: set[str] = set()
    at = 0
    while at <= 25 or not core.idle:
        for each, arrives, aborts in requests:
            if arrives == at:
                core.add(each)
            if aborts == at >= arrives:
                core.abort(each.id)
                core.check_integrity()
                aborted.add(each.id)
        step(core, found)
        at += 1
    for each, _, _ in requests:
        wanted = alone(each)
        made = found[each.id].tokens if each.id in found else {}
        if each.id in aborted:
            assert all(ids == wanted[choice][: len(ids)] for choice, ids in made.items())
        else:
            assert made == wanted, each.id

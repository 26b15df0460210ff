"""A model over two ranks answers as in one process, whatever its requests ask for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from reft_runtime.engine.core import EngineCore
from reft_runtime.engine.events import Event, Explained, LabelsScored, Traced
from reft_runtime.errors import WrongBaseModel
from reft_runtime.schedule.labels import LabelTree
from reft_runtime.schedule.request import AppliedIntervention, Request
from tests.helpers.models import HIDDEN, intervention, preempt, prompt, request
from tests.helpers.reference import SHAPES, RandomEdit, applied

Cores = tuple[EngineCore, EngineCore]

KINDS = {
    kind: applied(RandomEdit(kind, "f2+l2+decode", seed=i)).intervention
    for i, kind in enumerate(SHAPES)
} | {
    component: applied(RandomEdit("loreft", "all", component=component, seed=20)).intervention
    for component in (
        "block_input",
        "attention_input",
        "attention_output",
        "mlp_input",
        "mlp_output",
    )
}


def events(core: EngineCore, *asked: Request, after: int = 0) -> list[Event]:
    """What a core tells of requests; each but the first is added `after` steps more."""
    told: list[Event] = []
    waiting = list(asked)
    steps = 0
    while waiting or not core.idle:
        while waiting and steps >= after * (len(asked) - len(waiting)):
            core.add(waiting.pop(0))
        told += core.step()
        core.check_integrity()
        steps += 1
    return told


def rounded(told: list[Event]) -> dict[str, list[Any]]:
    """Events by request, without times, and with numbers as far as two forwards agree."""
    found: dict[str, list[Any]] = {}
    for event in told:
        values = dataclasses.asdict(event)
        values.pop("at", None)
        # A question of a trace has an id of its own in every run.
        found.setdefault(event.request_id, []).append((type(event), _near(values)))
    return found


def _near(value: Any) -> Any:
    match value:
        case float():
            return pytest.approx(value, rel=1e-3, abs=1e-3)
        case dict():
            return {key: _near(each) for key, each in value.items()}
        case list() | tuple():
            return [_near(each) for each in value]
    return value


def same(cores: Cores, *asked: Request, after: int = 0) -> list[Event]:
    """Check that both cores tell the same of requests; returns it."""
    told = [events(core, *asked, after=after) for core in cores]
    plain = {
        name: [(type(e), dataclasses.asdict(e)) for e in told[0] if e.request_id == name]
        for name in {event.request_id for event in told[0]}
    }
    for each in plain.values():
        for _, values in each:
            values.pop("at", None)
    wanted = rounded(told[1])
    assert plain.keys() == wanted.keys()
    for name, each in plain.items():
        assert _lists(each) == wanted[name], name
    return told[0]


def _lists(value: Any) -> Any:
    match value:
        case dict():
            return {key: _lists(each) for key, each in value.items()}
        case tuple() if len(value) == 2 and isinstance(value[0], type):
            return value[0], _lists(value[1])
        case list() | tuple():
            return [_lists(each) for each in value]
    return value


def mixed(count: int, length: int = 30, **sampling: Any) -> list[Request]:
    """Requests without and with one or two of many interventions."""
    return [
        request(
            f"{i}",
            prompt(length + 3 * i, seed=i),
            *(intervention(i + j, 1 + 0.5 * j) for j in range(i % 3)),
            **sampling,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["base", "loreft"])
def test_one_request_alone(cores: Cores, kind: str) -> None:
    edits = [KINDS[kind]] if kind in KINDS else []
    same(cores, request(kind, prompt(19), *edits))


def test_a_batch_of_every_kind(cores: Cores) -> None:
    asked = [request(kind, prompt(9 + i), KINDS[kind]) for i, kind in enumerate(KINDS)]
    same(cores, *asked, request("base", prompt(40)), after=1)


def test_requests_that_come_one_by_one_in_chunks(cores: Cores) -> None:
    same(cores, *mixed(7, max_tokens=12), after=2)


def test_keys_and_values_that_outgrow_their_room(cores: Cores) -> None:
    same(cores, request("a", prompt(120), intervention(1), max_tokens=30))


def test_several_choices_sampled_with_a_seed(cores: Cores) -> None:
    same(
        cores,
        request("a", prompt(45), intervention(3), n=3, temperature=1, seed=7, top_p=0.9),
        request("b", prompt(11), n=2, temperature=0.7, seed=8, frequency_penalty=0.5),
    )


def test_logprobs_of_prompt_and_answer(cores: Cores) -> None:
    same(
        cores,
        request("a", prompt(31), intervention(5), logprobs=3, prompt_logprobs=2),
        request("b", prompt(50), prompt_logprobs=1, max_tokens=0),
    )


def test_the_prefix_cache_is_reused(cores: Cores) -> None:
    for name in ("a", "b"):
        asked = [
            request(f"{name}{i}", prompt(80), *edits)
            for i, edits in enumerate(([], [intervention(0)], [intervention(1)]))
        ]
        same(cores, *asked, after=30)
    hits = [core.scheduler.cache.stats().hits for core in cores if core.scheduler.cache]
    assert hits[0] == hits[1]
    assert hits[0]["base"] > 100
    assert hits[0]["own"] > 0


def test_blocks_are_evicted_and_their_places_used_again(cores: Cores) -> None:
    for turn in range(2):
        same(cores, *mixed(5, length=60 + 10 * turn), after=4)
    caches = [core.scheduler.cache for core in cores]
    assert [cache.stats().evictions > 0 for cache in caches if cache] == [True, True]


def test_preemption_for_want_of_memory(cores: Cores) -> None:
    before = [core.scheduler.preemptions for core in cores]
    same(cores, *mixed(6, length=70, max_tokens=90))
    made = [core.scheduler.preemptions - n for core, n in zip(cores, before, strict=True)]
    assert made[0] == made[1] > 0


def test_preemption_at_any_step(cores: Cores) -> None:
    asked = mixed(3, length=40, max_tokens=10)
    wanted = events(cores[1], *asked)
    for core in cores:
        for each in asked:
            core.add(each)
        told: list[Event] = []
        for turn in range(9):
            told += core.step()
            running = core.scheduler.running
            if running:
                preempt(core, running[turn % len(running)])
        told += events(core)
        assert _tokens(told) == _tokens(wanted)


def _tokens(told: list[Event]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in told:
        if (token := getattr(event, "token", None)) is not None:
            found.setdefault(event.request_id, []).append(token)
    return found


def test_a_new_version_while_requests_of_the_old_run(cores: Cores) -> None:
    old, new = (AppliedIntervention(f"digest {seed}", intervention(seed).edits) for seed in (1, 2))
    same(
        cores,
        request("old", prompt(33), old, max_tokens=20),
        request("new", prompt(33), new, max_tokens=20),
        request("old again", prompt(33, 1), old),
        after=3,
    )


def test_versions_are_dropped_and_sent_again(cores: Cores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_runtime.parallel.leader.KEPT_BYTES", 0)
    for turn in range(2):
        asked = [request(f"{turn} {kind}", prompt(9, turn), KINDS[kind]) for kind in KINDS]
        same(cores, *asked, after=2)


def test_labels_are_scored(cores: Cores) -> None:
    for labels in (((5,), (9,)), ((5, 6), (5, 7, 8), (5, 7, 9, 10), (11,))):
        one = dataclasses.replace(
            request("a", prompt(37), intervention(2), max_tokens=0), labels=LabelTree.of(labels)
        )
        told = same(cores, one, request("b", prompt(8)))
        assert any(isinstance(event, LabelsScored) for event in told)


def test_a_trace_is_told(cores: Cores) -> None:
    asked = request("a", prompt(30), KINDS["loreft"], KINDS["mlp_output"], logprobs=0)
    told = same(cores, dataclasses.replace(asked, trace=True))
    assert {Traced, Explained} <= {type(event) for event in told}


def test_an_aborted_request_is_gone_on_every_rank(cores: Cores) -> None:
    for core in cores:
        core.add(request("gone", prompt(60), intervention(4), max_tokens=50))
        core.step()
        core.step()
        core.abort("gone")
    same(cores, *mixed(3))


@pytest.mark.parametrize(
    ("component", "width"),
    [
        ("query_output", HIDDEN),
        ("key_output", HIDDEN // 2),
        ("value_output", HIDDEN // 2),
        ("attention_value_output", HIDDEN),
        ("mlp_activation", 48),
        ("model.layers[1].mlp.up_proj.output", 48),
    ],
)
def test_places_that_are_split_are_refused(cores: Cores, component: str, width: int) -> None:
    cores[1].runner.sites.check(1, component, width)
    with pytest.raises(WrongBaseModel, match="split over the ranks of --tensor-parallel"):
        cores[0].runner.sites.check(1, component, width)

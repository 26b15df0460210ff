"""Decode steps that begin before the tokens of the step before are known."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from reft_runtime.engine import core as engine_core
from reft_runtime.engine.device_sampler import Batch, Chosen
from reft_runtime.engine.runner import Launched, Runner, StepResult
from reft_runtime.engine.settle import OUT_OF_MEMORY
from reft_runtime.schedule.plan import Chunk
from tests.helpers.models import (
    DEVICE,
    Answer,
    answers,
    finish,
    intervention,
    make_core,
    prompt,
    request,
    run,
    step,
)
from tests.helpers.pages import graphs_for, no_waiting, pages_for, sampler_for, tables_for
from tests.helpers.reference import RandomEdit, applied

Log = list[str]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Cores as on a device; notes what is launched ("2", "2 ahead"), awaited and run at once.

    On a device nothing may wait for it while a step is launched ahead.
    """
    seen: Log = []
    real_run, real_after, real_result = Runner.run, Runner.run_after, Launched.result

    def run_step(self: Runner, chunks: Sequence[Chunk]) -> StepResult | Launched:
        begun = real_run(self, chunks)
        seen.append(f"{len(chunks)}" if isinstance(begun, Launched) else "run")
        return begun

    def run_after(self: Runner, launched: Launched, chunks: Sequence[Chunk]) -> Launched | None:
        with no_waiting() if DEVICE.type == "cuda" else nullcontext():
            ahead = real_after(self, launched, chunks)
        if ahead is not None:
            seen.append(f"{len(chunks)} ahead")
        return ahead

    def result(self: Launched) -> StepResult:
        seen.append("wait")
        return real_result(self)

    monkeypatch.setattr(Runner, "run", run_step)
    monkeypatch.setattr(Runner, "run_after", run_after)
    monkeypatch.setattr(Launched, "result", result)
    monkeypatch.setattr(engine_core, "storage_for", pages_for)
    monkeypatch.setattr(engine_core, "tables_for", tables_for)
    monkeypatch.setattr(engine_core, "sampler_for", sampler_for)
    monkeypatch.setattr(engine_core, "decoder_for", graphs_for)
    return seen


def at_once(*requests: Any) -> dict[str, dict[int, list[int]]]:
    """Their tokens from a core that knows each step's before the next, by the CPU's sampler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_core, "decoder_for", lambda *_: None)
        patch.setattr(engine_core, "sampler_for", lambda *_: None)
        return run(make_core(), requests)


def test_the_next_step_begins_before_this_one_is_known(log: Log) -> None:
    asked = [request("a", prompt(9), max_tokens=6), request("b", prompt(12), max_tokens=4)]
    assert run(make_core(), asked) == at_once(*asked)
    # Who ends by length is not in the step after it.
    until_b_ends = ["run", "2", "2 ahead", "wait", "2 ahead", "wait", "1 ahead", "wait"]
    assert log[: len(until_b_ends) + 3] == [*until_b_ends, "1 ahead", "wait", "wait"]


def test_one_that_stops_is_computed_once_more_in_vain(log: Log) -> None:
    free = run(make_core(), [request("a", prompt(9), max_tokens=9)])["a"][0]
    log.clear()
    asked = [
        request("a", prompt(9), max_tokens=9, stop_token_ids=(free[3],)),
        request("b", prompt(17), max_tokens=9),
        request("c", prompt(5), intervention(1), max_tokens=8, n=2, temperature=1.0, seed=3),
    ]
    found = answers(make_core(), asked)
    assert found["a"].tokens[0] == free[:4]
    assert found["a"].reasons[0] == "stop"
    assert {name: answer.tokens for name, answer in found.items()} == at_once(*asked)
    rows = [entry for entry in log if "ahead" in entry]
    assert rows[:4] == ["4 ahead", "4 ahead", "4 ahead", "3 ahead"]


def test_a_newcomer_is_let_in(log: Log) -> None:
    core = make_core()
    found: dict[str, Answer] = {}
    old, new = request("old", prompt(9), max_tokens=12), request("new", prompt(20))
    core.add(old)
    for _ in range(4):
        step(core, found)
    log.clear()
    core.add(new)
    finish(core, found)
    # What had begun is finished, and nothing more begins before it.
    assert log[:5] == ["wait", "run", "2", "2 ahead", "wait"]
    assert {name: answer.tokens for name, answer in found.items()} == at_once(old, new)


@pytest.mark.parametrize("gone", ["ab", "b"])
def test_who_is_aborted_in_between_leaves_nothing(log: Log, gone: str) -> None:
    core = make_core(max_running=3, kv_tokens=160, prefix_cache=False)
    edit = applied(RandomEdit("loreft", "l1+decode", seed=1)).intervention
    # "a" is about to begin a page.
    asked = [request("a", prompt(13), max_tokens=30), request("b", prompt(9), edit, max_tokens=30)]
    found: dict[str, Answer] = {}
    for each in asked:
        core.add(each)
    for _ in range(4):
        step(core, found)
    assert log[-1] == "wait"
    assert log[-2].endswith("ahead")
    for name in gone:
        core.abort(name)
    core.check_integrity()
    assert core.idle == (gone == "ab")
    late = [request(f"late {n}", prompt(20 + n), intervention(n), max_tokens=25) for n in range(3)]
    for each in late:
        core.add(each)
    finish(core, found)
    wanted = at_once(*asked, *late)
    for each in (*late, *([asked[0]] if gone == "b" else [])):
        assert found[each.id].tokens == wanted[each.id]


def test_rows_beyond_the_sequences_write_nowhere(log: Log) -> None:
    """A graph of ten rows computes nine sequences: the tenth's pages are another's by then."""
    first = [request(f"{n}", prompt(9 + n), max_tokens=4 if n == 9 else 30) for n in range(10)]
    late = request("late", prompt(40), max_tokens=20)
    core = make_core(kv_tokens=16 * 4 * 11, prefix_cache=False)
    found: dict[str, Answer] = {}
    for each in first:
        core.add(each)
    while "9" not in found or not found["9"].reasons:
        step(core, found)
    core.add(late)
    finish(core, found)
    assert "9 ahead" in log
    wanted = at_once(*first, late)
    assert {name: answer.tokens for name, answer in found.items()} == wanted


def test_rows_keep_their_edits_when_one_before_them_ends(log: Log) -> None:
    edits = [
        applied(RandomEdit("loreft", "l1+decode", seed=seed), strength=0.5 + seed / 4)
        for seed in (1, 2)
    ]
    asked = [
        request("base", prompt(9), max_tokens=3),
        request("one", prompt(11), edits[0].intervention, max_tokens=12),
        request("two", prompt(13), edits[1].intervention, max_tokens=9),
    ]
    assert run(make_core(), asked) == at_once(*asked)
    assert "2 ahead" in log


def test_a_prompt_goes_on_beside_steps_ahead(log: Log) -> None:
    """Now and then the pacer gives a prompt no token; what follows is not launched ahead."""
    core = make_core(max_step_tokens=5, max_running=2)
    found: dict[str, Answer] = {}
    core.add(request("decoding", prompt(3), max_tokens=200))
    core.add(request("long", prompt(200), max_tokens=1))
    steps = 0
    while "long" not in found or not found["long"].reasons:
        step(core, found)
        steps += 1
    assert steps < 80
    assert "decoding" not in found or not found["decoding"].reasons


def test_who_waits_in_vain_stops_nobody(log: Log) -> None:
    asked = [request(f"{n}", prompt(17 + n), max_tokens=12) for n in range(3)]
    assert run(make_core(max_running=2), asked) == at_once(*asked)
    assert log.count("2 ahead") == 10
    log.clear()
    # Room for two answers and a half.
    assert run(make_core(kv_tokens=80, prefix_cache=False), asked) == at_once(*asked)
    assert log.count("2 ahead") == 10


def test_a_choice_that_has_ended_cannot_fail_the_others(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request("a", prompt(9), max_tokens=9, n=2, temperature=1.0, seed=3)
    free = at_once(asked)["a"]
    assert free[0][2] not in (*free[0][:2], *free[1])
    asked = request(
        "a", prompt(9), max_tokens=9, n=2, temperature=1.0, seed=3, stop_token_ids=(free[0][2],)
    )
    core = make_core()
    calls, sampler = iter(range(99)), core.runner.sampler
    assert sampler is not None
    real = sampler.select

    def without_the_fourth(batch: Batch) -> Chosen:
        chosen = real(batch)
        if next(calls) == 3:  # its fourth token, after its end
            chosen.tokens[0] = -1
        return chosen

    sampler.select = without_the_fourth
    found = answers(core, [asked])["a"]
    assert found.failed is None
    assert found.tokens == {0: free[0][:3], 1: free[1]}


def test_times_are_from_the_end_of_the_step_before(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what the CPU does in between is in a step's time, and nothing is in two."""
    core = make_core()
    ticks = iter(range(1000))
    monkeypatch.setattr(core, "_clock", lambda: float(next(ticks)))
    seconds = []
    monkeypatch.setattr(core.scheduler.pacer, "record", lambda *args: seconds.append(args[2]))
    run(core, [request("a", prompt(9), max_tokens=5)])
    assert log == ["run", "1", "1 ahead", "wait", "1 ahead", "wait", "1 ahead", "wait", "wait"]
    assert seconds == [1.0] * 5


def test_nothing_of_a_step_in_vain_is_held(log: Log) -> None:
    free = run(make_core(), [request("a", prompt(9), max_tokens=9)])["a"][0]
    core = make_core()
    run(core, [request("a", prompt(9), max_tokens=9, stop_token_ids=(free[3],))])
    assert log[-2:] == ["1 ahead", "wait"]
    assert core._ahead._launched is None


def test_where_room_is_short_nothing_begins_ahead_and_somebody_gives_way(log: Log) -> None:
    asked = [request(f"{n}", prompt(20 + n), intervention(n), max_tokens=40) for n in range(4)]
    core = make_core(kv_tokens=192)
    found = run(core, asked)
    assert core.scheduler.preemptions
    assert any("ahead" in entry for entry in log)
    assert found == at_once(*asked)


def test_memory_that_runs_out_ahead_costs_nobody(log: Log) -> None:
    asked = [request("a", prompt(9)), request("b", prompt(12))]
    core = make_core()
    calls, sampler = iter(range(99)), core.runner.sampler
    assert sampler is not None
    real = sampler.select

    def once_less(batch: Batch) -> Chosen:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(batch)

    sampler.select = once_less
    found = run(core, asked)
    assert log[:7] == ["run", "2", "2 ahead", "wait", "wait", "2", "2 ahead"]
    assert found == at_once(*asked)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.8},
    "min_p": {"temperature": 1.3, "min_p": 0.05},
    "min_tokens": {"temperature": 0, "min_tokens": 3, "stop_token_ids": (5,)},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "bias": {"logit_bias": {3: 5.0, 4: -2.0}},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.0},
    "frequency": {"temperature": 1.0, "frequency_penalty": 0.7},
    "logprobs": {"logprobs": 2},
    "all": {
        "temperature": 1.1,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
        "logit_bias": {9: 3.0},
        "logprobs": 3,
        "min_tokens": 2,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(log: Log, name: str) -> None:
    asked = [
        request("own", prompt(9), seed=7, max_tokens=8, **SETTINGS[name]),
        request("greedy", prompt(12), max_tokens=12),
    ]
    assert run(make_core(), asked) == at_once(*asked)
    assert log[:4] == ["run", "2", "2 ahead", "wait"]


def test_bans_end_with_the_last_of_min_tokens(log: Log) -> None:
    free = run(make_core(), [request("a", prompt(9), max_tokens=9)])["a"][0]
    log.clear()
    stopping = request(
        "a",
        prompt(9),
        max_tokens=9,
        min_tokens=3,
        stop_token_ids=tuple(set(free)),
        logit_bias={5: 1},
    )
    found = run(make_core(), [stopping])
    assert found == at_once(stopping)
    assert log[:4] == ["run", "1", "1 ahead", "wait"]
    made = found["a"][0]
    assert not set(made[:-1]) & set(free)
    assert len(made) > 3


def mixed(count: int = 1, **more: Any) -> list[Any]:
    """A request of each kind; of those that are drawn n choices."""
    return [
        request(
            name,
            prompt(7 + 3 * i, seed=count),
            seed=i,
            **{"max_tokens": 12 + i, **settings, **more},
            n=1 + (i % 2 and settings.get("temperature", 0) > 0),
        )
        for i, (name, settings) in enumerate(SETTINGS.items())
    ]


def test_every_kind_beside_all_others(log: Log) -> None:
    asked = mixed()
    core = make_core(max_running=20)
    found = answers(core, asked)
    assert {name: answer.tokens for name, answer in found.items()} == at_once(*asked)
    assert "16 ahead" in log
    # Alone each gives the same, and the same log-probabilities.
    for each in asked:
        if each.sampling.logprobs is not None:
            alone = answers(make_core(), [each])[each.id]
            assert alone.tokens == found[each.id].tokens
            for made, others in found[each.id].logprobs.items():
                for one, other in zip(others, alone.logprobs[made], strict=True):
                    assert one is not None
                    assert other is not None
                    assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                    assert len(one.top) == each.sampling.logprobs


def test_every_kind_with_too_little_room(log: Log) -> None:
    """Who gave way is counted anew; who comes takes the lanes of those who went."""
    asked = mixed(2, max_tokens=30)
    core = make_core(kv_tokens=416, max_running=8)
    assert run(core, asked) == at_once(*asked)
    assert core.scheduler.preemptions
    assert any("ahead" in entry for entry in log)


def test_lanes_of_the_aborted_are_used_again(log: Log) -> None:
    core = make_core(max_running=4)
    found: dict[str, Answer] = {}
    old = [
        request(f"{n}", prompt(9 + n), max_tokens=30, temperature=1.0, frequency_penalty=1.0)
        for n in range(4)
    ]
    for each in old:
        core.add(each)
    for _ in range(5):
        step(core, found)
    assert log[-2].endswith("ahead")
    for n in (3, 1):
        core.abort(f"{n}")
    core.check_integrity()
    late = [
        request(f"late {n}", prompt(20), max_tokens=9, repetition_penalty=1.5, n=2, temperature=1)
        for n in range(3)
    ]
    for each in late:
        core.add(each)
    finish(core, found)
    wanted = at_once(old[0], old[2], *late)
    assert {name: found[name].tokens for name in wanted} == wanted


def test_a_token_is_counted_once_where_memory_ran_out(log: Log) -> None:
    """A step that was lost is computed again: the first that decodes costs the newest, too."""
    asked = [
        request("a", prompt(9), max_tokens=16, frequency_penalty=1.5),
        request("b", prompt(12), max_tokens=16, repetition_penalty=1.5),
    ]
    wanted = at_once(*asked)
    for lost in range(1, 8):
        core = make_core()
        calls, sampler = iter(range(99)), core.runner.sampler
        assert sampler is not None
        real = sampler.select

        def then_none(
            batch: Batch, real: Any = real, calls: Any = calls, lost: int = lost
        ) -> Chosen:
            chosen: Chosen = real(batch)
            if next(calls) == lost:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return chosen

        sampler.select = then_none
        found = answers(core, asked)
        assert found["a"].tokens == wanted["a"]
        if lost == 1:
            assert found["b"].failed == OUT_OF_MEMORY
        else:
            assert found["b"].tokens == wanted["b"]

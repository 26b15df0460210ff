"""Decode steps that begin before the tokens of the step before are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from reft_runtime.engine import core as engine_core
from reft_runtime.engine import runner, sampler
from reft_runtime.engine.runner import Launched, Runner, StepResult
from reft_runtime.engine.sampler import SampleRow, is_plain, noise, sample, sample_plain
from reft_runtime.engine.scheduler import Chunk
from reft_runtime.sampling import SamplingParams
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
from tests.helpers.pages import graphs_for, pages_for, tables_for
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
        strictly = DEVICE.type == "cuda"
        if strictly:
            torch.cuda.set_sync_debug_mode("error")
        try:
            ahead = real_after(self, launched, chunks)
        finally:
            if strictly:
                torch.cuda.set_sync_debug_mode("default")
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
    monkeypatch.setattr(engine_core, "decoder_for", graphs_for)
    return seen


def at_once(*requests: Any) -> dict[str, dict[int, list[int]]]:
    """Their tokens from a core that knows each step's before the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_core, "decoder_for", lambda *_: None)
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
    calls, real = iter(range(99)), sample_plain

    def without_the_third(*args: Any) -> Any:
        tokens = real(*args)
        if next(calls) == 2:  # its first was sampled with the prompt
            tokens[0] = -1
        return tokens

    monkeypatch.setattr(runner, "sample_plain", without_the_third)
    found = answers(make_core(), [asked])["a"]
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
    assert core._ahead is None


def test_where_room_is_short_nothing_begins_ahead_and_somebody_gives_way(log: Log) -> None:
    asked = [request(f"{n}", prompt(20 + n), intervention(n), max_tokens=40) for n in range(4)]
    core = make_core(kv_tokens=192)
    found = run(core, asked)
    assert core.scheduler.preemptions
    assert any("ahead" in entry for entry in log)
    assert found == at_once(*asked)


def test_memory_that_runs_out_ahead_costs_the_newest(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request("a", prompt(9)), request("b", prompt(12))]
    core = make_core()
    real, calls = sample_plain, iter(range(99))

    def sample_once_less(*args: Any) -> Any:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(runner, "sample_plain", sample_once_less)
    found = answers(core, asked)
    assert log[:5] == ["run", "2", "2 ahead", "wait", "1"]
    assert found["b"].failed == "out of memory"
    assert found["a"].tokens == at_once(*asked)["a"]


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.8},
    "min_p": {"temperature": 1.3, "min_p": 0.05},
    "min_tokens": {"temperature": 0, "min_tokens": 3, "stop_token_ids": (5,)},
}
NOT_PLAIN: dict[str, dict[str, Any]] = {
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "bias": {"logit_bias": {3: 5.0}},
    "penalty": {"presence_penalty": 1.0},
    "logprobs": {"logprobs": 2},
}


@pytest.mark.parametrize("name", [*SETTINGS, *NOT_PLAIN])
def test_settings(log: Log, name: str) -> None:
    settings = {**SETTINGS, **NOT_PLAIN}[name]
    asked = [
        request("own", prompt(9), seed=7, max_tokens=8, **settings),
        request("greedy", prompt(12), max_tokens=12),
    ]
    found = run(make_core(), asked)
    assert found == at_once(*asked)
    first = log.index("2 ahead") if "2 ahead" in log else None
    assert (first is not None) == (name in SETTINGS)
    if name == "min_tokens":  # ahead once the first three are made
        assert log[:4] == ["run", "run", "run", "2"]


def test_plain_rows_are_sampled_as_all_are(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(40, 97, generator=generator)
    logits[3, 5], logits[4, 9], logits[5] = math.nan, math.inf, -math.inf
    logits[6, ::2] = -math.inf
    logits[7] = 1.5  # all equal
    temperatures = [0.0, 0.7, 1.0, 1e-6, 100.0]
    params = [
        SamplingParams(temperature=temperatures[i % 5], min_p=0.1 * (i % 3)) for i in range(40)
    ]
    assert all(is_plain(own, 0) for own in params)
    rows = [
        SampleRow(own, seed=i, choice=i % 2, prompt=[1], generated=[2] * i, eos_ids=frozenset())
        for i, own in enumerate(params)
    ]
    wanted = [-1 if one is None else one.token for one in sample(logits, rows)]
    assert wanted[3:6] == [-1, -1, -1]
    points = [noise(i, i % 2, i) for i in range(40)]
    for most in (sampler._CHUNK, 3 * 97):
        monkeypatch.setattr(sampler, "_CHUNK", most)
        assert sample_plain(logits, params, points).tolist() == wanted

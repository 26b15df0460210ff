"""GET /v1/stats, beside the metrics; and the windows behind it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import httpx
import pytest

from reft_runtime.stats import EngineStats
from server.recent import DURATIONS_SECONDS, RATES_SECONDS, Durations, Rates
from tests.http.conftest import completion
from tests.http.fake_engine import FakeEngine


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_stats_are_those_of_the_metrics(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post("/v1/completions", json=completion(n=2))
    await client.post("/v1/completions", json=completion(model="emoji", stream=True))
    stats = (await client.get("/v1/stats")).json()
    text = (await client.get("/metrics")).text
    for value, line in (
        (stats["running"], "reft:num_requests_running"),
        (stats["waiting"], "reft:num_requests_waiting"),
        (stats["kv_cache"]["usage"], "reft:kv_cache_usage_perc"),
        (stats["prompt_tokens"], "reft:prompt_tokens_total"),
        (stats["generation_tokens"], "reft:generation_tokens_total"),
        (stats["preemptions"], "reft:num_preemptions_total"),
        (stats["finished"]["length"], 'reft:request_success_total{finished_reason="length"}'),
        (stats["interventions"]["loaded"], 'reft:interventions{tier="host"}'),
        (
            stats["time_to_first_token_seconds"]["count"],
            "reft:time_to_first_token_seconds_count",
        ),
        (
            stats["time_per_output_token_seconds"]["count"],
            "reft:time_per_output_token_seconds_count",
        ),
    ):
        assert f"{line} {float(value)}\n" in text
    assert stats["finished"] == {"stop": 0, "length": 3, "abort": 0, "error": 0}
    assert stats["prefix_cache"] == {
        "queries": 64,
        "hits": 32,
        "hit_rate": 0.5,
        "blocks": 4,
        "snapshots": {"kept": 3, "places": 8, "hits": 5, "evictions": 1},
    }
    assert stats["interventions"] == {
        "registered": 3, "loaded": 3, "waiting": 0, "bytes": 1234, "max_bytes": 2_000_000,
    }  # fmt: skip
    assert (stats["model"], stats["device"], stats["dtype"]) == ("tiny", "cpu", "float32")
    assert (stats["status"], stats["max_running"]) == ("ok", 8)
    assert stats["uptime_seconds"] >= 0
    assert stats["time_to_first_token_seconds"]["p50"] > 0


@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_a_clock_that_jumps(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    before = (await client.get("/v1/stats")).json()["uptime_seconds"]
    jumped = time.time() + seconds
    monkeypatch.setattr(time, "time", lambda: jumped)
    stats = (await client.get("/v1/stats")).json()
    assert stats["time"] == jumped
    assert before < stats["uptime_seconds"] < before + 60


async def test_without_requests_or_a_prefix_cache(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = replace(engine.stats(), prefix_cache=None)
    monkeypatch.setattr(engine, "stats", lambda: stats)
    body = (await client.get("/v1/stats")).json()
    assert body["prefix_cache"] is None
    assert body["time_to_first_token_seconds"] == {
        "p50": None, "p95": None, "count": 0, "seconds": DURATIONS_SECONDS,
    }  # fmt: skip
    assert body["tokens_per_second"] == {"prompt": 0, "generation": 0, "seconds": RATES_SECONDS}


def test_percentiles_of_the_last_minute() -> None:
    clock = Clock()
    recent = Durations(clock)
    assert recent.percentiles(0.5) == (0, [None])
    for milliseconds in range(1, 1001):
        recent.observe(milliseconds / 1000)
    count, (median, high) = recent.percentiles(0.5, 0.95)
    assert count == 1000
    assert median == pytest.approx(0.5, rel=0.026)
    assert high == pytest.approx(0.95, rel=0.026)
    clock.now += DURATIONS_SECONDS / 2
    recent.observe(0.0)
    recent.observe(float("inf"))
    assert recent.percentiles()[0] == 1002
    clock.now += DURATIONS_SECONDS / 2
    assert recent.percentiles()[0] == 2
    clock.now += DURATIONS_SECONDS / 2
    assert recent.percentiles(0.5) == (0, [None])
    recent.observe(1.0)  # over what was there a minute before
    assert recent.percentiles()[0] == 1


def test_tokens_a_second() -> None:
    clock = Clock()
    rates = Rates(clock)

    def counters(prompt: int, generated: int) -> Any:
        return EngineStats(0, 0, 0.0, 0, prompt, generated, 0, 0.0)

    assert rates.until(counters(10, 10)) == (0, 0)
    for second in range(3 * RATES_SECONDS):
        rates.sample(counters(1000 + 30 * second, 5 * second))
        clock.now += 1
    last = 3 * RATES_SECONDS
    assert rates.until(counters(1000 + 30 * last, 5 * last)) == (30, 5)
    clock.now += RATES_SECONDS
    assert rates.until(counters(1000 + 30 * last, 5 * last)) == (15, 2.5)

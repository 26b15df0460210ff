"""Metrics by tenant and intervention: how many labels there are, and what gateways read."""

from __future__ import annotations

import asyncio
import re
from typing import Any, cast

import httpx
import pytest

from server import metrics
from server.metrics import KEPT_SECONDS, MAX_NAMES, Metrics
from server.tenants.usage import Counts
from tests.http.conftest import completion
from tests.http.fake_engine import FakeEngine


class Clock:
    """The time of metrics, which a test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def labels(text: bytes, family: str) -> dict[str, float]:
    """Values by the last label of a family with one."""
    found = re.findall(rf'^{family}_total{{\w+="([^"]*)"}} (\S+)$', text.decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_a_label_that_is_not_used_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    counting = Metrics(cast(Any, FakeEngine()))

    def use(name: str, tenant: str = "a") -> None:
        counting.finished(1.0, ["stop"], tenant, [name], Counts(1, 4, 2, 3))

    for number in range(MAX_NAMES):
        use(f"n{number}")
        counting.loaded(f"n{number}", 0.1)
    clock.now += KEPT_SECONDS - 1
    use("n0")  # the oldest is n1 now
    use("early")
    clock.now += 1
    use("late")
    for family, own, other in (
        ("requests", 2.0, 1.0),
        ("prompt_tokens", 8.0, 4.0),
        ("cached_tokens", 4.0, 2.0),
        ("generation_tokens", 6.0, 3.0),
    ):
        found = labels(counting.text(), f"reft:intervention_{family}")
        assert len(found) == MAX_NAMES + 1
        assert (found["n0"], found["late"], found["(other)"]) == (own, own / 2, other)
        assert "n1" not in found
        assert "early" not in found
    assert "n1" not in labels(counting.text(), "reft:intervention_loads")
    for number in range(MAX_NAMES + 3):
        use("n0", f"t{number}")
        counting.rejected(f"t{number}", "requests")
    tenants = labels(counting.text(), "reft:tenant_requests")
    assert len(tenants) == MAX_NAMES + 1
    assert tenants["(other)"] == 4  # beside `a`


def info_of(text: str) -> tuple[str, str, str]:
    """Labels of the only series of `vllm:lora_requests_info`: its most, running, waiting."""
    [line] = re.findall(r"^vllm:lora_requests_info{(.*)} \S+$", text, re.MULTILINE)
    found = dict(re.findall(r'(\w+)="([^"]*)"', line))
    return found["max_lora"], found["running_lora_adapters"], found["waiting_lora_adapters"]


async def test_what_gateways_read(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (await client.get("/metrics")).text
    for line in (
        "vllm:num_requests_running 0.0",
        "vllm:num_requests_waiting 0.0",
        "vllm:kv_cache_usage_perc 0.5",
        "vllm:gpu_cache_usage_perc 0.5",
        "vllm:gpu_prefix_cache_queries_total 64.0",
        "vllm:gpu_prefix_cache_hits_total 32.0",
    ):
        assert f"{line}\n" in text
    assert info_of(text) == ("3", "emoji,formal,pirate", "")
    monkeypatch.setattr("tests.http.fake_engine.FakeStream.steps", _waiting)
    uses = [{"name": "pirate"}, {"name": "emoji"}]
    body = completion(model="tiny", interventions=uses)
    asking = asyncio.ensure_future(client.post("/v1/completions", json=body))
    while not engine.running:
        await asyncio.sleep(0.001)
    assert info_of((await client.get("/metrics")).text)[2] == "pirate,emoji"
    asking.cancel()
    await asyncio.wait([asking])
    assert info_of((await client.get("/metrics")).text)[2] == ""


async def _waiting(self: Any) -> Any:
    """An answer that stays in the queue."""
    await asyncio.sleep(60)
    yield []


async def test_the_list_of_adapters_is_bounded(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MAX_LISTED", 2)
    assert info_of((await client.get("/metrics")).text) == ("3", "emoji,formal", "")

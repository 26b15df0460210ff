"""How much may wait, and whose it is."""

from __future__ import annotations

import pytest

from reft_runtime.engine.queued import QueuedRequests
from reft_runtime.errors import Overloaded
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import Request


def request(name: str, tenant: str = "", tokens: int = 1, weight: float = 1.0) -> Request:
    prompt = (0,) * tokens
    return Request(name, prompt, SamplingParams(), 0, tenant=tenant, weight=weight)


def filled(
    most: int, most_tokens: int = 1000, tenant: str = "a", tokens: int = 1
) -> QueuedRequests:
    queued = QueuedRequests(most, most_tokens)
    for index in range(most):
        queued.add(request(f"{tenant}{index}", tenant, tokens))
    return queued


def test_one_tenant_may_fill_the_queue_and_no_more() -> None:
    queued = filled(8)
    with pytest.raises(Overloaded, match=r"full \(8 requests wait\)"):
        queued.add(request("more", "a"))
    assert len(queued) == 8
    queued.discard("a3")
    queued.discard("a3")
    queued.add(request("more", "a"))
    assert queued.by_tenant() == {"a": 8}


def test_a_full_queue_has_room_for_another_tenants_share() -> None:
    queued = filled(8)
    for index in range(4):
        queued.add(request(f"b{index}", "b"))
    with pytest.raises(Overloaded, match=r"4 requests"):
        queued.add(request("b4", "b"))
    with pytest.raises(Overloaded, match=r"8 requests"):
        queued.add(request("a8", "a"))
    assert queued.by_tenant() == {"a": 8, "b": 4}


def test_shares_of_the_queue_are_by_weight() -> None:
    queued = filled(8)
    for index in range(6):
        queued.add(request(f"b{index}", "b", weight=3))
    with pytest.raises(Overloaded):
        queued.add(request("b6", "b", weight=3))


def test_what_nobody_needs_is_anybodys_to_the_last_token() -> None:
    queued = QueuedRequests(100, 80)
    for name, tenant, tokens in (("a0", "a", 30), ("b0", "b", 20), ("b1", "b", 30)):
        queued.add(request(name, tenant, tokens))
    with pytest.raises(Overloaded, match=r"50 prompt tokens"):
        queued.add(request("b2", "b"))
    queued.add(request("a1", "a"))


def test_prompt_tokens_are_shared_likewise() -> None:
    queued = QueuedRequests(100, 80)
    queued.add(request("a0", "a", 80))
    with pytest.raises(Overloaded, match=r"80 prompt tokens"):
        queued.add(request("a1", "a", 1))
    queued.add(request("b0", "b", 30))
    queued.add(request("b1", "b", 10))
    with pytest.raises(Overloaded, match=r"40 prompt tokens"):
        queued.add(request("b2", "b", 1))


def test_who_has_nothing_waiting_is_never_refused() -> None:
    queued = filled(1, 10)
    for tenant in "bcdef":
        queued.add(request(tenant, tenant, 1000))
    assert len(queued) == 6


def test_what_has_started_makes_room() -> None:
    queued = filled(2, 10, tokens=5)
    queued.discard("a0")
    queued.discard("a1")
    assert not len(queued)
    assert queued.by_tenant() == {}
    queued.add(request("large", "a", 10))

"""Traces and log-probabilities have a bound, and the error says which; the engine is real."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from reft_runtime import Engine
from reft_runtime.front import bounds
from reft_runtime.interventions import Edit, Intervention, serialise
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import tiny
from tests.helpers.serving import client_of
from tests.helpers.tokenizer import tiny_tokenizer
from tests.interventions.make import loreft_tensors

ROWS = 100
SCORES = 300
LENGTH = 512


@pytest.fixture(scope="module")
def tiny_engine() -> Iterator[Engine]:
    model = tiny("llama", max_position_embeddings=LENGTH, vocab_size=320)
    with Engine(model, tokenizer=tiny_tokenizer(), max_running=4) as engine:
        base = engine.registry.base
        of = {
            "every": "all",
            "last": "l1",
            "made": "decode",
            "window": "[0]+decode[4:9]+decode[60:]",
        }
        for name, positions in of.items():
            edits = [
                Edit(layer, positions, loreft_tensors(layer, d=base.hidden_size))
                for layer in (0, 2)
            ]
            engine.registry.put(name, serialise(Intervention.build(base, edits)))
        yield engine


@pytest.fixture
async def http(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    monkeypatch.setattr(bounds, "MAX_TRACED_ROWS", ROWS)
    monkeypatch.setattr(bounds, "MAX_SCORES", SCORES)
    async with client_of(create_app(tiny_engine, Settings())) as client:
        yield client
    tiny_engine.check_integrity()
    assert tiny_engine.stats().running == 0
    assert all(entry.in_flight == 0 for entry in tiny_engine.registry.entries())


def body(model: str, tokens: int, **fields: Any) -> dict[str, Any]:
    prompt = [3 + i % 300 for i in range(tokens)]
    common = {"temperature": 0, "ignore_eos": True, "max_tokens": 4}
    return {"model": model, "prompt": prompt, **common, **fields}


# Two edits: of every token computed (the last one made is not), of one, of those made.
@pytest.mark.parametrize(
    ("model", "tokens", "made", "rows"),
    [
        ("every", 47, 4, 100),
        ("every", 48, 4, None),
        ("last", 200, 4, 2),
        ("made", 9, 51, 100),
        ("made", 9, 52, None),
        ("window", 9, 5, 2),
        ("window", 9, 60, 12),
        ("window", 9, 105, 100),
        ("window", 9, 106, None),
    ],
)
async def test_rows_of_a_trace(
    http: httpx.AsyncClient, model: str, tokens: int, made: int, rows: int | None
) -> None:
    asked = body(model, tokens, max_tokens=made, trace=True)
    got = await http.post("/v1/completions", json=asked)
    if rows is None:
        assert got.status_code == 400
        error = got.json()["error"]
        assert error["param"] == "trace"
        assert str(ROWS) in error["message"]
        assert "102 rows" in error["message"]
    else:
        edits = got.json()["trace"][0]["edits"]
        assert len(edits) == rows
        assert [row["position"] for row in edits] == sorted(row["position"] for row in edits)
    untraced = await http.post("/v1/completions", json={**asked, "trace": False})
    assert untraced.status_code == 200


async def test_a_row_that_is_read_along_counts_once_for_each_direction(
    http: httpx.AsyncClient,
) -> None:
    # Two edits of three directions, of every token computed.
    for tokens, status in ((13, 200), (14, 400)):
        asked = body("every", tokens, max_tokens=4, trace="along")
        got = await http.post("/v1/completions", json=asked)
        assert got.status_code == status
    assert "once for each direction that is read along, are 102 rows" in got.text
    assert got.json()["error"]["param"] == "trace"


async def test_rows_of_several_prompts_and_interventions_count_together(
    http: httpx.AsyncClient,
) -> None:
    asked = body("every", 20, trace=True)
    one, two, three = ({**asked, "prompt": [asked["prompt"]] * n} for n in (1, 2, 3))
    for each, status in ((one, 200), (two, 200), (three, 400)):
        assert (await http.post("/v1/completions", json=each)).status_code == status
    several = [{"name": "every"}] * 3
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    asked = {**asked, "model": model, "interventions": several}
    got = await http.post("/v1/completions", json=asked)
    assert got.status_code == 400
    assert got.json()["error"]["param"] == "trace"


async def test_a_trace_of_an_answer_without_a_length_ends_at_the_bound(
    http: httpx.AsyncClient,
) -> None:
    messages = [{"role": "user", "content": "is it on?"}]
    asked = {"model": "made", "messages": messages, "temperature": 0, "ignore_eos": True}
    answer = (await http.post("/v1/chat/completions", json={**asked, "trace": True})).json()
    assert answer["usage"]["completion_tokens"] == 51
    assert len(answer["trace"][0]["edits"]) == ROWS
    windowed = {**asked, "model": "window", "trace": True}
    answer = (await http.post("/v1/chat/completions", json=windowed)).json()
    assert answer["usage"]["completion_tokens"] == 105
    assert len(answer["trace"][0]["edits"]) == ROWS
    answer = (await http.post("/v1/chat/completions", json=asked)).json()
    assert answer["usage"]["total_tokens"] == LENGTH


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"echo": True, "logprobs": 2, "max_tokens": 0}, 200),  # 100 x 3
        ({"echo": True, "logprobs": 2, "max_tokens": 1}, 400),
        ({"echo": True, "logprobs": 3, "max_tokens": 0}, 400),
        ({"logprobs": 2, "max_tokens": 100}, 200),
        ({"logprobs": 2, "max_tokens": 101}, 400),
        ({"logprobs": 2, "max_tokens": 51, "n": 2}, 400),
        ({"max_tokens": 300}, 200),
    ],
)
async def test_log_probabilities(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int
) -> None:
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    got = await http.post("/v1/completions", json=body(model, 100, **fields))
    assert got.status_code == status, got.text
    if status == 400:
        error = got.json()["error"]
        assert error["param"] == "logprobs"
        assert str(SCORES) in error["message"]


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({}, 150),  # each token's own, and the base's
        ({"n": 2}, 75),
        ({"logprobs": 1}, 100),
        ({"echo": True, "logprobs": 0}, 145),
    ],
)
async def test_traces_have_log_probabilities(
    http: httpx.AsyncClient, fields: dict[str, Any], most: int
) -> None:
    for made in (most, most + 1):
        asked = body("last", 10, trace=True, max_tokens=made, **fields)
        got = await http.post("/v1/completions", json=asked)
        assert got.status_code == (200 if made == most else 400), got.text
    error = got.json()["error"]
    assert error["param"] == "trace"
    assert f"at most {most}." in error["message"]
    messages = [{"role": "user", "content": "is it on?"}]
    chat = {"model": "last", "messages": messages, "ignore_eos": True, "trace": True}
    answer = (await http.post("/v1/chat/completions", json=chat)).json()
    assert answer["usage"]["completion_tokens"] == SCORES // 2
    assert len(answer["trace"][0]["log_ratios"][0]) == SCORES // 2


async def test_log_probabilities_of_several_prompts_count_together(
    http: httpx.AsyncClient,
) -> None:
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    asked = body(model, 51, echo=True, logprobs=2, max_tokens=0)
    assert (await http.post("/v1/completions", json=asked)).status_code == 200
    asked["prompt"] = [asked["prompt"]] * 2
    got = await http.post("/v1/completions", json=asked)
    assert got.status_code == 400
    assert "102 prompt tokens" in got.json()["error"]["message"]


async def test_scores_of_an_answer_without_a_length_end_at_the_bound(
    http: httpx.AsyncClient,
) -> None:
    messages = [{"role": "user", "content": "is it on?"}]
    asked = {"model": "last", "messages": messages, "temperature": 0, "ignore_eos": True}
    asked |= {"logprobs": True, "top_logprobs": 1}
    answer = (await http.post("/v1/chat/completions", json=asked)).json()
    assert answer["usage"]["completion_tokens"] == SCORES // 2
    assert answer["choices"][0]["finish_reason"] == "length"

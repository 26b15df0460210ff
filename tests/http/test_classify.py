"""POST /v1/classify: its answers, what it refuses, and its bookkeeping."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from reft_runtime import Engine
from reft_runtime.interventions import Edit, Intervention, serialise
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import HIDDEN, tiny
from tests.helpers.serving import client_of
from tests.helpers.tokenizer import tiny_tokenizer
from tests.http.fake_engine import FakeEngine, FakeVersion
from tests.interventions.make import loreft_tensors

PATH = "/v1/classify"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "input": "Hi", "labels": ["yes", "no"], **fields}


def asked(**fields: Any) -> dict[str, Any]:
    """A body in which None leaves a field out."""
    return {name: value for name, value in body(**fields).items() if value is not None}


async def test_an_answer(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json=body())
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert said.pop("id").startswith("classify-")
    assert said.pop("created") > 0
    assert said == {
        "object": "list",
        "model": "tiny",
        "labels": ["yes", "no"],
        "data": [{"index": 0, "label": "yes", "probs": [2 / 3, 1 / 3], "num_classes": 2}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 0,
            "total_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
    assert answer.headers["x-prompt-tokens"] == "2"
    assert "x-intervention" not in answer.headers


@pytest.mark.parametrize("given", [["a", "bc"], [[97], [98, 99]]])
async def test_several_prompts(client: httpx.AsyncClient, engine: FakeEngine, given: Any) -> None:
    answer = await client.post(PATH, json=body(input=given))
    said = answer.json()
    assert [one["index"] for one in said["data"]] == [0, 1]
    assert said["usage"]["prompt_tokens"] == 3
    assert [stream.prompt for stream in engine.streams[-2:]] == [(97,), (98, 99)]


async def test_a_chat_and_token_ids(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    await client.post(PATH, json=asked(input=None, messages=chat))
    assert bytes(engine.streams[-1].prompt) == b"<user>Hi"
    await client.post(PATH, json=body(input=[72, 105]))
    assert engine.streams[-1].prompt == (72, 105)


async def test_labels_of_the_file_and_of_the_request(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.own.versions["task"] = FakeVersion("task", labels=("a", "b", "c"))
    answer = await client.post(PATH, json=asked(model="task", labels=None))
    assert answer.json()["labels"] == ["a", "b", "c"]
    assert answer.json()["data"][0]["num_classes"] == 3
    assert answer.headers["x-intervention"] == f"task@{'d1' * 32}"
    other = await client.post(PATH, json=body(model="task", labels=["x", "y"]))
    assert other.json()["labels"] == ["x", "y"]
    uses = [{"name": "task", "strength": 0.5}]
    composed = await client.post(PATH, json=asked(interventions=uses, labels=None))
    assert composed.json()["model"] == "task*0.5"
    assert engine.streams[-1].interventions[0][1] == 0.5


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"labels": None}, 400, "labels", "the base model has none of its own; give the answers"),
        ({"labels": None, "model": "emoji"}, 400, "labels", "emoji: no labels stand in the file"),
        ({"labels": ["one"]}, 400, "labels", "give 2 to 1000 labels, not 1"),
        ({"labels": ["a", "a"]}, 400, "labels", "twice"),
        ({"labels": ["a", ""]}, 400, "labels", "number 1 is empty"),
        ({"labels": ["a", 1]}, 400, "labels.1", "string"),
        ({"labels": "ab"}, 400, "labels", "list"),
        ({"labels": [str(i) for i in range(1001)]}, 400, "labels", "1000"),
        ({"input": None}, 400, "input", "either input or messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, 400, "input", "either"),
        ({"chat_template_kwargs": {"a": 1}}, 400, "chat_template_kwargs", "needs messages"),
        ({"input": ""}, 400, "input", "input: it has no tokens"),
        ({"input": []}, 400, "input", "give a string"),
        ({"input": ["a"] * 129}, 400, "input", "128"),
        ({"input": [999]}, 400, "input", "token ids must be from 0 to 255"),
        ({"input": "x" * 99}, 400, "labels", "maximum context length is 100"),
        ({"input": "x" * 100}, 400, "input", "maximum context length is 100"),
        ({"model": "nowhere"}, 404, "model", "does not exist"),
        ({"interventions": [{"name": "nowhere"}]}, 404, "interventions.0.name", "does not exist"),
        ({"stream": True}, 400, "stream", ""),
        ({"lables": ["a", "b"]}, 400, "lables", "labels"),
    ],
)
async def test_what_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, param: str, said: str
) -> None:
    answer = await client.post(PATH, json=asked(**fields))
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "priority": 3, "add_special_tokens": True, "use_activation": True},
        {"activation": True, "metadata": {"a": "b"}},
    ],
)
async def test_what_clients_send_without_meaning(
    client: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    assert (await client.post(PATH, json=body(**fields))).status_code == 200


async def test_it_is_counted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(PATH, json=body(model="emoji", input=["abc", "de"]))
    metrics = (await client.get("/metrics")).text
    assert 'reft:request_success_total{finished_reason="stop"} 2.0' in metrics
    assert 'reft:intervention_requests_total{intervention="emoji"} 1.0' in metrics
    assert 'reft:intervention_prompt_tokens_total{intervention="emoji"} 5.0' in metrics
    assert engine.own.tokens["emoji"] == (5, 0)


async def test_a_client_that_leaves_ends_it(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.step_seconds = 60
    count = len(engine.streams)
    asking = asyncio.ensure_future(client.post(PATH, json=body(model="emoji")))
    while len(engine.streams) == count:
        await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    while engine.running:
        await asyncio.sleep(0.01)
    assert engine.streams[-1].aborted
    assert not engine.held


async def test_a_full_queue(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.overloaded = True
    answer = await client.post(PATH, json=body(model="emoji"))
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    engine.overloaded = False


async def test_many_numbers_are_written_elsewhere(client: httpx.AsyncClient) -> None:
    labels = [str(i) for i in range(1000)]
    answer = await client.post(PATH, json=body(input=["a"] * 8, labels=labels))
    assert len(answer.json()["data"][7]["probs"]) == 1000


@pytest.fixture(scope="module")
def real() -> Iterator[Engine]:
    with Engine(tiny("llama"), tokenizer=tiny_tokenizer()) as engine:
        edit = Edit(1, "l1", loreft_tensors(0, HIDDEN))
        made = Intervention.build(engine.registry.base, [edit], labels=["the", "and", "you"])
        engine.registry.put("task", serialise(made))
        yield engine


@pytest.fixture
async def http(real: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(real, Settings())) as client:
        yield client
    real.check_integrity()


async def test_it_answers_what_python_answers(real: Engine, http: httpx.AsyncClient) -> None:
    texts = ["is it on", "you and the"]
    answer = await http.post(PATH, json={"model": "task", "input": texts})
    found = real.classify(texts, intervention="task", progress=False)
    for one, other in zip(answer.json()["data"], found, strict=True):
        assert one["label"] == other.label
        assert one["probs"] == pytest.approx(other.probs, abs=1e-5)
    entry = (await http.get("/v1/interventions/task")).json()
    assert entry["manifest"]["labels"] == ["the", "and", "you"]
    assert dataclasses.astuple(found[0])[0] == ("the", "and", "you")

"""Strengths, subspaces, compositions and traces over HTTP, on a tiny random model."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from typing import Any

import httpx
import httpx2
import openai
import pytest
from fastapi import FastAPI

from reft_runtime import Engine, SamplingParams, Use
from reft_runtime.interventions import Intervention, serialise
from reft_runtime.outputs import EditAlong
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import MAX_LENGTH, generate, prompt, tiny_llama
from tests.helpers.reference import Applied, RandomEdit, generate_applied, log_ratios
from tests.helpers.serving import client_of
from tests.helpers.tokenizer import tiny_tokenizer

LOREFT = RandomEdit("loreft", "f2+l2", rank=4, seed=1)
RED = RandomEdit("red", "all", seed=2)
STEERING = RandomEdit("steering", "decode", layer=2, seed=3)
FILES = {"loreft": LOREFT, "red": RED, "steering": STEERING}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
SEEDED: dict[str, Any] = {"temperature": 1, "seed": 1, "return_token_ids": True}
TOKENS = list(prompt(9))


@pytest.fixture(scope="module")
def tiny_engine() -> Iterator[Engine]:
    model = copy.deepcopy(tiny_llama()[0])
    with Engine(model, tokenizer=tiny_tokenizer(), max_running=4) as engine:
        for name, edit in FILES.items():
            built = Intervention.build(engine.registry.base, [edit.stored])
            engine.registry.put(name, serialise(built))
        yield engine


@pytest.fixture
def app(tiny_engine: Engine) -> FastAPI:
    return create_app(tiny_engine, Settings())


@pytest.fixture
async def http(tiny_engine: Engine, app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client
    tiny_engine.check_integrity()
    stats = tiny_engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert all(entry.in_flight == 0 for entry in tiny_engine.registry.entries())


async def post(
    http: httpx.AsyncClient, *interventions: dict[str, Any], chat: bool = False, **fields: Any
) -> httpx.Response:
    base = (await http.get("/v1/models")).json()["data"][0]["id"]
    what = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": TOKENS}
    body = {"model": base, "max_tokens": 8, "temperature": 0, **what}
    if interventions:
        body["interventions"] = list(interventions)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return await http.post(path, json={**body, **fields})


async def text(http: httpx.AsyncClient, *interventions: dict[str, Any]) -> str:
    response = await post(http, *interventions)
    assert response.status_code == 200, response.text
    answer: str = response.json()["choices"][0]["text"]
    return answer


def wanted(*used: Applied) -> str:
    tokens = generate_applied(tiny_llama()[0], TOKENS, used)
    return str(tiny_tokenizer().decode(tokens, skip_special_tokens=True))


async def test_a_composition_is_applied_in_its_order(http: httpx.AsyncClient) -> None:
    loreft = {"name": "loreft", "strength": 0.5}
    red = {"name": "red", "strength": -0.7}
    first = wanted(Applied((LOREFT,), 0.5), Applied((RED,), -0.7))
    second = wanted(Applied((RED,), -0.7), Applied((LOREFT,), 0.5))
    assert first != second
    assert await text(http, loreft, red) == first
    assert await text(http, red, loreft) == second
    response = await post(http, loreft, red, {"name": "steering"})
    names = [part.split("@")[0] for part in response.headers["x-intervention"].split(",")]
    assert [name.strip() for name in names] == ["loreft", "red", "steering"]


@pytest.mark.parametrize("strength", [0, 0.0, -1, 2, 100.0, -100.0])
async def test_strengths(http: httpx.AsyncClient, strength: float) -> None:
    answer = await text(http, {"name": "loreft", "strength": strength})
    assert answer == wanted(Applied((LOREFT,), strength))
    if not strength:
        assert answer == wanted()


async def test_a_subspace(http: httpx.AsyncClient) -> None:
    answers = set()
    for subspace in ([0], [1, 3], [3, 1], [0, 1, 2, 3]):
        answer = await text(http, {"name": "loreft", "subspace": subspace})
        assert answer == wanted(Applied((LOREFT,), 1, tuple(sorted(subspace))))
        answers.add(answer)
    assert len(answers) == 3
    assert await text(http, {"name": "loreft", "subspace": None}) == wanted(Applied((LOREFT,)))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("field", "uses", "message"),
    [
        ("interventions.0.strength", [{"name": "red", "strength": 100.1}], "100"),
        ("interventions.0.strength", [{"name": "red", "strength": -100.1}], "-100"),
        ("interventions.0.strength", [{"name": "red", "strength": "1"}], "number"),
        ("interventions.0.strength", [{"name": "red", "strength": True}], "number"),
        ("interventions.1.subspace", [{"name": "red"}, {"name": "red", "subspace": []}], "1"),
        ("interventions.0.subspace.1", [{"name": "loreft", "subspace": [0, -1]}], "0"),
        ("interventions.0.subspace.0", [{"name": "loreft", "subspace": ["0"]}], "integer"),
        ("interventions.0.subspace.0", [{"name": "loreft", "subspace": [0.5]}], "integer"),
        ("interventions.0.subspace", [{"name": "loreft", "subspace": 1}], "list"),
        ("interventions.0.subspace", [{"name": "loreft", "subspace": [0] * 1025}], "1024"),
        ("interventions.0.subspace", [{"name": "loreft", "subspace": [4]}], "directions 0 to 3"),
        ("interventions.0.subspace", [{"name": "loreft", "subspace": [1, 1]}], "once"),
        (
            "interventions.1.subspace",
            [{"name": "loreft"}, {"name": "steering", "subspace": [0]}],
            "no directions",
        ),
        ("interventions.1.name", [{"name": "red"}, {"name": "nope"}], "`nope` does not exist"),
        ("interventions", [{"name": "red"}] * 17, "16"),
    ],
)
async def test_errors_name_the_field(
    http: httpx.AsyncClient, chat: bool, field: str, uses: list[dict[str, Any]], message: str
) -> None:
    response = await post(http, *uses, chat=chat)
    assert response.status_code == (404 if field.endswith("name") else 400), response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert message in error["message"]


@pytest.mark.parametrize("chat", [False, True])
async def test_traces_are_asked_for(http: httpx.AsyncClient, chat: bool) -> None:
    values: list[Any] = [1, "true", [], "along=1"]
    for wrong in values:
        response = await post(http, chat=chat, trace=wrong)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "trace")
        assert "'along'" in response.json()["error"]["message"]
    assert "trace" not in (await post(http, {"name": "red"}, chat=chat)).json()
    assert "trace" not in (await post(http, {"name": "red"}, chat=chat, trace=False)).json()


async def test_a_trace_is_what_compare_says(http: httpx.AsyncClient, tiny_engine: Engine) -> None:
    uses = (Use("loreft", 0.5), Use("steering"))
    asked: list[dict[str, Any]] = [{"name": "loreft", "strength": 0.5}, {"name": "steering"}]
    messages = [{"role": "user", "content": "Hi"}]
    cases: list[tuple[bool, Any]] = [(False, TOKENS), (True, messages)]
    for chat, wanted_prompt in cases:
        answer = (await post(http, *asked, chat=chat, trace=True)).json()
        [_, other] = tiny_engine.compare(wanted_prompt, [uses], GREEDY)
        [trace] = answer["trace"]
        assert set(trace) == {"edits", "kl", "log_ratios"}
        [ratios], [others] = trace["log_ratios"], other.trace.log_ratios
        assert ratios == pytest.approx(others, abs=1e-4)
        assert trace["kl"] == pytest.approx(other.trace.kl, rel=1e-3)
        assert trace["kl"] > 0
        assert len(trace["edits"]) == len(other.trace.edits) == 4 + 7
        for got, edit in zip(trace["edits"], other.trace.edits, strict=True):
            assert set(got) == {
                "intervention",
                "edit",
                "layer",
                "component",
                "position",
                "relative_size",
            }
            assert (got["intervention"], got["edit"]) == (edit.intervention, edit.edit)
            assert (got["layer"], got["component"]) == (edit.layer, "block_output")
            assert got["position"] == edit.position
            assert got["relative_size"] == pytest.approx(edit.relative_size, rel=1e-3)
        count = answer["usage"]["prompt_tokens"]
        assert {e["position"] for e in trace["edits"] if e["intervention"] == 1} == set(
            range(count, count + 7)
        )


async def test_a_trace_along_says_where_rows_lie(
    http: httpx.AsyncClient, tiny_engine: Engine
) -> None:
    uses: list[dict[str, Any]] = [{"name": "loreft", "strength": 0}, {"name": "steering"}]
    [wanted] = tiny_engine.compare(
        TOKENS, [(Use("loreft", 0), Use("steering"))], GREEDY, trace="along"
    )[1:]
    answer = (await post(http, *uses, trace="along")).json()
    *_, last = await streamed(http, *uses, trace="along")
    for [trace] in (answer["trace"], last["trace"]):
        assert [len(edit["before"]) for edit in trace["edits"]] == [4] * 4 + [1] * 7
        for got, edit in zip(trace["edits"], wanted.trace.edits, strict=True):
            assert isinstance(edit, EditAlong)
            assert got.keys() == asdict(edit).keys()
            assert got["before"] == pytest.approx(edit.before, abs=1e-4)
            assert got["after"] == pytest.approx(edit.after, abs=1e-4)
    response = await post(http, {"name": "red"}, trace="along")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "trace")


async def test_every_prompt_has_its_trace(http: httpx.AsyncClient) -> None:
    prompts = [list(prompt(9)), list(prompt(21))]
    answer = (
        await post(http, {"name": "loreft"}, prompt=prompts, n=2, trace=True, **SEEDED)
    ).json()
    assert len(answer["choices"]) == 4
    first, second = answer["trace"]
    assert [edit["position"] for edit in first["edits"]] == [0, 1, 7, 8]
    assert [edit["position"] for edit in second["edits"]] == [0, 1, 19, 20]
    assert first["kl"] != second["kl"]
    used = (Applied((LOREFT,)),)
    for choice, ratios in zip(
        answer["choices"], first["log_ratios"] + second["log_ratios"], strict=True
    ):
        tokens, made = prompts[choice["index"] // 2], choice["token_ids"]
        assert ratios == pytest.approx(log_ratios(tiny_llama()[0], tokens, made, used), abs=1e-4)
    # What is traced and counted is the request, and not the base's run beside it.
    assert answer["usage"]["prompt_tokens"] == 30
    assert answer["usage"]["completion_tokens"] == 32


async def streamed(http: httpx.AsyncClient, *uses: dict[str, Any], **fields: Any) -> list[Any]:
    response = await post(http, *uses, stream=True, **fields)
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def put_together(events: list[Any]) -> dict[str, Any]:
    """What a stream's events say; how many of its tokens come in each is a matter of time."""
    made: dict[str, Any] = {"text": "", "role": "", "content": ""}
    for [choice] in [event["choices"] for event in events]:
        assert made.get("finish_reason") is None
        delta = choice.pop("delta", {})
        for name, part in delta.items():
            made[name] += part
        made["text"] += choice.pop("text", "")
        made |= choice
    return made


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("usage", [False, True])
async def test_the_trace_of_a_stream(http: httpx.AsyncClient, chat: bool, usage: bool) -> None:
    uses = [{"name": "loreft", "strength": 0.5}, {"name": "red", "strength": -0.7}]
    asked: dict[str, Any] = {"chat": chat, "n": 2, "trace": True, **SEEDED}
    whole = (await post(http, *uses, **asked)).json()
    options = {"stream_options": {"include_usage": True}} if usage else {}
    *events, last = await streamed(http, *uses, **asked, **options)
    assert last["choices"] == []
    assert last.get("usage") == (whole["usage"] if usage else None)
    assert not any("trace" in event for event in events)
    assert all(len(event["choices"]) == 1 for event in events)
    assert all(choice["logprobs"] is None for event in events for choice in event["choices"])
    made: list[list[int]] = [[], []]
    for choice in [choice for event in events for choice in event["choices"]]:
        made[choice["index"]] += choice.get("token_ids") or []
    assert made == [choice["token_ids"] for choice in whole["choices"]]
    [got], [wanted] = last["trace"], whole["trace"]
    sizes = [[edit.pop("relative_size") for edit in one["edits"]] for one in (got, wanted)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    assert got["edits"] == wanted["edits"]
    assert got["kl"] == pytest.approx(wanted["kl"], rel=1e-3)
    for ratios, others in zip(got["log_ratios"], wanted["log_ratios"], strict=True):
        assert ratios == pytest.approx(others, abs=1e-4)
    assert [len(ratios) for ratios in got["log_ratios"]] == [len(tokens) for tokens in made]
    assert max(map(abs, got["log_ratios"][0])) > 0.01


async def test_a_trace_adds_nothing_else_to_a_stream(http: httpx.AsyncClient) -> None:
    use = {"name": "red", "strength": 0}
    for chat in (False, True):
        plain = await streamed(http, use, chat=chat)
        *events, last = await streamed(http, use, chat=chat, trace=True)
        assert put_together(events) == put_together(plain)
        [trace] = last["trace"]
        assert (trace["edits"], trace["kl"], set(trace["log_ratios"][0])) == ([], 0, {0})


async def test_openai_reads_the_trace_of_a_stream(http: httpx.AsyncClient, app: FastAPI) -> None:
    transport = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=transport)
    stream = await client.chat.completions.create(
        model="red",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=4,
        temperature=0,
        stream=True,
        extra_body={"trace": True},
    )
    *chunks, last = [chunk async for chunk in stream]
    assert len(chunks) > 1
    assert not any("trace" in (chunk.model_extra or {}) for chunk in chunks)
    assert last.choices == []
    [trace] = (last.model_extra or {})["trace"]
    assert len(trace["log_ratios"][0]) <= 4
    async with client.chat.completions.stream(
        model="red",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=4,
        temperature=0,
        extra_body={"trace": True},
    ) as helper:
        events = [event async for event in helper]
    assert {"chunk", "content.delta", "content.done"} == {event.type for event in events}
    final = helper.current_completion_snapshot
    assert final.choices[0].message.content == "".join(
        chunk.choices[0].delta.content or "" for chunk in chunks
    )
    await client.close()


async def test_the_trace_of_the_base_model_is_empty(http: httpx.AsyncClient) -> None:
    answer = (await post(http, trace=True)).json()
    assert answer["trace"] == [{"edits": [], "kl": 0.0, "log_ratios": [[0.0] * 8]}]
    off = (await post(http, {"name": "red", "strength": 0}, trace=True)).json()
    assert off["trace"] == answer["trace"]
    assert off["choices"] == answer["choices"]
    tokens = generate(tiny_llama()[0], TOKENS)
    assert answer["choices"][0]["text"] == tiny_tokenizer().decode(tokens, skip_special_tokens=True)


async def test_a_trace_without_an_answer(http: httpx.AsyncClient) -> None:
    for length in (9, MAX_LENGTH):
        response = await post(
            http,
            {"name": "loreft"},
            prompt=list(prompt(length)),
            max_tokens=0,
            echo=True,
            trace=True,
        )
        assert response.status_code == 200, response.text
        [trace] = response.json()["trace"]
        assert trace["kl"] == 0
        assert trace["log_ratios"] == [[]]
        assert len(trace["edits"]) == 4

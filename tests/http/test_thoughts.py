"""What a model thinks, told from its answer: whole, streamed, with tools, and as /v1/responses."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import httpx
import httpx2
import openai
import pytest
from fastapi import FastAPI

from reft_runtime.reasoning import Marks, Thinking, find_marks
from server.thoughts import ThoughtReader
from tests.http.conftest import chat
from tests.http.fake_engine import FakeEngine, FakeRegistry, FakeVersion
from tests.http.test_tools import CALL, LOOK, ROME
from tests.tools.templates import QWEN

MARKS = Marks("(think)", "(/think~", ord(")"), ord("~"))
GEMMA = Marks("<|channel>", "<channel|>", 7, 8, "thought")
THOUGHT = "Is it (day) or\n\nnight? (/thin"
SAYS = f"(think)\n{THOUGHT}\n\n(/think~\n\nIt is  day. (/think~"
ANSWER = "It is  day. (/think~"
TOKENS = SAYS.index("~") + 1


@pytest.fixture
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.info = replace(engine.info, max_model_len=1000)
    engine.tokenizer.marks = MARKS
    engine.tokenizer.tool_template = QWEN
    engine.says = SAYS.encode()
    return engine


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json=chat(**{"max_tokens": 200, **fields}))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    body = chat(max_tokens=200, stream=True, **fields)
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize(
    ("says", "opened", "thought", "answer"),
    [
        (SAYS, False, THOUGHT, ANSWER),
        (SAYS.removeprefix("(think)"), True, THOUGHT, ANSWER),
        ("\n (think)a(/think~b", False, "a", "b"),
        ("(think) \n (/think~ \n b \n", False, "", "b \n"),
        ("(think) a b \n", False, "a b", ""),
        ("(think)a (/think", False, "a (/think", ""),
        ("(think)a(/think~ \n", False, "a", ""),
        ("(thin", False, "", "(thin"),
        (" \n", False, "", " \n"),
        (" \n", True, "", ""),
        (" \n b (think)a(/think~", False, "", " \n b (think)a(/think~"),
        ("", False, "", ""),
        ("", True, "", ""),
    ],
)
def test_a_text_is_parted_wherever_it_is_cut(
    says: str, opened: bool, thought: str, answer: str
) -> None:
    rng = random.Random(says)
    for _ in range(50):
        reader = ThoughtReader(MARKS, open=opened)
        cuts = sorted(rng.choices(range(len(says) + 1), k=rng.randrange(len(says) + 2)))
        parts = [says[a:b] for a, b in zip([0, *cuts], [*cuts, len(says)], strict=True)]
        found, counted = ["", ""], 0
        for position, part in enumerate(parts, 1):
            gained = reader.read(part, ended=position == len(parts))
            counted += reader.count(part.encode())
            found = [a + b for a, b in zip(found, gained, strict=True)]
        assert found == [thought, answer]
        thinks = opened or says.lstrip().startswith("(think)")
        end = says.find("~") + 1 or len(says)
        assert counted == (end if thinks else 0)


def test_marks_are_those_that_a_template_writes_and_single_tokens() -> None:
    ids = {"<think>": 5, "</think>": 6, "<|channel>": 7, "<channel|>": 8}
    assert find_marks("a <think> b </think>", ids.get) == Marks("<think>", "</think>", 5, 6)
    assert find_marks("{{ x.split('<channel|>') }}", ids.get) == GEMMA
    assert find_marks("neither", ids.get) is None
    assert find_marks("a <think> b </think>", {"<think>": 5}.get) is None


@pytest.mark.parametrize(
    ("says", "thought"),
    [
        ("<|channel>thought\nHm<channel|>Yes", "Hm"),
        ("<|channel>\nthough<channel|>Yes", "though"),
        ("<|channel>thought<channel|>Yes", ""),
        ("<|channel><channel|>Yes", ""),
    ],
)
def test_a_label_is_none_of_the_thought(says: str, thought: str) -> None:
    for cut in range(len(says)):
        reader = ThoughtReader(GEMMA, open=False)
        parts = [reader.read(says[:cut], ended=False), reader.read(says[cut:], ended=True)]
        assert ["".join(part) for part in zip(*parts, strict=True)] == [thought, "Yes"]


def test_how_an_answer_begins_is_seen_at_the_end_of_the_prompt() -> None:
    assert MARKS.after("user\n(think) x (/think~ y\nassistant\n") == Thinking(MARKS, open=False)
    assert MARKS.after("assistant\n(think)\n") == Thinking(MARKS, open=True)
    assert MARKS.after("assistant\n(think)\n\n(/think~\n\n") is None
    assert GEMMA.after("model\n<|channel>thought\n") == Thinking(GEMMA, open=True)
    assert GEMMA.after("model\n<|channel>thought\n<channel|>") is None


async def test_whole(client: httpx.AsyncClient) -> None:
    answer = await ask(client, n=2, logprobs=True)
    for choice in answer["choices"]:
        assert choice["message"] == {
            "role": "assistant",
            "content": ANSWER,
            "refusal": None,
            "reasoning_content": THOUGHT,
        }
        assert choice["finish_reason"] == "stop"
        assert len(choice["logprobs"]["content"]) == len(SAYS)
    assert answer["usage"]["completion_tokens"] == 2 * len(SAYS)
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2 * TOKENS}


async def test_streamed(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = await stream(
        client, n=2, logprobs=True, return_token_ids=True, stream_options=options
    )
    assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2 * TOKENS}
    for index in (0, 1):
        chunks = [c for e in events for c in e["choices"] if c["index"] == index]
        deltas = [chunk["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        kinds = [key for delta in deltas[1:] for key in delta]
        assert kinds == sorted(kinds, reverse=True)  # the answer is behind what was thought
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == THOUGHT
        assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
        assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == ["stop"]
        assert sum(len(chunk["token_ids"]) for chunk in chunks[1:]) == len(SAYS)
        scored = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
        assert sum(len(each["content"]) for each in scored) == len(SAYS)


async def test_a_prompt_that_has_begun_or_ended_the_thinking(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.says = b"a\n(/think~\nb"
    for end, thought, answer in (
        ("(think)\n", "a", "b"),
        ("(think)\n(/think~\n", None, "a\n(/think~\nb"),
        ("", None, "a\n(/think~\nb"),
    ):
        messages = [{"role": "user", "content": end}]
        whole = await ask(client, messages=messages)
        message = whole["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == (thought, answer)
        events = await stream(client, messages=messages)
        deltas = [event["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == (thought or "")
        assert "".join(delta.get("content", "") for delta in deltas) == answer


async def test_an_answer_that_goes_on(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.says = b"a (/think~ b"
    for said, thought, answer in (
        ("(think)\nLet me", "a", "b"),
        ("(think) x (/think~ It is", None, "a (/think~ b"),
        ("It is", None, "a (/think~ b"),
    ):
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
        whole = await ask(
            client, messages=turns, continue_final_message=True, add_generation_prompt=False
        )
        message = whole["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == (thought, answer)


async def test_what_a_file_was_trained_to_answer_is_an_answer(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    assert isinstance(engine.registry, FakeRegistry)
    engine.registry.versions["sorted"] = FakeVersion("sorted", template="chat")
    messages = [{"role": "user", "content": "(think)\n"}]
    for says, thought, answer in ((b"billing", None, "billing"), (SAYS.encode(), THOUGHT, ANSWER)):
        engine.says = says
        whole = await ask(client, model="sorted", messages=messages)
        message = whole["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == (thought, answer)


async def test_an_answer_that_is_cut_while_the_model_thinks(client: httpx.AsyncClient) -> None:
    answer = await ask(client, max_tokens=12)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] == "Is i"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}


async def test_what_was_thought_before_calls(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    thought = '{"name": "look", "arguments": {}}'
    engine.says = f"(think)\n{thought}\n(/think~\n\n{CALL}".encode()
    [choice] = (await ask(client, tools=[LOOK]))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning_content"] == thought
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": ROME}
    events = await stream(client, tools=[LOOK])
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == thought
    assert "".join(delta.get("content") or "" for delta in deltas) == ""
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    assert "".join(piece["function"]["arguments"] for piece in pieces) == ROME


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_an_answer_is_sent_back_with_what_was_thought(
    client: httpx.AsyncClient, engine: FakeEngine, name: str
) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?", name: "Who is it?"},
        {"role": "user", "content": "Me", "reasoning_content": None},
        {"role": "assistant", "content": None, name: "It was cut"},
        {"role": "user", "content": "Go on"},
    ]
    await ask(client, messages=turns)
    assert [turn.get("reasoning_content") for turn in engine.tokenizer.last_messages] == [
        None,
        "Who is it?",
        None,
        "It was cut",
        None,
    ]
    turns[0][name] = "x"
    response = await client.post("/v1/chat/completions", json=chat(messages=turns))
    assert response.status_code == 400
    assert "reasoning_content is an assistant's" in response.json()["error"]["message"]


async def test_completions_are_texts_as_they_are(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 200}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["text"] == SAYS
    assert "completion_tokens_details" not in answer["usage"]


async def test_responses(app: FastAPI) -> None:
    transport = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
    openai_client = openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="-", http_client=transport
    )
    asked: dict[str, Any] = {
        "model": "tiny",
        "input": "Hi",
        "max_output_tokens": 200,
        "include": ["message.output_text.logprobs"],
    }
    whole = await openai_client.responses.create(**asked)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    thought, message = whole.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert [part.text for part in thought.content] == [THOUGHT]
    assert whole.output_text == ANSWER
    assert message.type == "message"
    assert message.content[0].type == "output_text"
    scored = message.content[0].logprobs
    assert scored is not None
    assert "".join(each.token for each in scored) == SAYS[TOKENS:]
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens == TOKENS
    async with openai_client.responses.stream(**asked) as helper:
        events = [event async for event in helper]
        final = await helper.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    said = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(said) == THOUGHT
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.completed",
    ]
    kept = {"content": {"__all__": {"type", "text", "logprobs"}}}
    assert [item.model_dump(include=kept) for item in final.output] == [
        item.model_dump(include=kept) for item in whole.output
    ]
    assert final.usage == whole.usage


async def test_responses_that_are_sent_back(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    thought: dict[str, Any] = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "encrypted_content": None,
    }
    part = {"type": "reasoning_text", "text": "Who is it?"}
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        thought | {"content": [part, part], "status": "completed"},
        {"type": "message", "role": "assistant", "content": "Yes?"},
        thought,
        {"role": "user", "content": "Me"},
    ]
    body = {"model": "tiny", "input": items, "max_output_tokens": 12}
    response = await client.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    [item] = response.json()["output"]
    assert (item["type"], item["status"]) == ("reasoning", "incomplete")
    assert item["content"] == [{"type": "reasoning_text", "text": "Is i"}]
    assert [turn.get("reasoning_content") for turn in engine.tokenizer.last_messages] == [
        None,
        "Who is it?Who is it?",
        None,
    ]

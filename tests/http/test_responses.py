"""POST /v1/responses on an engine without a model: what it takes, answers and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from server.schemas.responses import LOGPROBS
from server.schemas.tools import NamedTool
from server.translation import translated
from tests.http.fake_engine import DIGEST, FakeEngine
from tests.tools.templates import QWEN

EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def asked(**fields: Any) -> dict[str, Any]:
    """A body of /v1/responses."""
    return {"model": "tiny", "input": "Hi", "max_output_tokens": 4, **fields}


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each checked against the client's type and counted."""
    *pieces, end = text.split("\n\n")
    assert end == ""
    found = []
    for number, piece in enumerate(pieces):
        name, data = piece.split("\n")
        event = json.loads(data.removeprefix("data: "))
        EVENT.validate_python(event)
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        found.append(event)
    return found


async def test_answer(client: httpx.AsyncClient) -> None:
    body = asked(model="emoji", metadata={"a": "b"}, temperature=0.5, user="me", instructions=None)
    response = await client.post("/v1/responses", json=body)
    assert response.status_code == 200
    assert response.headers["x-intervention"] == f"emoji@{DIGEST}"
    assert response.headers["x-prompt-tokens"] == "8"
    answer = response.json()
    Response.model_validate(answer)
    id_ = answer.pop("id")
    assert id_.startswith("resp_")
    assert answer.pop("created_at") > 1_700_000_000
    part = {"type": "output_text", "text": "abcd", "annotations": [], "logprobs": []}
    message = {
        "id": f"msg_{id_.removeprefix('resp_')}_0",
        "type": "message",
        "status": "incomplete",
        "role": "assistant",
        "content": [part],
    }
    assert answer == {
        "object": "response",
        "status": "incomplete",
        "incomplete_details": {"reason": "max_output_tokens"},
        "completed_at": None,
        "error": None,
        "model": "emoji",
        "output": [message],
        "usage": {
            "input_tokens": 8,
            "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 12,
        },
        "background": False,
        "instructions": None,
        "max_output_tokens": 4,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
    }


async def test_stream(client: httpx.AsyncClient) -> None:
    body = asked(stream=True, top_logprobs=1, stream_options={})
    response = await client.post("/v1/responses", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 4,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [event["delta"] for event in deltas] == list("abcd")
    last = found[-1]["response"]
    whole = (await client.post("/v1/responses", json=body | {"stream": False})).json()
    for answer in (last, whole):
        del answer["id"], answer["created_at"], answer["output"][0]["id"]
    assert last == whole
    logprobs = last["output"][0]["content"][0]["logprobs"]
    assert logprobs == [entry for event in deltas for entry in event["logprobs"]]
    top = {"token": "x", "logprob": -0.25, "bytes": [120]}
    assert logprobs[0] == {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [top]}


async def test_log_probabilities_alone(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/responses", json=asked(include=[LOGPROBS]))
    logprobs = response.json()["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs] == list("abcd")
    assert logprobs[0]["top_logprobs"] == []


async def test_trace(client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        response = await client.post("/v1/responses", json=asked(trace=True, stream=stream))
        answer = events(response.text)[-1]["response"] if stream else response.json()
        assert answer["trace"][0]["kl"] == 0


def test_items_are_the_messages_of_a_chat() -> None:
    text = {"type": "output_text", "text": "I ask", "annotations": [], "logprobs": []}
    data = asked(
        instructions="Be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [text, text],
            },
            {"role": "developer", "content": "Now"},
        ],
        max_output_tokens=7,
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        top_k=3,
        seed=5,
        stop=["x"],
        store=False,
    )
    chat = translated(data).chat
    assert [(message.role, message.content) for message in chat.messages] == [
        ("system", "Be brief"),
        ("user", "Hi"),
        ("assistant", "I askI ask"),
        ("developer", "Now"),
    ]
    assert (chat.max_completion_tokens, chat.reasoning_effort) == (7, "low")
    assert (chat.top_k, chat.seed, chat.stop, chat.logprobs) == (3, 5, ["x"], False)


CALL = {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "x"}


def test_calls_and_their_results_are_turns() -> None:
    parts = [{"type": "input_text", "text": "Ra"}, {"type": "input_text", "text": "in"}]
    data = asked(
        input=[
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Let me see."},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            CALL | {"id": "fc_1", "status": "completed"},
            CALL | {"call_id": "call_2"},
            RESULT | {"output": parts},
            RESULT | {"call_id": "call_2"},
            CALL | {"call_id": "call_3"},
        ],
        tools=[{"type": "function", "name": "look", "parameters": None, "strict": True}],
        tool_choice={"type": "function", "name": "look"},
        parallel_tool_calls=False,
    )
    chat = translated(data).chat
    _, call, first, second, again = chat.messages
    assert (call.role, call.content) == ("assistant", "Let me see.")
    assert [one.id for one in call.tool_calls] == ["call_1", "call_2"]
    assert (first.role, first.tool_call_id, first.content) == ("tool", "call_1", "Rain")
    assert (second.tool_call_id, second.content) == ("call_2", "x")
    assert [one.id for one in again.tool_calls] == ["call_3"]
    assert (chat.tools[0].function.name, chat.tools[0].function.strict) == ("look", True)
    assert isinstance(chat.tool_choice, NamedTool)
    assert chat.parallel_tool_calls is False


SCHEMA = {"type": "json_schema", "name": "x", "schema": {}}
DEEP: list[Any] = json.loads("[" * 300 + "]" * 300)
IMAGE = {"type": "input_image", "image_url": "x"}
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("input", {"input": None}),
    ("input", {"input": 5}),
    ("input", {"input": []}),
    ("input", {"input": "x" * 100}),
    ("input.0", {"input": ["Hi"]}),
    ("input.0.role", {"input": [{"content": "Hi"}]}),
    ("input.0.role", {"input": [{"role": "tool", "content": "Hi"}]}),
    ("input.0.content", {"input": [{"role": "user", "content": None}]}),
    ("input.0.content", {"input": [{"role": "user", "content": 5}]}),
    ("input.0.content.0.type", {"input": [{"role": "user", "content": [IMAGE]}]}),
    ("input.0.x", {"input": [{"role": "user", "content": "Hi", "x": 1}]}),
    ("input.0.type", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
    ("input.1.type", {"input": [{"role": "user", "content": ""}, {"type": "web_search_call"}]}),
    ("input.0.call_id", {"input": [{"type": "function_call", "name": "f", "arguments": ""}]}),
    ("input.0.output", {"input": [{"type": "function_call_output", "call_id": "1"}]}),
    ("instructions", {"instructions": 5}),
    ("max_output_tokens", {"max_output_tokens": 0}),
    ("max_output_tokens", {"max_output_tokens": 99}),
    ("min_tokens", {"min_tokens": 5}),
    ("max_tokens", {"max_tokens": 5}),
    ("messages", {"messages": []}),
    ("n", {"n": 2}),
    ("temperature", {"temperature": 3}),
    ("logit_bias", {"logit_bias": {"a": 1}}),
    ("top_logprobs", {"top_logprobs": 21, "include": [LOGPROBS]}),
    ("include.0", {"include": ["file_search_call.results"]}),
    ("text.format", {"text": {"format": {"type": "grammar"}}}),
    ("text.format", {"text": {"format": {}}}),
    ("text.format.x", {"text": {"format": {"type": "text", "x": 1}}}),
    ("text.format.name", {"text": {"format": {"type": "json_schema", "schema": {}}}}),
    ("text.format.schema", {"text": {"format": SCHEMA | {"schema": 5}}}),
    ("text.format.schema", {"text": {"format": SCHEMA | {"schema": {"enum": DEEP}}}}),
    ("text.format.x", {"text": {"format": SCHEMA | {"x": 5}}}),
    ("text.verbosity", {"text": {"verbosity": "low"}}),
    ("reasoning.effort", {"reasoning": {"effort": "huge"}}),
    ("reasoning.summary", {"reasoning": {"summary": "detailed"}}),
    ("chat_template_kwargs.a", {"chat_template_kwargs": {"a": 1}}),
    ("metadata.a", {"metadata": {"a": 1}}),
    ("metadata", {"metadata": {str(i): "x" for i in range(17)}}),
    ("store", {"store": True}),
    ("background", {"background": True}),
    ("truncation", {"truncation": "auto"}),
    ("previous_response_id", {"previous_response_id": "resp_1"}),
    ("conversation", {"conversation": "conv_1"}),
    ("prompt", {"prompt": {"id": "pmpt_1"}}),
    ("stream_options", {"stream_options": 5}),
    ("stream_options.include_usage", {"stream_options": {"include_usage": True}, "stream": True}),
    ("tools", {"tools": [{"type": "function", "name": "f"}]}),
    ("tools.0.type", {"tools": [{"type": "web_search"}]}),
    ("tools.0.name", {"tools": [{"type": "function", "name": "a b"}]}),
    ("tools.0.name", {"tools": [{"type": "function"}]}),
    ("tools.0.parameters", {"tools": [{"type": "function", "name": "f", "parameters": 5}]}),
    ("tools.0.x", {"tools": [{"type": "function", "name": "f", "x": 1}]}),
    ("tool_choice", {"tool_choice": 5}),
    ("tool_choice", {"tool_choice": "must"}),
    ("tool_choice", {"tool_choice": {"type": "function", "name": "f"}}),
    ("tool_choice.type", {"tool_choice": {"type": "allowed_tools", "tools": []}}),
    ("tool_choice.name", {"tool_choice": {"type": "function"}}),
    ("input.0.call_id", {"input": [RESULT | {"call_id": "x" * 257}]}),
    ("input.1.name", {"input": [RESULT, CALL | {"name": "a b"}]}),
    ("input.1.call_id", {"input": [RESULT, CALL | {"call_id": "x" * 257}]}),
    ("model", {"model": "nothing"}),
    ("interventions.0.name", {"interventions": [{"name": "nothing"}]}),
]


@pytest.mark.parametrize(("param", "fields"), REFUSED)
async def test_refused(client: httpx.AsyncClient, param: str, fields: dict[str, Any]) -> None:
    response = await client.post("/v1/responses", json=asked(**fields))
    assert response.status_code == (404 if param in ("model", "interventions.0.name") else 400)
    error = response.json()["error"]
    assert error["param"] == param
    for of_a_chat in ("completion_tokens", "messages.", "response_format", "reasoning_effort"):
        assert of_a_chat not in error["message"]


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"previous_response_id": "x"}, "send the whole conversation in input"),
        ({"conversation": "x"}, "send the whole conversation in input"),
        ({"store": True}, "store: input should be false; answers are not kept"),
        ({"background": True}, "stream: true"),
        ({"truncation": "auto"}, "/tokenize"),
        ({"max_tokens": 5}, "max_output_tokens"),
        ({"max_output_tokens": 99}, "lower max_output_tokens"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "send the items themselves"),
    ],
)
async def test_a_refusal_says_what_to_do(
    client: httpx.AsyncClient, fields: dict[str, Any], hint: str
) -> None:
    response = await client.post("/v1/responses", json=asked(**fields))
    assert hint in response.json()["error"]["message"]


async def test_what_codex_says_of_itself_is_accepted(client: httpx.AsyncClient) -> None:
    said = {"session_id": "1", "x-codex-window-id": "1:0", "turn": {"n": 1}}
    response = await client.post("/v1/responses", json=asked(client_metadata=said))
    assert response.status_code == 200, response.text


def test_what_clients_make_of_an_answer_comes_back() -> None:
    """`responses.parse` of OpenAI's JavaScript client leaves it in the output."""
    text = {"type": "output_text", "text": "{}", "annotations": [], "parsed": {"a": 1}}
    items = [
        {"type": "message", "role": "assistant", "content": [text]},
        CALL | {"parsed_arguments": {}},
        RESULT,
    ]
    chat = translated(asked(input=items)).chat
    assert [message.content for message in chat.messages] == ["{}", "x"]


async def test_any_number_of_a_schema_is_said_again(client: httpx.AsyncClient) -> None:
    function = '{"type": "function", "name": "f", "parameters": {"maximum": %s, "minimum": 1e999}}'
    body = '{"model": "tiny", "input": "Hi", "tool_choice": "none", "tools": [%s]}'
    response = await client.post(
        "/v1/responses",
        content=body % (function % (2**70)),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 200
    assert response.json()["tools"][0]["parameters"] == {"maximum": 2**70, "minimum": None}


async def test_a_large_body_is_read_apart(client: httpx.AsyncClient) -> None:
    items = [{"role": "user", "content": "x" * 10_000}] * 3
    response = await client.post("/v1/responses", json=asked(input=items, store=True))
    assert response.json()["error"]["param"] == "store"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_nothing_is_stored(client: httpx.AsyncClient, method: str) -> None:
    response = await client.request(method, "/v1/responses/resp_1")
    assert response.status_code == 404
    assert "stores none" in response.json()["error"]["message"]


async def test_a_stream_that_breaks(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_after = 2
    response = await client.post("/v1/responses", json=asked(stream=True))
    *_, delta, failed, error = events(response.text)
    assert delta["type"] == "response.output_text.delta"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "server_error"
    assert error["code"] == "internal_error"
    assert "secret" not in response.text
    response = await client.post("/v1/responses", json=asked())
    assert response.status_code == 500


def test_official_client(server_url: str, engine: FakeEngine) -> None:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="x", max_retries=0) as client:
        answer = client.responses.create(model="tiny", input="Hi", max_output_tokens=4)
        assert (answer.output_text, answer.to_dict()["store"]) == ("abcd", False)
        turns: list[Any] = [{"role": "user", "content": "Hi"}, *answer.output]
        turns.append({"role": "user", "content": "And?"})
        again = client.responses.create(model="tiny", input=turns, max_output_tokens=4)
        assert again.usage is not None
        assert again.usage.input_tokens == len("<user>Hi<assistant>abcd<user>And?")
        with client.responses.stream(model="tiny", input="Hi", max_output_tokens=4) as stream:
            kinds = [event.type for event in stream]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.incomplete"
        with pytest.raises(openai.NotFoundError, match="stores none"):
            client.responses.retrieve("resp_1")
        engine.fail_after = 1
        broken = client.responses.create(model="tiny", input="Hi", stream=True)
        with pytest.raises(openai.APIError, match="failed to answer"):
            list(broken)


class TestCalls:
    SAID = 'Let me see.\n<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n</tool_call>'

    @pytest.fixture
    def engine(self) -> FakeEngine:
        engine = FakeEngine()
        engine.info = replace(engine.info, max_model_len=1000)
        engine.tokenizer.tool_template = QWEN
        engine.says = self.SAID.encode()
        return engine

    def test_official_client(self, server_url: str) -> None:
        class Look(BaseModel):
            city: str

        tool: Any = openai.pydantic_function_tool(Look, name="look")["function"] | {
            "type": "function"
        }
        with openai.OpenAI(base_url=f"{server_url}/v1", api_key="x", max_retries=0) as client:
            common: Any = {"model": "tiny", "max_output_tokens": 200, "tools": [tool]}
            answer = client.responses.parse(input="Hi", **common)
            assert answer.status == "completed"
            _, call = answer.output
            assert answer.output_text == "Let me see."
            assert call.type == "function_call"
            assert (call.name, json.loads(call.arguments)) == ("look", {"city": "Rome"})
            assert answer.tools[0].to_dict() == tool
            with client.responses.stream(input="Hi", **common) as stream:
                kinds = [event.type for event in stream]
                streamed = stream.get_final_response()
            assert kinds.count("response.output_item.done") == 2
            assert "response.function_call_arguments.done" in kinds
            assert streamed.output_text == "Let me see."
            assert streamed.output[1].to_dict() | {"id": "", "call_id": ""} == call.to_dict() | {
                "id": "",
                "call_id": "",
            }
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}
            turns: Any = [{"role": "user", "content": "Hi"}, *answer.output, result]
            assert client.responses.create(input=turns, **common).status == "completed"

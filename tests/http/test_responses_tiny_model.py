"""The official client's Responses API on the real engine, with a tiny random model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel, Field

from reft_runtime import Engine
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import tiny
from tests.helpers.tokenizer import tiny_tokenizer
from tests.http.test_tiny_model import make_file


@pytest.fixture(scope="module")
def tiny_engine() -> Iterator[Engine]:
    with Engine(tiny("llama"), tokenizer=tiny_tokenizer(), max_queued=4, max_running=4) as engine:
        engine.registry.put("task", make_file(engine))
        yield engine


@pytest.fixture
async def responses(tiny_engine: Engine) -> AsyncIterator[Any]:
    app = create_app(tiny_engine, Settings())
    transport = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
    async with app.router.lifespan_context(app), transport:
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=transport)
        yield client.responses
    tiny_engine.check_integrity()
    assert tiny_engine.stats().running == 0
    assert all(entry.in_flight == 0 for entry in tiny_engine.registry.entries())


@pytest.fixture
def asked(tiny_engine: Engine) -> dict[str, Any]:
    return {
        "model": "task",
        "input": "you and the",
        "instructions": "is it on?",
        "max_output_tokens": 12,
        "temperature": 0,
    }


async def test_whole_streamed_and_chat_agree(
    tiny_engine: Engine, responses: Any, asked: dict[str, Any]
) -> None:
    whole = await responses.create(**asked)
    messages = [
        {"role": "system", "content": asked["instructions"]},
        {"role": "user", "content": asked["input"]},
    ]
    chat = await responses._client.chat.completions.create(
        model="task", messages=messages, max_tokens=12, temperature=0
    )
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    text = ""
    async with responses.stream(**asked) as stream:
        async for event in stream:
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert event.type == "response.incomplete"
    assert text == event.response.output_text == whole.output_text
    base = await responses.create(**asked | {"model": tiny_engine.info.model})
    assert base.output_text != whole.output_text


class Person(BaseModel):
    surname: str = Field(max_length=6)
    age: Literal[7, 8, 9]


async def test_parse(responses: Any, asked: dict[str, Any]) -> None:
    asked |= {"max_output_tokens": 80, "temperature": 1}
    whole = await responses.parse(**asked, text_format=Person, extra_body={"seed": 1})
    assert whole.status == "completed"
    assert isinstance(whole.output_parsed, Person)
    assert whole.text.format.name == "Person"
    async with responses.stream(**asked, text_format=Person, extra_body={"seed": 1}) as stream:
        done = [event async for event in stream if event.type == "response.output_text.done"]
        final = await stream.get_final_response()
    assert done[0].parsed == final.output_parsed == whole.output_parsed


async def test_json_object(responses: Any, asked: dict[str, Any]) -> None:
    answer = await responses.create(
        **asked | {"max_output_tokens": 80}, text={"format": {"type": "json_object"}}
    )
    assert answer.output_text.startswith("{")


async def test_a_schema_that_is_none_names_its_place(responses: Any, asked: dict[str, Any]) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}
    with pytest.raises(openai.BadRequestError) as raised:
        await responses.create(**asked, text={"format": form})
    assert raised.value.param == "text.format.schema"
    assert "response_format" not in raised.value.message


async def test_a_completed_answer(responses: Any, asked: dict[str, Any]) -> None:
    (the,) = tiny_tokenizer().encode(" the")
    extra = {"stop_token_ids": [the], "logit_bias": {str(the): 100}}
    async with responses.stream(**asked, extra_body=extra) as stream:
        final = await stream.get_final_response()
    assert (final.status, final.output_text) == ("completed", "")
    assert final.completed_at >= final.created_at
    again = await responses.create(
        model="task",
        input=[
            {"role": "user", "content": "you"},
            *final.output,
            {"role": "user", "content": "is"},
        ],
        max_output_tokens=1,
    )
    assert again.usage.output_tokens == 1

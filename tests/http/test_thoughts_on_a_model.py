"""Forms of answers that a model may think before, on the real engine with a tiny random model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from tokenizers import AddedToken

from reft_runtime import Engine
from reft_runtime.reasoning import Marks
from reft_runtime.text import ChatOptions
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import VOCABULARY, tiny
from tests.helpers.serving import ask_chat, client_of
from tests.helpers.tokenizer import tiny_tokenizer

MARKS = [
    ("<think>", "", "</think>", False),
    ("[THINK]", "", "[/THINK]", True),
    ("<|channel>", "thought", "<channel|>", True),
]
"""The token of the first mark, its rest, the token of the second, and whether they are special."""

TEMPLATE = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' }}"
    "{% if turn.reasoning_content %}{{ '<think>\n' + turn.reasoning_content + '\n</think>\n\n' }}"
    "{% endif %}{{ turn.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if how == 'open' %}{{ '<think>\n' }}{% endif %}"
    "{% if how == 'closed' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"day": {"type": "boolean"}, "of": {"enum": ["</think>", "week"]}},
    "required": ["day", "of"],
    "additionalProperties": False,
}
FORM = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
}
EOS = 2


@pytest.fixture(scope="module", params=MARKS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine whose tokenizer has the marks' tokens."""
    begin, rest, end, special = request.param
    inner = tiny_tokenizer(VOCABULARY - 2)
    for mark in (begin, end):
        inner.add_tokens([AddedToken(mark, special=special)])
    inner.chat_template = TEMPLATE.replace("<think>", begin + rest).replace("</think>", end)
    assert len(inner) == VOCABULARY
    model = tiny("llama", max_position_embeddings=1024)
    with Engine(model, tokenizer=inner, max_running=4) as engine:
        yield engine


@pytest.fixture
async def http(engine: Engine, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    (tmp_path / "tools.jinja").write_text("{{ tools }}" + TEMPLATE)
    settings = Settings(tool_template=str(tmp_path / "tools.jinja"), tool_parser="hermes")
    app = create_app(engine, settings)
    async with client_of(app) as client:
        yield client


async def ask(http: httpx.AsyncClient, how: str, **fields: Any) -> dict[str, Any]:
    asked = {"chat_template_kwargs": {"how": how}, "max_tokens": 60, "temperature": 0}
    return await ask_chat(http, **(asked | fields))


def marks(engine: Engine) -> tuple[int, int]:
    found = engine.tokenizer.marks
    assert isinstance(found, Marks)
    return found.begin_id, found.end_id


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("how", ["", "open", "closed"])
async def test_a_form_is_that_of_what_follows_the_thinking(
    http: httpx.AsyncClient, engine: Engine, how: str, n: int
) -> None:
    begin, end = marks(engine)
    # The model would end its answer, or else what it thinks, or else begin to think.
    bias = {begin: 40, end: 60, EOS: 80}
    answer = await ask(http, how, n=n, logit_bias=bias, **FORM)
    before = {"": [begin, end], "open": [end], "closed": []}[how]
    for choice in answer["choices"]:
        ids, message = choice["token_ids"], choice["message"]
        assert choice["finish_reason"] == "stop"
        assert ids[: len(before)] == before
        assert begin not in ids[len(before) :]
        assert "reasoning_content" not in message  # it is empty
        jsonschema.validate(json.loads(message["content"]), SCHEMA)
    counted = answer["usage"].get("completion_tokens_details")
    assert counted == (None if how == "closed" else {"reasoning_tokens": n * len(before)})


async def test_a_model_that_answers_at_once_is_held_to_the_form(
    http: httpx.AsyncClient, engine: Engine
) -> None:
    begin, _ = marks(engine)
    answer = await ask(http, "", logit_bias={begin: -100}, **FORM)
    [choice] = answer["choices"]
    jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_what_is_thought_is_free(http: httpx.AsyncClient, engine: Engine) -> None:
    begin, end = marks(engine)
    bias = {begin: -100, end: -100}
    free = await ask(http, "open", max_tokens=40, logit_bias=bias | {EOS: -100})
    held = await ask(http, "open", max_tokens=40, logit_bias=bias | {EOS: 100}, **FORM)
    for answer in (free, held):
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] is None
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 40}
    assert held["choices"][0]["token_ids"] == free["choices"][0]["token_ids"]


async def test_a_call_that_is_forced_comes_after_the_thinking(
    http: httpx.AsyncClient, engine: Engine
) -> None:
    begin, end = marks(engine)
    tool = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
    bias = {begin: 40, end: 60, EOS: 80}
    answer = await ask(
        http,
        "",
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        logit_bias=bias,
        max_tokens=200,
    )
    [choice] = answer["choices"]
    assert choice["token_ids"][:2] == [begin, end]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


async def test_several_at_once(http: httpx.AsyncClient, engine: Engine) -> None:
    begin, end = marks(engine)
    bias = {begin: 40, end: 60, EOS: 80}
    asked: list[dict[str, Any]] = [
        {"how": how, "logit_bias": bias, **FORM} for how in ("", "open", "closed")
    ]
    asked += [{"how": "open", "max_tokens": 20}, {"how": ""}]
    alone = [await ask(http, **each) for each in asked]
    together = await asyncio.gather(*(ask(http, **each) for each in asked))
    for one, other in zip(alone, together, strict=True):
        assert one["choices"] == other["choices"]


def test_the_end_of_a_prompt_says_how_an_answer_begins(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    for how, opened in (("", False), ("open", True), ("closed", None)):
        options = ChatOptions(switches={"how": how})
        turns = [
            {"role": "user", "content": "</think>"},
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
            {"role": "user", "content": "<think>"},
        ]
        found = tokenizer.thinking(tokenizer.encode_chat(turns, options=options))
        assert (None if found is None else found.open) == opened

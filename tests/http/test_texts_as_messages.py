"""A prompt that is a text goes through the template of a file that says so, as a chat does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from reft_runtime import Engine, SamplingParams
from reft_runtime.errors import InvalidFile
from reft_runtime.interventions import Edit, Intervention, parse, serialise
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import HIDDEN, tiny
from tests.helpers.serving import client_of
from tests.helpers.tokenizer import tiny_tokenizer
from tests.interventions.make import loreft_tensors

FRAME = "Is it {prompt}\nor not:"


def made(engine: Engine, **said: Any) -> Intervention:
    edit = Edit(1, "l1", loreft_tensors(0, HIDDEN))
    return Intervention.build(engine.registry.base, [edit], **said)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny("llama"), tokenizer=tiny_tokenizer()) as engine:
        for name, template, texts, system in (
            ("chat", "chat", "message", None),
            ("frame", FRAME, "message", None),
            ("as-it-is", FRAME, None, None),
            ("drop", FRAME, "message", "drop"),
        ):
            file = made(engine, template=template, texts=texts, system=system)
            engine.registry.put(name, serialise(file))
        yield engine


@pytest.fixture
async def http(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(engine, Settings())) as client:
        yield client


async def tokens(http: httpx.AsyncClient, model: str, **asked: Any) -> list[int]:
    answer = await http.post("/tokenize", json={"model": model, **asked})
    found: list[int] = answer.json()["tokens"]
    return found


async def complete(http: httpx.AsyncClient, **asked: Any) -> dict[str, Any]:
    answer = await http.post(
        "/v1/completions", json={"max_tokens": 2, "return_token_ids": True, **asked}
    )
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


@pytest.mark.parametrize("model", ["chat", "frame"])
async def test_a_text_is_asked_as_a_message(
    http: httpx.AsyncClient, engine: Engine, model: str
) -> None:
    chat = [{"role": "user", "content": "on the hill"}]
    wanted = await tokens(http, model, messages=chat)
    assert wanted != await tokens(http, "as-it-is", prompt="on the hill")
    assert await tokens(http, model, prompt="on the hill") == wanted
    choice = await complete(http, model=model, prompt="on the hill")
    assert choice["prompt_token_ids"] == wanted
    [answer] = engine.generate(
        ["on the hill"],
        SamplingParams(temperature=0, max_tokens=1),
        intervention=model,
        progress=False,
    )
    assert answer.prompt_tokens == wanted


async def test_what_is_laid_out_stays(http: httpx.AsyncClient, engine: Engine) -> None:
    chat = [{"role": "user", "content": "on the hill"}]
    written = {
        "chat": engine.tokenizer.render(chat),
        "frame": FRAME.replace("{prompt}", "on the hill"),
    }
    for model, text in written.items():
        plain = await tokens(http, "as-it-is", prompt=text)
        assert await tokens(http, model, prompt=text) == plain
        for ending in (" ", "\n\n"):
            assert await tokens(http, model, prompt=text.rstrip() + ending) == plain
        assert await tokens(http, model, prompt=text.rstrip()) == plain
    choice = await complete(http, model="chat", prompt=[5, 6, 7])
    assert choice["prompt_token_ids"] == [5, 6, 7]


async def test_an_echo_is_what_was_asked(http: httpx.AsyncClient, engine: Engine) -> None:
    choice = await complete(http, model="frame", prompt="on the hill", echo=True, logprobs=0)
    assert choice["text"].startswith("Is it on the hill\nor not:")
    scored = choice["logprobs"]
    assert len(scored["tokens"]) == len(choice["prompt_token_ids"]) + len(choice["token_ids"])
    assert scored["text_offset"] == sorted(scored["text_offset"])


async def test_templates_that_differ_leave_texts_as_they_are(http: httpx.AsyncClient) -> None:
    both = [{"name": "chat"}, {"name": "frame"}]
    choice = await complete(http, model="chat", interventions=both, prompt="on the hill")
    assert choice["prompt_token_ids"] == await tokens(http, "as-it-is", prompt="on the hill")
    chat = {"messages": [{"role": "user", "content": "on"}], "interventions": both}
    answer = await http.post("/v1/chat/completions", json={"model": "chat", **chat})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "interventions")
    assert "those of chat and frame" in error["message"]


async def test_what_is_done_with_system_turns_may_differ_without_one(
    http: httpx.AsyncClient,
) -> None:
    both = {"model": "frame", "interventions": [{"name": "frame"}, {"name": "drop"}]}
    user, system = {"role": "user", "content": "on"}, {"role": "system", "content": "Be brief."}
    for messages, status in ([user], 200), ([system, user], 400):
        asked = {**both, "messages": messages, "max_tokens": 1}
        assert (await http.post("/v1/chat/completions", json=asked)).status_code == status
    choice = await complete(http, **both, prompt="on the hill")
    assert choice["prompt_token_ids"] == await tokens(http, "frame", prompt="on the hill")


def test_it_needs_a_template_and_old_files_keep_their_digest(engine: Engine) -> None:
    with pytest.raises(InvalidFile, match="texts: only a template can write"):
        made(engine, texts="message")
    assert b'"texts"' not in serialise(made(engine, template=FRAME))
    assert parse(serialise(made(engine, template="chat", texts="message"))).manifest.texts

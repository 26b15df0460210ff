"""What a training put before completions is in no answer, and no prompt ends with it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from reft_runtime import Engine, SamplingParams
from reft_runtime.interventions import Edit, Intervention, serialise
from reft_runtime.use import Use
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import HIDDEN, tiny
from tests.helpers.serving import client_of
from tests.helpers.tokenizer import tiny_tokenizer
from tests.interventions.make import loreft_tensors

THE = tiny_tokenizer()(" the")["input_ids"][0]
ALWAYS = {THE: 100.0}
"""A bias by which every token is ` the`."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny("llama"), tokenizer=tiny_tokenizer()) as engine:
        for name, prefix in (("before", None), ("none", ""), ("task", " ")):
            made = Intervention.build(
                engine.registry.base,
                [Edit(1, "l1", loreft_tensors(0, HIDDEN))],
                template="Is it {prompt}",
                completion_prefix=prefix,  # type: ignore[arg-type]
            )
            engine.registry.put(name, serialise(made))
        yield engine


@pytest.fixture
async def http(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(engine, Settings())) as client:
        yield client


async def ask(http: httpx.AsyncClient, chat: bool, stream: bool, **fields: Any) -> tuple[str, int]:
    """The text, and how many tokens the prompt had."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked: dict[str, Any] = {"max_tokens": 2, "logit_bias": {str(THE): 100}, **fields}
    prompt = asked.pop("prompt", "on ")
    asked |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    if not stream:
        answer = (await http.post(path, json=asked)).json()
        choice = answer["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        return text, answer["usage"]["prompt_tokens"]
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    lines = (await http.post(path, json=asked)).text.split("\n\n")[:-2]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    choices = [choice for event in events for choice in event["choices"]]
    pieces = [c["delta"].get("content", "") if chat else c["text"] for c in choices]
    return "".join(pieces), events[-1]["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
async def test_answers_and_prompts(http: httpx.AsyncClient, chat: bool, stream: bool) -> None:
    before, length = await ask(http, chat, stream, model="before")
    assert before == " the the"  # files that say nothing keep their behaviour
    assert await ask(http, chat, stream, model="none") == (before, length)
    assert await ask(http, chat, stream, model="task") == ("the the", length - 1)
    text, shorter = await ask(http, chat, stream, model="task", prompt="on")
    assert (text, shorter) == ("the the", length - 1)


async def test_several_and_strengths(http: httpx.AsyncClient) -> None:
    async def used(*uses: tuple[str, float]) -> tuple[str, int]:
        listed = [{"name": name, "strength": strength} for name, strength in uses]
        return await ask(http, False, False, model="task", interventions=listed)

    text, length = await used(("task", 0.0))  # the base model exactly
    assert text == " the the"
    assert await used(("task", 0.5), ("before", 1.0)) == ("the the", length - 1)
    assert await used(("task", 1.0), ("none", 1.0)) == (" the the", length)
    assert await used(("task", 1.0), ("none", 0.0)) == ("the the", length - 1)


async def test_offsets_and_tokenize(http: httpx.AsyncClient) -> None:
    asked = {"model": "task", "prompt": "on ", "max_tokens": 2, "logit_bias": {str(THE): 100}}
    asked |= {"logprobs": 0, "echo": True}
    choice = (await http.post("/v1/completions", json=asked)).json()["choices"][0]
    assert choice["text"] == "on the the"
    assert choice["logprobs"]["text_offset"] == [0, 3, 6]
    counts = [
        (await http.post("/tokenize", json={"model": model, "prompt": "on "})).json()["count"]
        for model in ("before", "task")
    ]
    assert counts == [2, 1]


def test_in_process(engine: Engine) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=2, logit_bias=ALWAYS)
    prompts: Any = ["on ", [{"role": "user", "content": "on "}]]
    for applied, text in (
        ("task", "the the"),
        ("before", " the the"),
        (Use("task", 0), " the the"),
    ):
        made = engine.generate(prompts, sampling, intervention=applied, progress=False)
        assert [one.text for one in made] == [text, text]
    chat, raw = engine.generate([prompts[1], "Is it on"], sampling, intervention="task")
    assert chat.prompt_tokens == raw.prompt_tokens

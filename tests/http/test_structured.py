"""Answers of a given form, over HTTP on the real engine with a tiny random model."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from llguidance import LLParserLimits
from pydantic import BaseModel

from reft_runtime import Engine, SamplingParams
from reft_runtime.errors import InvalidRequest
from reft_runtime.grammar import source
from reft_runtime.grammar.trial import Refusal, Trial
from reft_runtime.sampling import Grammar
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import tiny
from tests.helpers.serving import client_of
from tests.helpers.tokenizer import tiny_tokenizer


class Person(BaseModel):
    surname: str
    age: int


SCHEMA = {
    "type": "object",
    "properties": {
        "surname": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["surname", "age"],
    "additionalProperties": False,
}
PERSON = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def tiny_engine() -> Iterator[Engine]:
    with Engine(tiny("llama"), tokenizer=tiny_tokenizer()) as engine:
        yield engine


@pytest.fixture
async def http(tiny_engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(tiny_engine, Settings())) as client:
        client.base_url = httpx.URL("http://test/v1")
        yield client
    tiny_engine.check_integrity()


@pytest.fixture
def base(tiny_engine: Engine) -> str:
    return tiny_engine.info.model


def chat(base: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "you and the"}]
    return {"model": base, "messages": messages, "max_tokens": 80, "seed": 1, **fields}


@pytest.mark.parametrize("stream", [False, True])
async def test_json_of_a_schema(http: httpx.AsyncClient, base: str, stream: bool) -> None:
    asked = chat(base, response_format=PERSON, n=3, stream=stream, logprobs=stream)
    response = await http.post("/chat/completions", json=asked)
    texts = dict.fromkeys(range(3), "")
    if stream:
        for line in response.text.split("\n\n")[:-2]:
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
    else:
        for choice in response.json()["choices"]:
            assert choice["finish_reason"] == "stop"
            texts[choice["index"]] = choice["message"]["content"]
    found = [Person.model_validate_json(text, strict=True) for text in texts.values()]
    assert all(1 <= person.age <= 99 for person in found)
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
        ({"response_format": {"type": "json_object", "value": SCHEMA}}, r"\{.*, \"age\": \d+\}"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, r"\{.*, \"age\": \d+\}"),
        ({"structured_outputs": {"json": SCHEMA}}, r'\{"surname": ".*"\}|\{.*, "age": \d+\}'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, r'\{"surname": ".*, "age": \d+\}'),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, r"[ab]{3}"),
        ({"structured_outputs": {"choice": ['a"b', "the end"]}}, r'a"b|the end'),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]{2}/'}}, r"x\d\d"),
        ({"structured_outputs": {"json_object": True}}, r"\{.*"),
        ({"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, r"\{.*, \"age\": \d+\}"),
        ({"guided_regex": "[ab]{3}"}, r"[ab]{3}"),
        ({"guided_choice": ["yes", "no"]}, r"yes|no"),
        ({"guided_grammar": 'start: "x" /[0-9]{2}/'}, r"x\d\d"),
    ],
)
async def test_every_field(
    http: httpx.AsyncClient, base: str, fields: dict[str, Any], form: str
) -> None:
    answer = (await http.post("/chat/completions", json=chat(base, **fields))).json()
    assert re.fullmatch(form, answer["choices"][0]["message"]["content"], re.DOTALL)
    body = {"model": base, "prompt": "you", "max_tokens": 80, **fields}
    answer = (await http.post("/completions", json=body)).json()
    assert re.fullmatch(form, answer["choices"][0]["text"], re.DOTALL)


async def test_an_answer_that_is_cut_says_so(http: httpx.AsyncClient, base: str) -> None:
    asked = chat(base, response_format=PERSON, max_tokens=5)
    [choice] = (await http.post("/chat/completions", json=asked)).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith('{"')


async def test_a_schema_that_cannot_be_compiled_names_its_place(
    http: httpx.AsyncClient, base: str
) -> None:
    schema = {"type": "object", "properties": {"a": {"items": {"not": {}}}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = await http.post("/chat/completions", json=chat(base, response_format=form))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "response_format.json_schema.schema.properties.a.items"
    assert 'Unimplemented keys: ["not"]' in error["message"]


async def test_a_schema_beside_json_object_is_given_once(
    http: httpx.AsyncClient, base: str
) -> None:
    form: dict[str, Any] = {"type": "json_object", "value": {"not": {}}}
    response = await http.post("/chat/completions", json=chat(base, response_format=form))
    assert response.json()["error"]["param"] == "response_format.value"
    form["schema"] = {}
    response = await http.post("/chat/completions", json=chat(base, response_format=form))
    assert response.json()["error"]["message"] == (
        "response_format: give the schema once; value is another name of it."
    )


async def test_nobody_waits_for_a_compiler_but_who_needs_it(
    http: httpx.AsyncClient, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, slow = chat(base, guided_regex="[ab]{3}"), chat(base, guided_regex="slow")
    assert (await http.post("/chat/completions", json=known)).status_code == 200
    tried: list[Grammar] = []
    go_on = threading.Event()

    def waits(self: Trial, grammar: Grammar) -> Refusal:
        tried.append(grammar)
        go_on.wait()
        return Refusal("it took too long", "")

    monkeypatch.setattr(Trial, "of", waits)
    # More than there are threads for requests; the grammar is tried once.
    tasks = [asyncio.create_task(http.post("/chat/completions", json=slow)) for _ in range(40)]
    await asyncio.sleep(0)
    assert (await http.post("/chat/completions", json=chat(base))).status_code == 200
    assert (await http.post("/chat/completions", json=known)).status_code == 200
    assert not any(task.done() for task in tasks)
    go_on.set()
    answers = [*await asyncio.gather(*tasks), await http.post("/chat/completions", json=slow)]
    assert {answer.status_code for answer in answers} == {400}
    assert answers[0].json()["error"]["message"] == "guided_regex: it took too long."
    assert len(tried) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_form_that_proves_too_complex_is_a_bad_request(
    http: httpx.AsyncClient, base: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "LIMITS", LLParserLimits(max_lexer_states=20, verbose_errors=False))
    pattern = "x(.*a){12}(.*b){12}(.*c){12}" + stream * "d"
    asked = chat(base, guided_regex=pattern, stream=stream)
    response = await http.post("/chat/completions", json=asked)
    assert "guided_regex: the grammar is too complex; make it smaller." in response.text
    assert response.status_code == 400 or stream


def test_in_process(tiny_engine: Engine) -> None:
    form = Grammar("choice", '["yes", "no"]')
    answers = tiny_engine.generate(["you"] * 8, SamplingParams(grammar=form, seed=None))
    assert {answer.text for answer in answers} <= {"yes", "no"}
    with pytest.raises(InvalidRequest, match="grammar: it cannot be read"):
        tiny_engine.generate("you", SamplingParams(grammar=Grammar("json_schema", "5")))


def chain(links: int) -> dict[str, Any]:
    defs = {f"r{i}": {"properties": {"a": {"$ref": f"#/$defs/r{i + 1}"}}} for i in range(links)}
    return {"$ref": "#/$defs/r0", "$defs": defs | {f"r{links}": {"type": "null"}}}


TERMS = " & ".join(f"/(.*a{i}.*)/" for i in range(30))
RULES = "\n".join(["start: r0", *(f'r{i}: "a" r{i + 1}' for i in range(1500)), 'r1500: "b"'])
HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("deep", {"guided_json": '{"items":' * 5000 + "{}" + "}" * 5000}, "cannot be read|recursion"),
    ("a long chain", {"guided_json": chain(2000)}, "too big"),
    ("itself", {"guided_json": {"$ref": "#"}}, "no token can begin"),
    ("a circle", {"guided_json": {"allOf": [{"$ref": "#"}, {"type": "string"}]}}, "circular"),
    ("huge", {"guided_json": {"enum": ["x" * 300_000]}}, "at most 262144 are compiled"),
    ("contradictory", {"guided_json": {"type": "integer", "minimum": 5, "maximum": 1}}, "Unsat"),
    ("incompatible", {"guided_json": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "Unsat"),
    ("10,000 values", {"guided_json": {"enum": [f"value {i}" for i in range(10_000)]}}, "too big"),
    (
        "many objects",
        {"guided_json": {"enum": [{"a": i} for i in range(3000)]}},
        "Too many items|items; max",
    ),
    ("catastrophic", {"guided_regex": "(x{1000}){1000}"}, "too complex|too big|too many"),
    ("endless", {"guided_grammar": 'start: "a" start'}, "."),
    ("terms", {"guided_grammar": f"start: A\nA: {TERMS}"}, "more than"),
]


async def test_hostile_forms_are_refused_while_others_are_answered(
    http: httpx.AsyncClient, base: str
) -> None:
    async def refused(fields: dict[str, Any]) -> httpx.Response:
        asked = chat(base, **fields)
        return await http.post("/chat/completions", json=asked, timeout=120)

    async def good(until: list[asyncio.Task[httpx.Response]]) -> int:
        answered = 0
        while not all(task.done() for task in until):
            asked = chat(base, max_tokens=5)
            assert (await http.post("/chat/completions", json=asked)).status_code == 200
            answered += 1
        return answered

    tasks = [asyncio.create_task(refused(fields)) for _, fields, _ in HOSTILE]
    assert await good(tasks)
    for (name, fields, said), task in zip(HOSTILE, tasks, strict=True):
        answer = task.result()
        assert answer.status_code == 400, (name, answer.text[:200])
        error = answer.json()["error"]
        assert re.search(said, error["message"]), (name, error["message"])
        assert error["param"].startswith(next(iter(fields))), name
        assert len(error["message"]) < 700


async def test_what_only_looks_hostile_is_answered(http: httpx.AsyncClient, base: str) -> None:
    patterns = ("(a|a)*b", "(a*)*b", "(.*a){20}", "[a-z]{1,100000}")
    forms = [*({"guided_regex": pattern} for pattern in patterns), {"guided_grammar": RULES}]
    for form in forms:
        asked = chat(base, **form, max_tokens=30)
        response = await http.post("/chat/completions", json=asked)
        assert response.status_code == 200, form

"""Every route on the real engine: what it answers is in `openapi.json`, and nothing else is there.

That an answer is as published is checked wherever tests ask the application (`client_of`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from tokenizers import AddedToken

from reft_runtime import Engine
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import VOCABULARY, tiny
from tests.helpers.published import STREAM, Published, events, published
from tests.helpers.serving import client_of
from tests.helpers.tokenizer import tiny_tokenizer
from tests.http.test_thoughts_on_a_model import TEMPLATE
from tests.http.test_tiny_model import make_file

SELDOM = {
    *("ErrorEvent", "ResponseError", "SourceProblem", "KeptStates"),
    *("HealthReport.sources", "HealthReport.problems", "HealthReport.state"),
    *("InterventionEntry.replicas_behind", "RemovedIntervention.replicas_behind"),
    "Stats.replicas",
}
"""What only faults, clusters and models with recurrent layers have; other tests see it."""

DAY = {
    "properties": {"day": {"type": "boolean"}},
    "required": ["day"],
    "additionalProperties": False,
}
FUNCTION = {"name": "look", "parameters": DAY}
TOOL = {"type": "function", "function": FUNCTION}
FORCED = {"tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
ASKED = {"max_tokens": 24, "seed": 1}
SCORED = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True, "trace": True}
IN_PATH = {"name": "task", "model": "task", "response_id": "resp_1"}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose model may think, with a file in its folder."""
    inner = tiny_tokenizer(VOCABULARY - 2)
    inner.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    inner.chat_template = TEMPLATE
    model = tiny("llama", max_position_embeddings=1024)
    folder = tmp_path_factory.mktemp("served")
    with Engine(model, tokenizer=inner, interventions=folder, max_running=4) as engine:
        (folder / "other.safetensors").write_bytes(make_file(engine))
        engine.registry.put("task", make_file(engine))
        yield engine


class Asker:
    """Asks, and notes the operations and fields that it has seen."""

    def __init__(self, client: httpx.AsyncClient, api: Published) -> None:
        self.client = client
        self.api = api
        self.seen: set[str] = set()

    async def __call__(self, method: str, path: str, **fields: Any) -> httpx.Response:
        route = path.partition("?")[0]
        answer = await self.client.request(method, route.format(**IN_PATH), **fields)
        told = self.api.document["paths"][route][method.lower()]
        response = told["responses"][str(answer.status_code)]
        self.seen.add(told["operationId"])
        kind = answer.headers.get("content-type", "").partition(";")[0]
        schema = response.get("content", {}).get(kind, {}).get("schema", {})
        if kind == STREAM:
            for value in events(answer.text):
                self.seen.update(self.api.fields(schema, value))
        elif kind == "application/json":
            self.seen.update(self.api.fields(schema, answer.json()))
        return answer

    async def generate(self, path: str, **fields: Any) -> None:
        for more in ({}, {"stream": True}):
            answer = await self("POST", path, json={"model": "task", **fields, **more})
            assert answer.status_code == 200, answer.text


@pytest.fixture
async def ask(model: Engine, tmp_path: Path) -> AsyncIterator[Asker]:
    (tmp_path / "tools.jinja").write_text("{{ tools }}" + TEMPLATE)
    settings = Settings(tool_template=str(tmp_path / "tools.jinja"), tool_parser="hermes")
    app = create_app(model, settings)
    async with client_of(app) as client:
        yield Asker(client, published())
    model.check_integrity()


def published_fields(api: Published) -> set[str]:
    """Fields of all answers, and of what is in them."""
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).rpartition("/")[2]
            if name in api.schemas:
                fields = {f"{name}.{field}" for field in api.schemas[name].get("properties", ())}
                if not fields <= found:
                    found.update(fields)
                    walk(api.schemas[name])
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list):
                walk(child)

    for operations in api.document["paths"].values():
        walk([operation["responses"] for operation in operations.values()])
    return found


async def test_all_routes_answer_what_is_published(ask: Asker, model: Engine) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    end = model.tokenizer.token_id("</think>")
    thinking = {"chat_template_kwargs": {"how": "open"}, "logit_bias": {str(end): 3}, "seed": 1}
    chats = "/v1/chat/completions"
    await ask.generate(chats, messages=turns, n=2, **ASKED, **SCORED)
    await ask.generate(chats, messages=turns, max_tokens=99, tools=[TOOL], **FORCED)
    await ask.generate(chats, messages=turns, max_tokens=99, **thinking)
    await ask("POST", chats, json={"model": "task", "messages": turns, **USAGE, "max_tokens": 1})
    scored = {"model": "task", "messages": turns, "prompt_logprobs": 1, "max_tokens": 1}
    await ask("POST", chats, json=scored)

    form = {"structured_outputs": {"choice": ["you", "the"]}}
    both = {"echo": True, "logprobs": 1, "return_token_ids": True, "trace": True}
    await ask.generate("/v1/completions", prompt=["you", "the"], **ASKED, **both)
    await ask("POST", "/v1/completions", json={"model": "task", "prompt": "a", **form, **USAGE})
    scored = {"model": "task", "prompt": "a", "prompt_logprobs": 1}
    await ask("POST", "/v1/completions", json=scored)

    flat = {"tools": [{"type": "function", **FUNCTION}], **FORCED}
    asked = {"input": "Hi", "max_output_tokens": 99}
    short = {"max_output_tokens": 9, "top_logprobs": 1, "trace": "along"}
    await ask.generate("/v1/responses", **asked | short)
    await ask.generate("/v1/responses", **asked, **flat)
    await ask.generate("/v1/responses", **asked, **thinking)
    for method in ("GET", "DELETE"):
        await ask(method, "/v1/responses/{response_id}")

    await ask("POST", "/v1/classify", json={"model": "task", "input": "a", "labels": ["b", "c"]})
    await ask("POST", "/tokenize", json={"prompt": "a", "return_token_strs": True})
    await ask("POST", "/detokenize", json={"tokens": [5]})
    for path in ("/v1/models", "/v1/interventions", "/v1/me", "/v1/stats", "/v1/usage"):
        await ask("GET", path)
    for path in ("/tokenizer_info", "/version", "/metrics", "/livez", "/readyz", "/health"):
        await ask("GET", path)
    await ask("GET", "/v1/models/{model}")
    await ask("GET", "/v1/interventions", params={"limit": 1})

    loaded = {"lora_name": "b"}
    of_name = "/v1/interventions/{name}"
    for seed in (1, 2):
        await ask("PUT", of_name, content=make_file(model, seed))
    for change in ("rollback", "pin", "unpin", "warm"):
        await ask("POST", f"{of_name}/{change}")
    for part in ("", "/file", "/versions"):
        await ask("GET", f"{of_name}{part}")
    await ask("POST", "/v1/load_lora_adapter", json=loaded | {"lora_path": "other.safetensors"})
    await ask("POST", "/v1/unload_lora_adapter", json=loaded)
    await ask("DELETE", of_name)

    operations = {
        operation["operationId"]
        for methods in ask.api.document["paths"].values()
        for operation in methods.values()
    }
    assert operations - ask.seen == set()
    unseen = {
        field
        for field in published_fields(ask.api) - ask.seen
        if not {field, field.partition(".")[0]} & SELDOM
    }
    assert unseen == set()


def test_generators_get_names_that_stay() -> None:
    document = published().document
    found = {
        operation["operationId"]: f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert found == OPERATIONS
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"] != operation["operationId"].replace("_", " ").title()
            assert len(operation["tags"]) == 1
    # Objects for defaults stop `openapi-python-client`.
    assert '"default": {' not in json.dumps(document)


@pytest.mark.parametrize(
    "item",
    [{"type": "function_call_output"}, {"type": "item_reference", "id": "msg_1"}],
)
def test_items_that_are_refused_are_not_published(item: dict[str, str]) -> None:
    body = {"model": "tiny", "input": [item]}
    with pytest.raises(jsonschema.ValidationError):
        published().check_value({"$ref": "#/components/schemas/ResponsesRequest"}, body)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"model": "tiny"}),
        ("/v1/completions", {"model": "tiny"}),
        ("/v1/responses", {"model": "tiny"}),
        ("/v1/classify", {"model": "tiny", "labels": ["a", "b"]}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": [5]}),
    ],
)
async def test_published_defaults_ask_for_nothing(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any]
) -> None:
    """Generated clients send them all."""
    api = published()
    body = api.document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    told = api.schemas[body["schema"]["$ref"].rpartition("/")[2]]["properties"]
    defaults = {name: field["default"] for name, field in told.items() if "default" in field}
    answer = await client.post(path, json=defaults | body["example"] | fields)
    assert answer.status_code == 200, answer.text


OPERATIONS = {
    "livez": "GET /livez",
    "health": "GET /health",
    "readyz": "GET /readyz",
    "create_completion": "POST /v1/completions",
    "create_chat_completion": "POST /v1/chat/completions",
    "create_response": "POST /v1/responses",
    "delete_response": "DELETE /v1/responses/{response_id}",
    "find_response": "GET /v1/responses/{response_id}",
    "classify": "POST /v1/classify",
    "list_models": "GET /v1/models",
    "get_model": "GET /v1/models/{model}",
    "list_interventions": "GET /v1/interventions",
    "get_intervention": "GET /v1/interventions/{name}",
    "put_intervention": "PUT /v1/interventions/{name}",
    "delete_intervention": "DELETE /v1/interventions/{name}",
    "list_versions": "GET /v1/interventions/{name}/versions",
    "roll_back": "POST /v1/interventions/{name}/rollback",
    "pin": "POST /v1/interventions/{name}/pin",
    "unpin": "POST /v1/interventions/{name}/unpin",
    "warm": "POST /v1/interventions/{name}/warm",
    "get_file": "GET /v1/interventions/{name}/file",
    "load_lora_adapter": "POST /v1/load_lora_adapter",
    "unload_lora_adapter": "POST /v1/unload_lora_adapter",
    "tokenize": "POST /tokenize",
    "tokenizer_info": "GET /tokenizer_info",
    "detokenize": "POST /detokenize",
    "get_me": "GET /v1/me",
    "get_stats": "GET /v1/stats",
    "get_usage": "GET /v1/usage",
    "version": "GET /version",
    "metrics": "GET /metrics",
}

"""What was meant by a name that is not known, and what an answer says was applied."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from reft_runtime.errors import MOST_COMPARED, did_you_mean, nearest
from tests.http.conftest import chat, completion
from tests.http.fake_engine import DIGEST


def test_names_that_are_alike() -> None:
    known = ["billing", "pirate", "pirate-2", "pilots", "sentiment"]
    assert did_you_mean("pirat", known) == " Did you mean `pirate` or `pirate-2`?"
    assert did_you_mean("biling", known) == " Did you mean `billing`?"
    assert did_you_mean("nobody", known) == ""
    assert len(nearest("task-1", (f"task-{i}" for i in range(10 * MOST_COMPARED)))) == 3


@pytest.mark.parametrize(
    ("fields", "param", "hint"),
    [
        ({"max_token": 5}, "max_token", "did you mean max_tokens? If not, leave it out."),
        ({"temperatur": 1}, "temperatur", "did you mean temperature?"),
        ({"strenght": 1}, "strenght", "did you mean strength?"),
        ({"strength": 1}, "strength", "give it beside a name in interventions"),
        (
            {"interventions": [{"name": "emoji", "strenght": 1}]},
            "interventions.0.strenght",
            "did you mean strength?",
        ),
        (
            {"stream": True, "stream_options": {"include_usages": True}},
            "stream_options.include_usages",
            "did you mean include_usage?",
        ),
        (
            {"messages": [{"role": "user", "contents": "x", "content": "x"}]},
            "messages.0.contents",
            "did you mean content?",
        ),
        ({"nonsense": 1}, "nonsense", "server; leave it out."),
        (
            {"response_format": {"type": "text", "schema": {}}},
            "response_format.schema",
            "server; leave it out.",
        ),
        (
            {"response_format": {"type": "json_object", "shema": {}}},
            "response_format.shema",
            "did you mean schema? If not",
        ),
        ({"regex": "a"}, "regex", 'give it in structured_outputs: {"regex": ...}'),
        ({"ebnf": "a"}, "ebnf", "structured_outputs.grammar"),
        ({"json_schema": "{}"}, "json_schema", "give it as response_format"),
        ({"name": "x"}, "name", "server; leave it out."),
        ({"guided_jsn": {}}, "guided_jsn", "did you mean guided_json?"),
    ],
)
async def test_an_unknown_field(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str, hint: str
) -> None:
    response = await client.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert hint in error["message"]


async def test_a_field_of_another_item_is_not_said_to_be_meant(client: httpx.AsyncClient) -> None:
    item = {"role": "user", "content": "Hi", "name": "Bob"}
    response = await client.post("/v1/responses", json={"model": "tiny", "input": [item]})
    assert response.json()["error"]["message"] == (
        "input.0.name is not supported by this server; leave it out."
    )


async def test_an_unknown_task(client: httpx.AsyncClient) -> None:
    async def message(method: str, path: str, **body: Any) -> str:
        response = await client.request(method, path, json=body or None)
        assert response.status_code == 404
        return str(response.json()["error"]["message"])

    path = "/v1/completions"
    asked = completion(model="pirat")
    assert await message("POST", path, **asked) == (
        "The model `pirat` does not exist. Did you mean `pirate`?"
    )
    asked = completion(model="tiny", interventions=[{"name": "emogi"}])
    assert "`emogi` does not exist. Did you mean `emoji`?" in await message("POST", path, **asked)
    assert "Did you mean `tiny`?" in await message("POST", path, **completion(model="tinny"))
    assert "Did you mean `formal`?" in await message("GET", "/v1/models/formel")
    assert "Did you mean `formal`?" in await message("GET", "/v1/interventions/formel")
    assert "Did you mean `formal`?" in await message("DELETE", "/v1/interventions/formel")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/interventions/emoji"),
        ("GET", "/v1/stats"),
        ("GET", "/metrics"),
        ("POST", "/tokenize"),
        ("DELETE", "/v1/interventions/emoji"),
    ],
)
async def test_query_parameters_are_refused(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    response = await client.request(method, path, params={"limit": "5"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "limit"
    assert f"{path} takes no query parameter 'limit'; leave it out" in error["message"]
    assert (await client.get("/v1/interventions/emoji")).status_code == 200


async def test_probes_may_send_what_they_like(client: httpx.AsyncClient) -> None:
    assert (await client.get("/livez?from=balancer")).status_code == 200


HALF = {"name": "pirate", "strength": 0.5}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "tiny"}, "tiny"),
        ({"model": "emoji"}, "emoji"),
        ({"model": "tiny:emoji"}, "tiny:emoji"),
        ({"model": f"emoji@{DIGEST[:8]}"}, f"emoji@{DIGEST[:8]}"),
        ({"model": "tiny", "interventions": [{"name": "emoji"}]}, "emoji"),
        ({"model": "emoji", "interventions": [HALF]}, "pirate*0.5"),
        (
            {"model": "tiny", "interventions": [HALF, {"name": "emoji", "strength": -1}]},
            "pirate*0.5+emoji*-1",
        ),
        ({"model": "emoji", "interventions": []}, "emoji"),
    ],
)
async def test_model_says_what_was_applied(
    client: httpx.AsyncClient, fields: dict[str, Any], said: str, stream: bool
) -> None:
    response = await client.post("/v1/completions", json=completion(**fields, stream=stream))
    assert response.status_code == 200, response.text
    assert response.text.count(f'"model":"{said}"') == response.text.count('"model":') > 0

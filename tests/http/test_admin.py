"""Managing interventions, listing models, health, metrics."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import httpx
import pytest

from reft_runtime.interventions.registry.entry import SourceState
from server.metrics import MAX_NAMES
from tests.http.conftest import completion
from tests.http.fake_engine import DIGEST, FakeEngine


async def test_models(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    base, emoji, *_ = body["data"]
    assert (base["id"], base["parent"], base["root"]) == ("tiny", None, "tiny")
    assert (emoji["id"], emoji["parent"], emoji["root"]) == ("emoji", "tiny", DIGEST)
    assert base["max_model_len"] == emoji["max_model_len"] == 100
    for name in ("tiny", "emoji", "tiny:emoji", f"emoji@{DIGEST[:8]}"):
        assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
    assert (await client.get("/v1/models/nobody")).status_code == 404


async def test_interventions(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/interventions")).json()
    assert [entry["id"] for entry in body["data"]] == ["emoji", "formal", "pirate"]
    entry = (await client.get("/v1/interventions/emoji")).json()
    assert entry == body["data"][0]
    assert (entry["digest"], entry["versions"], entry["tier"]) == (DIGEST, [DIGEST], "host")
    assert (await client.get("/v1/interventions/nobody")).status_code == 404


async def test_put_and_delete(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    data = bytes(range(256)) * 1000
    response = await client.put("/v1/interventions/new", content=data)
    assert response.status_code == 201
    assert response.json()["id"] == "new"
    assert engine.own.last_put == (data, None)
    assert (await client.put("/v1/interventions/new", content=data)).status_code == 200
    response = await client.delete("/v1/interventions/new")
    assert response.json() == {"id": "new", "object": "intervention", "deleted": True}
    assert (await client.delete("/v1/interventions/new")).status_code == 404


async def test_checksum_of_an_upload(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    digest = hashlib.sha256(b"x")
    encoded = base64.b64encode(digest.digest()).decode()
    for header in ({"x-sha256": digest.hexdigest()}, {"digest": f"SHA-256={encoded}"}):
        await client.put("/v1/interventions/new", content=b"x", headers=header)
        assert engine.own.last_put == (b"x", digest.hexdigest())
    bad = [("x-sha256", "abc"), ("digest", "md5=abc"), ("digest", "sha-256=!"), ("digest", "x")]
    for name, value in bad:
        response = await client.put("/v1/interventions/new", content=b"y", headers={name: value})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name
    assert engine.own.last_put[0] == b"x"


async def test_upload_is_bounded(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.routes.interventions.MAX_FILE_BYTES", 1000)

    async def body() -> Any:
        for _ in range(1001):
            yield b"x"

    assert (await client.put("/v1/interventions/a", content=body())).status_code == 413
    assert (await client.put("/v1/interventions/a", content=b"x" * 1001)).status_code == 413
    assert "a" not in engine.own.versions
    assert (await client.put("/v1/interventions/a", content=b"x" * 1000)).status_code == 201


async def test_vllm_routes(client: httpx.AsyncClient) -> None:
    async def post(action: str, **body: Any) -> httpx.Response:
        return await client.post(f"/v1/{action}_lora_adapter", json=body)

    response = await post("load", lora_name="new", lora_path="new.safetensors")
    assert response.status_code == 200
    assert response.text == "Success: LoRA adapter 'new' added successfully."
    response = await post("load", lora_name="new", lora_path="new.safetensors")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "lora_name"
    response = await post("load", lora_name="new", lora_path="x", load_inplace=True)
    assert response.status_code == 200
    response = await post("load", lora_name="b", lora_path="/etc/passwd")
    assert response.json()["error"]["param"] == "lora_path"
    assert (await post("load", lora_name="b")).json()["error"]["param"] == "lora_path"
    response = await post("unload", lora_name="new")
    assert response.text == "Success: LoRA adapter 'new' removed successfully."
    assert (await post("unload", lora_name="new")).status_code == 404
    assert (await post("unload")).status_code == 400


async def test_what_a_sidecar_sends(client: httpx.AsyncClient) -> None:
    """The bodies of Kubernetes' dynamic-lora-sidecar."""
    load = {"lora_name": "new", "lora_path": "new.safetensors", "base_model_name": "tiny"}
    assert (await client.post("/v1/load_lora_adapter", json=load)).status_code == 200
    unload = {"lora_name": "new", "lora_int_id": 1}
    assert (await client.post("/v1/unload_lora_adapter", json=unload)).status_code == 200


async def test_health(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert (await client.get(path)).status_code == 200
    engine.heartbeat_age = 10.1
    for path in ("/livez", "/readyz", "/health"):
        assert (await client.get(path)).status_code == 503
    engine.heartbeat_age = 0.0
    engine.alive = False
    assert (await client.get("/livez")).json() == {"status": "engine not running"}


async def test_what_is_away_shows_without_its_address_and_the_server_stays_ready(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    away = "The source is away: access is denied."
    engine.own.places = [
        SourceState(1, "folder", "/secret/folder", None),
        SourceState(2, "s3", "s3://secret/tasks", away),
    ]
    engine.own.state = "The state cannot be used now."
    for path in ("/readyz", "/health"):
        answer = await client.get(path)
        assert answer.status_code == 200
        assert answer.json() == {
            "status": "ok",
            "sources": [{"source": 2, "kind": "s3", "problem": away}],
            "state": "The state cannot be used now.",
        }
    told = (await client.get("/v1/stats")).json()["problems"]
    assert told == [f"s3://secret/tasks: {away}", "The state cannot be used now."]
    lines = (await client.get("/metrics")).text.splitlines()
    assert 'reft:source_up{source="/secret/folder"} 1.0' in lines
    assert 'reft:source_up{source="s3://secret/tasks"} 0.0' in lines
    assert "reft:problems 1.0" in lines  # the state


async def test_not_ready_before_the_canary(app: Any, engine: FakeEngine) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).json() == {"status": "starting"}
        async with app.router.lifespan_context(app):
            assert (await client.get("/readyz")).status_code == 200
    assert engine.streams[0].sampling.max_tokens == 1


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json()["version"]


async def test_metrics(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json=completion(n=2))
    await client.post("/v1/completions", json=completion(model="emoji", stream=True))
    text = (await client.get("/metrics")).text
    for line in (
        "reft:num_requests_running 0.0",
        "reft:num_requests_waiting 0.0",
        "reft:kv_cache_usage_perc 0.5",
        'reft:prefix_cache_queries_total{kind="own"} 16.0',
        'reft:prefix_cache_hits_total{kind="base"} 32.0',
        'reft:prefix_cache_blocks{kind="base"} 3.0',
        "reft:prefix_cache_evictions_total 2.0",
        "reft:prefix_cache_snapshots 3.0",
        "reft:prefix_cache_snapshot_hits_total 5.0",
        "reft:prefix_cache_snapshot_evictions_total 1.0",
        "reft:prompt_tokens_total 5.0",
        "reft:generation_tokens_total 7.0",
        'reft:request_success_total{finished_reason="length"} 3.0',
        "reft:time_to_first_token_seconds_count 2.0",
        "reft:time_per_output_token_seconds_count 6.0",
        "reft:e2e_request_latency_seconds_count 2.0",
        "reft:request_queue_time_seconds_sum 0.5",
        'reft:intervention_requests_total{intervention="(base)"} 1.0',
        'reft:intervention_requests_total{intervention="emoji"} 1.0',
        'reft:intervention_generation_tokens_total{intervention="emoji"} 4.0',
        'reft:interventions{tier="host"} 3.0',
    ):
        assert f"{line}\n" in text


async def test_metrics_have_bounded_cardinality(client: httpx.AsyncClient) -> None:
    for number in range(MAX_NAMES + 5):
        await client.put(f"/v1/interventions/n{number}", content=b"x")
    text = (await client.get("/metrics")).text
    assert f'loads_total{{intervention="n{MAX_NAMES - 1}"}} 1.0' in text
    assert f'intervention="n{MAX_NAMES}"' not in text
    assert 'loads_total{intervention="(other)"} 5.0' in text

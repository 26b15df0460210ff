"""Spans of requests, as a collector of OpenTelemetry receives them."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from reft_runtime.errors import ConfigError
from server.app import create_app
from server.settings import Settings, load_settings
from tests.helpers.serving import client_of
from tests.http.conftest import chat, completion
from tests.http.fake_engine import FakeEngine
from tests.http.test_logs import Lines, log  # noqa: F401 (a fixture)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """A collector: its URL, the spans that came, and the attributes of who sent them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 200
        self.headers: dict[str, str] = {}
        self.answering = threading.Event()
        self.answering.set()
        self.spans: list[Any] = []
        self.resource: dict[str, Any] = {}

    def take(self, body: bytes) -> None:
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = of(each.resource.attributes)
            self.spans += [span for scope in each.scope_spans for span in scope.spans]


def of(attributes: Any) -> dict[str, Any]:
    """Attributes as plain values."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        found = getattr(value, kind)
        return [plain(one) for one in found.values] if kind == "array_value" else found

    return {one.key: plain(one.value) for one in attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            zipped = self.headers["content-encoding"] == "gzip"
            found.answering.wait()
            if found.status == 200:
                found.take(gzip.decompress(body) if zipped else body)
            self.send_response(found.status)
            for header in found.headers.items():
                self.send_header(*header)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def settings_of(url: str) -> Settings:
    return load_settings({"otlp_traces_endpoint": url})


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer(collector: Collector, stream: bool, log: Lines) -> None:  # noqa: F811
    app = create_app(FakeEngine(), settings_of(collector.url))
    before = time.time_ns()
    async with client_of(app) as client:
        body = completion(interventions=[{"name": "pirate", "strength": 0.5}], n=2, stream=stream)
        headers = {"traceparent": PARENT, "x-request-id": "mine"}
        await client.post("/v1/completions", json=body, headers=headers)
    [span] = collector.spans
    assert span.name == "POST /v1/completions"
    assert span.kind == span.SPAN_KIND_SERVER
    assert span.trace_id.hex() == PARENT.split("-")[1]
    assert span.parent_span_id.hex() == PARENT.split("-")[2]
    assert span.status.code == span.status.STATUS_CODE_UNSET
    found = of(span.attributes)
    first, whole = found["gen_ai.latency.time_to_first_token"], found["gen_ai.latency.e2e"]
    assert before < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
    assert abs(span.end_time_unix_nano - span.start_time_unix_nano - whole * 1e9) < 1e6
    [event] = span.events
    assert event.name == "first token"
    assert abs(event.time_unix_nano - span.start_time_unix_nano - first * 1e9) < 1e6
    [version] = found.pop("reft.interventions")
    assert version.startswith("pirate@")
    assert found.pop("gen_ai.response.id").startswith("cmpl-")
    assert found == {
        "http.request.method": "POST",
        "url.scheme": "http",
        "url.path": "/v1/completions",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "reft.request_id": "mine",
        "gen_ai.provider.name": "reft-server",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.response.model": "pirate*0.5",
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.latency.e2e": whole,
        "gen_ai.latency.time_in_queue": 0.25,
        "gen_ai.latency.time_to_first_token": first,
    }
    assert collector.resource["service.name"] == "reft-server"
    assert log.json[-1]["trace_id"] == PARENT.split("-")[1]


async def test_what_is_refused_fails_or_is_of_no_interest(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=tasks,where=here")
    engine = FakeEngine()
    async with client_of(create_app(engine, settings_of(collector.url))) as client:
        await client.get("/livez")
        await client.get("/metrics")
        await client.get("/v1/models/pirate", headers={"traceparent": "not one"})
        await client.head("/v1/models")
        await client.get("/no/such/route")
        await client.post("/v1/chat/completions", json=chat(temperature=9))
        engine.overloaded = True
        await client.post("/v1/chat/completions", json=chat())
        engine.overloaded, engine.fail_after = False, 2
        await client.post("/v1/chat/completions", json=chat(stream=True))
    told = [
        (span.name, of(span.attributes)["http.response.status_code"], span.status.code)
        for span in collector.spans
    ]
    assert told == [
        ("GET /v1/models/{model:path}", 200, 0),
        ("HEAD /v1/models", 200, 0),
        ("GET", 404, 0),
        ("POST /v1/chat/completions", 400, 0),
        ("POST /v1/chat/completions", 503, 2),
        ("POST /v1/chat/completions", 200, 2),
    ]
    assert of(collector.spans[-2].attributes)["error.type"] == "503"
    assert collector.resource["service.name"] == "tasks"
    assert collector.resource["where"] == "here"


async def test_what_the_parent_does_not_sample_is_left_out(
    collector: Collector,
    log: Lines,  # noqa: F811
) -> None:
    async with client_of(create_app(FakeEngine(), settings_of(collector.url))) as client:
        await client.get("/v1/models", headers={"traceparent": f"{PARENT[:-1]}0"})
    assert collector.spans == []
    assert "trace_id" not in log.json[-1]


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (301, {"location": "https://elsewhere/v1/traces"}, "301 Moved Permanently"),
        (503, {"retry-after": "60"}, "503 Service Unavailable"),
    ],
)
async def test_why_spans_are_lost(
    collector: Collector,
    log: Lines,  # noqa: F811
    status: int,
    headers: dict[str, str],
    reason: str,
) -> None:
    collector.status, collector.headers = status, headers
    async with client_of(create_app(FakeEngine(), settings_of(collector.url))) as client:
        await client.get("/v1/models")
    assert log.json[-1]["message"] == f"{collector.url} takes no spans: {reason}, so they are lost"


async def test_a_stop_waits_for_a_slow_collector_but_not_long(
    collector: Collector,
    log: Lines,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.tracing.FLUSH_SECONDS", 0.05)
    collector.answering.clear()
    async with client_of(create_app(FakeEngine(), settings_of(collector.url))) as client:
        await client.get("/v1/models")
    said = f"{collector.url} did not take the last spans, so they are lost"
    collector.answering.set()
    assert said in [line["message"] for line in log.json]


async def test_headers_of_a_trace_that_are_not_valid(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    async with client_of(create_app(FakeEngine(), settings_of(collector.url))) as client:
        for state in ("MINE, forged", "a=b," * 300):
            headers = [("traceparent", PARENT), ("tracestate", state)]
            await client.get("/v1/models", headers=headers)
        await client.get("/v1/models", headers={"traceparent": "0" * 600})
        several = [("traceparent", PARENT), ("tracestate", "a=1"), ("tracestate", "b=2")]
        await client.get("/v1/models", headers=several)
    assert [span.trace_state for span in collector.spans] == ["", "", "", "a=1,b=2"]
    assert not [one for one in caplog.records if one.name.startswith("opentelemetry")]


async def test_a_collector_that_refuses_is_told_once(
    collector: Collector,
    log: Lines,  # noqa: F811
) -> None:
    app = create_app(FakeEngine(), settings_of(collector.url))
    context = app.state.context
    collector.status = 401
    async with client_of(app) as client:
        for _ in range(2):
            assert (await client.post("/v1/completions", json=completion())).status_code == 200
            context.tracing._provider.force_flush()
        [problem] = (await client.get("/readyz")).json()["problems"]
        assert problem.startswith(f"{collector.url} takes no spans: ")
        assert problem.endswith(": 401 Unauthorized")
        assert [line["level"] for line in log.json] == ["info", "warning", "info"]
        collector.status = 200
        await client.post("/v1/completions", json=completion())
        context.tracing._provider.force_flush()
        assert "problems" not in (await client.get("/readyz")).json()
    assert log.json[-1]["message"] == f"{collector.url} takes spans again"
    assert len(collector.spans) == 1


async def test_a_collector_that_is_away(
    monkeypatch: pytest.MonkeyPatch,
    log: Lines,  # noqa: F811
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{closed.getsockname()[1]}/v1/traces"
        url = f"http://name:SECRET@{place}?token=SECRET"
        async with client_of(create_app(FakeEngine(), settings_of(url))) as client:
            assert (await client.post("/v1/completions", json=completion())).status_code == 200
    assert f"http://{place} takes no spans: " in log.text[-1]
    assert "SECRET" not in log.text[-1]


@pytest.mark.parametrize(
    "url", ["localhost:4318", "http://host:4318", "ftp://host/v1/traces", "http://:1/v1/traces"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match=r"--otlp-traces-endpoint .*: write it as http://HOST"):
        settings_of(url)


def test_variables_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "100")  # less than a batch
    with pytest.raises(ConfigError, match=r"OTEL_.*max_queue_size"):
        create_app(FakeEngine(), settings_of("http://host:4318/v1/traces"))


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.settings.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'reft-server\[otel\]'"):
        settings_of("http://host:4318/v1/traces")


def test_there_is_none_without_the_option() -> None:
    assert create_app(FakeEngine(), Settings()).state.context.tracing is None

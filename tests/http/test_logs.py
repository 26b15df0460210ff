"""The log: one line a request, as text or as JSON, and nothing that a client can forge."""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.logs import JsonFormatter, TextFormatter, configure_logging
from server.settings import Settings, load_settings
from tests.helpers.forked import Forked
from tests.http import serve_fake
from tests.http.conftest import chat, completion
from tests.http.fake_engine import FakeEngine

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


class Lines(logging.Handler):
    """What is logged, by both formatters."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.json: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.text.append(TextFormatter().format(record))
        self.json.append(json.loads(JsonFormatter().format(record)))


@pytest.fixture
def log() -> Iterator[Lines]:
    lines, logger = Lines(), logging.getLogger("reft")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer(client: httpx.AsyncClient, log: Lines, stream: bool) -> None:
    body = completion(prompt="Hello", interventions=[{"name": "pirate", "strength": 0.5}], n=2)
    headers = {"x-request-id": "mine"}
    await client.post("/v1/completions", json={**body, "stream": stream}, headers=headers)
    [fields] = log.json
    seconds = [fields.pop(f"{name}_seconds") for name in ("queue", "first_token", "total")]
    assert seconds[0] == 0.25
    assert 0 < seconds[1] <= seconds[2]
    assert re.fullmatch(TIME, fields.pop("time"))
    assert fields.pop("message").startswith("POST /v1/completions 200 id=mine task=pirate*0.5")
    assert fields == {
        "level": "info",
        "logger": "reft.requests",
        "id": "mine",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "task": "pirate*0.5",
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "finish_reason": "length",
    }
    assert re.fullmatch(
        rf"{TIME} INFO POST /v1/completions 200 id=mine task=pirate\*0\.5 tokens=5\+8"
        r" queue=0\.250s first_token=\d\.\d{3}s total=\d\.\d{3}s finish=length",
        log.text[0],
    )


async def test_what_is_refused(client: httpx.AsyncClient, log: Lines, engine: FakeEngine) -> None:
    await client.post("/v1/chat/completions", json=chat(temperature=9))
    await client.get("/v1/models/nobody")
    engine.overloaded = True
    await client.post("/v1/chat/completions", json=chat(model="emoji"))
    engine.overloaded = False
    assert [line["status"] for line in log.json] == [400, 404, 503]
    assert log.json[2]["task"] == "emoji"
    assert "finish_reason" not in log.json[0]


async def test_a_fault_in_a_stream(
    client: httpx.AsyncClient, log: Lines, engine: FakeEngine
) -> None:
    engine.fail_after = 2
    await client.post("/v1/completions", json=completion(stream=True))
    request = log.json[-1]
    assert (request["status"], request["finish_reason"]) == (200, "error")
    assert request["completion_tokens"] == 2


async def test_probes_and_scrapes_are_not_logged(client: httpx.AsyncClient, log: Lines) -> None:
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        await client.get(path)
    assert log.json == []


async def test_a_path_cannot_forge_a_line(client: httpx.AsyncClient, log: Lines) -> None:
    await client.get("/v1/models/x%0A2026-01-01T00:00:00.000Z%20INFO%20forged")
    assert len(log.text) == 1
    assert "\n" not in log.text[0]


async def test_a_long_path_is_cut(client: httpx.AsyncClient, log: Lines) -> None:
    await client.get("/v1/models/" + "\u4f60" * 5000)
    assert log.json[0]["path"].endswith("%BD%A0...")
    assert len(log.text[0]) < 3000


def test_what_a_message_quotes_cannot_forge_a_line(log: Lines) -> None:
    """As the name of a file does, or of a tensor in it, that somebody put into a served folder."""
    quoted = "x\x1b]0;you\x07\x9b1m\n2026-11-26T09:12:01.482Z INFO audit: put a.b tenant=a"
    logging.getLogger("reft").warning("%s is not served", quoted)
    [line] = log.text
    assert [bool(re.match(TIME, part)) for part in line.split("\n")] == [True, False]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", line)
    assert log.json[0]["message"] == f"{quoted} is not served"


def test_an_exception_is_in_its_line() -> None:
    record = logging.LogRecord("reft", logging.ERROR, "", 0, "Broken: %s", ("x",), None)
    try:
        raise ValueError("why")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    line = json.loads(JsonFormatter().format(record))
    assert line["message"] == "Broken: x"
    assert line["exception"].endswith("ValueError: why")


def test_the_format_is_checked() -> None:
    assert load_settings({}).log_format == Settings().log_format == "text"
    with pytest.raises(Exception, match="--log-format"):
        load_settings({"log_format": "xml"})


def test_a_process_that_logs_json() -> None:
    process = Forked(serve_fake.main, "{}", '{"log_format": "json"}')
    for first in process.output:
        if found := re.search(r"Serving at (http://[^\\\s]+)", json.loads(first)["message"]):
            break
    url = found[1] if found else ""
    httpx.post(f"{url}/v1/completions", json=completion())
    httpx.get(f"{url}/readyz")
    process.send_signal(signal.SIGTERM)
    lines = [json.loads(line) for line in process.output]
    assert process.end() == 0
    assert [line["path"] for line in lines if "path" in line] == ["/v1/completions"]
    assert any(line["message"].startswith("Shutting down") for line in lines)
    assert all(re.fullmatch(TIME, line["time"]) for line in lines)
    assert json.loads(first)["message"].startswith("Serving at http")


def test_other_handlers_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve has one in each replica, and asks it where its log is."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging, "captureWarnings", print)
    levels = {
        name: logging.getLogger(name).level for name in ("reft", "reft_runtime", "reft.audit")
    }
    file = logging.NullHandler()
    theirs = logging.handlers.MemoryHandler(1, target=file)
    try:
        configure_logging(Settings())
        [ours] = logging.root.handlers
        assert isinstance(ours.formatter, TextFormatter)
        assert theirs.target is file
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

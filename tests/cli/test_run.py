"""`reft run`: files of requests, answered in order, and gone on with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from reft_runtime.errors import ConfigError
from reft_runtime.reaching import Unreachable
from server.cli.batch import Line, answer_all, read_requests
from server.cli.main import app
from server.settings import Settings
from tests.e2e.conftest import served
from tests.http.fake_engine import FakeEngine
from tests.training.make import folder

CHAT = "/v1/chat/completions"


def request(name: str, model: str = "tiny", **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": name}], "max_tokens": 3}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body | more}


def place(path: Path, *requests: Any) -> Path:
    """A file with these lines; what is no text is written as JSON."""
    lines = (each if isinstance(each, str) else json.dumps(each) for each in requests)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().split("\n") if line]


@pytest.fixture
def engine() -> Any:
    return FakeEngine()


@pytest.fixture
def url(engine: Any) -> Iterator[str]:
    with served(engine, Settings()) as address:
        yield address


def reft(url: str, *arguments: object) -> Any:
    return CliRunner(env={"REFT_URL": url}).invoke(app, ["run", *map(str, arguments)])


def test_answers_and_refusals_in_the_order_of_the_requests(url: str, tmp_path: Path) -> None:
    asked = [request("a"), request("b\u2028c", "nope"), request("c", "emoji")]
    text = {"custom_id": "d", "method": "POST", "url": "/v1/completions"}
    asked.append(text | {"body": {"model": "tiny", "prompt": "x", "max_tokens": 2}})
    response = {"custom_id": "e", "method": "POST", "url": "/v1/responses"}
    asked.append(response | {"body": {"model": "tiny", "input": "x", "max_output_tokens": 2}})
    file, out = (
        place(tmp_path / "requests.jsonl", *asked[:2], "", *asked[2:]),
        tmp_path / "out.jsonl",
    )
    ended = reft(url, file, "--out", out)
    assert ended.exit_code == 1
    assert ended.stdout == f"{out}: 5 answers; 1 were refused, see `response.body.error`\n"
    found = answers(out)
    assert [one["custom_id"] for one in found] == [one["custom_id"] for one in asked]
    assert [one["response"]["status_code"] for one in found] == [200, 404, 200, 200, 200]
    first, refused, _, completed, last = (one["response"] for one in found)
    assert first["body"]["choices"][0]["message"]["content"] == "abc"
    assert "nope" in refused["body"]["error"]["message"]
    assert completed["body"]["choices"][0]["text"] == "ab"
    assert last["body"]["output"][0]["content"][0]["text"] == "ab"
    assert len({one["id"] for one in found}) == 5
    assert all(one["response"]["request_id"] and one["error"] is None for one in found)


def test_a_hyphen_is_standard_output(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = place(tmp_path / "requests.jsonl", request("\u65e5"), request("b", "nope"))
    for _ in range(2):
        ended = reft(url, file, "--out", "-")
        assert ended.exit_code == 1
        found = [json.loads(line) for line in ended.stdout_bytes.decode().splitlines()]
        assert [one["custom_id"] for one in found] == ["\u65e5", "b"]
        assert ended.stderr.startswith("standard output: 2 answers; 1 were refused")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert isinstance(reft(url, file, "--out", "-", "--json").exception, ConfigError)


def test_it_goes_on_where_it_was_stopped(url: str, engine: FakeEngine, tmp_path: Path) -> None:
    asked = [request("r0", "nope"), *(request(f"r{n}") for n in range(1, 6))]
    file, out = place(tmp_path / "requests.jsonl", *asked), tmp_path / "out.jsonl"
    assert reft(url, file, "--out", out).exit_code == 1
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    before = len(engine.streams)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # killed in the middle of a line
    ended = reft(url, file, "--out", out, "--json")
    assert json.loads(ended.stdout) == {
        "out": str(out),
        "requests": 6,
        "done_before": 2,
        "refused": 1,
    }
    assert len(engine.streams) - before == 4
    assert out.read_bytes().startswith(b"".join(lines[:2]))
    assert [one["custom_id"] for one in answers(out)] == [f"r{n}" for n in range(6)]
    again = reft(url, file, "--out", out)
    assert again.stdout.startswith(f"{out}: 6 answers, 6 of them before; 1 were refused")
    assert again.exit_code == 1
    assert len(engine.streams) - before == 4


def test_answers_of_other_requests_stay(url: str, engine: FakeEngine, tmp_path: Path) -> None:
    file, out = place(tmp_path / "requests.jsonl", request("a")), tmp_path / "out.jsonl"
    before = len(engine.streams)
    for theirs, message in (
        (
            {"custom_id": "b", "response": {"status_code": 200}},
            r"line 1 of .* does not answer 'a': .* Name another one",
        ),
        ("not JSON", "line 1 of .* does not answer 'a'"),
    ):
        kept = place(out, theirs).read_text()
        with pytest.raises(ConfigError, match=f"^out: {message}"):
            raise reft(url, file, "--out", out).exception
        assert out.read_text() == kept
    taken = {"response": {"status_code": 200}}
    place(out, taken | {"custom_id": "a"}, taken | {"custom_id": "b"})
    with pytest.raises(ConfigError, match=r"line 2 of .* does not answer any request"):
        raise reft(url, file, "--out", out).exception
    with pytest.raises(ConfigError, match="holds the requests"):
        raise reft(url, file, "--out", file).exception
    with pytest.raises(ConfigError, match=r"^out: .*No such file or directory"):
        raise reft(url, file, "--out", tmp_path / "none" / "out.jsonl").exception
    assert len(engine.streams) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: "),
        ("[]", "an object is wanted"),
        (request("a") | {"custom_id": 1}, "custom_id: give a text"),
        (request("a") | {"method": "GET"}, "method: must be POST"),
        (request("a") | {"url": "/v1/embeddings"}, "url: must be /v1/chat/completions or"),
        (request("a") | {"body": "x"}, "body: give the request's body"),
        (request("a", stream=True), "body.stream: answers are written whole"),
        (request("ok"), "custom_id: 'ok' is that of .*requests.jsonl:1, too"),
        ('{"custom_id": "x", "custom_id": "y"}', "not JSON: a key occurs twice"),
    ],
)
def test_a_wrong_line_is_said_before_anything_is_asked(
    line: Any, message: str, url: str, engine: FakeEngine, tmp_path: Path
) -> None:
    file, out = place(tmp_path / "requests.jsonl", request("ok"), line), tmp_path / "out.jsonl"
    before = len(engine.streams)
    with pytest.raises(ConfigError, match=f"requests.jsonl:2: {message}"):
        raise reft(url, file, "--out", out).exception
    assert len(engine.streams) == before
    assert not out.exists()


def test_a_mark_of_utf_8_is_no_part_of_the_first_request(tmp_path: Path) -> None:
    file = place(tmp_path / "requests.jsonl", request("a"), request("b"))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert [line.custom_id for line in read_requests(file)] == ["a", "b"]


def test_no_file_no_request_no_server(url: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        raise reft(url, tmp_path / "none.jsonl", "--out", out).exception
    with pytest.raises(ConfigError, match="there is no request in it"):
        raise reft(url, place(tmp_path / "empty.jsonl", ""), "--out", out).exception
    file = place(tmp_path / "requests.jsonl", request("a"), request("b"))
    with pytest.raises(
        Unreachable, match=r"no answer from .* 0 of 2 answers are in .*: run it again"
    ):
        raise reft("http://127.0.0.1:9", file, "--out", out).exception
    with pytest.raises(ConfigError, match=r"write it with its scheme, http://127\.0\.0\.1:9"):
        raise reft("127.0.0.1:9", file, "--out", out).exception


async def test_order_room_and_retries(tmp_path: Path) -> None:
    """The first is slow, and the server has no room for the third at first."""
    lines = [Line(f"f:{n}", str(n), CHAT, {"n": n}) for n in range(40)]
    running, most, tries = 0, 0, 0

    async def handle(sent: httpx.Request) -> httpx.Response:
        nonlocal running, most, tries
        running, number = running + 1, json.loads(sent.content)["n"]
        most = max(most, running)
        await asyncio.sleep(0.05 if number == 0 else 0)
        running -= 1
        if number == 2:
            tries += 1
            if tries < 3:
                return httpx.Response(503, headers={"retry-after": "0"}, json={})
        if number == 3:
            return httpx.Response(500, text="no JSON")
        return httpx.Response(200, json={"n": number})

    written: list[dict[str, Any]] = []
    async with httpx.AsyncClient(
        transport=httpx.MockTransport(handle), base_url="http://test"
    ) as client:
        await answer_all(client, iter(lines), 4, written.append)
    assert [one["custom_id"] for one in written] == [str(n) for n in range(40)]
    assert (most, tries) == (4, 3)
    assert written[3]["response"]["body"] == {
        "error": {"message": "no JSON", "type": "server_error"}
    }

    async def refuse(sent: httpx.Request) -> httpx.Response:
        return httpx.Response(401, json={})

    async with httpx.AsyncClient(
        transport=httpx.MockTransport(refuse), base_url="http://test"
    ) as client:
        with pytest.raises(
            ConfigError, match=r"^api_key: http://test needs a valid key; give it as --api-key"
        ):
            await answer_all(client, iter(lines), 4, written.append)


def test_a_model_in_this_process(tmp_path: Path) -> None:
    folder(tmp_path / "tiny")
    asked = [request(f"r{n}", temperature=0, max_tokens=4) for n in range(5)]
    file, out = place(tmp_path / "requests.jsonl", *asked), tmp_path / "out.jsonl"
    given = ["--model", str(tmp_path / "tiny"), "--dtype", "float32"]
    ended = CliRunner(env={"REFT_API_KEY": "secret"}).invoke(
        app, ["run", str(file), "--out", str(out), *given]
    )
    assert ended.exit_code == 0, ended.output
    found = answers(out)
    assert [one["custom_id"] for one in found] == [f"r{n}" for n in range(5)]
    assert {one["response"]["status_code"] for one in found} == {200}
    assert [line.custom_id for line in read_requests(file)] == [f"r{n}" for n in range(5)]

"""Commands against a running server: what they do to it, and what they say."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from pydantic import SecretStr
from rich.console import Console
from typer.testing import CliRunner

from reft_runtime.client import Server
from reft_runtime.errors import ConfigError, InvalidFile, ReftError
from reft_runtime.interventions import Registry
from reft_runtime.reaching import KeyRefused, NotServed, Unreachable
from server.cli import main as cli
from server.cli.backend import RemoteBackend
from server.cli.console import table
from server.settings import Settings
from server.tenants.keys import new_key
from tests.e2e.conftest import served
from tests.helpers.replicas import OnlyBehind
from tests.helpers.serving import listening
from tests.http.fake_engine import FakeEngine
from tests.interventions.make import BASE, digest, file_bytes


@pytest.fixture
def engine() -> Any:
    engine: Any = FakeEngine()
    engine.registry = Registry(BASE)
    for name in ("one", "two"):
        engine.registry.put(name, file_bytes(description=f"The {name} [bold]of them."))
    return engine


@pytest.fixture
def url(engine: Any) -> Iterator[str]:
    with served(engine, Settings()) as address:
        yield address


def reft(url: str, *arguments: str, stdin: str | None = None) -> Any:
    return CliRunner(env={"REFT_URL": url}).invoke(cli.app, arguments, input=stdin)


def refused(url: str, kind: type[ReftError], *arguments: str) -> str:
    ended = reft(url, *arguments)
    assert isinstance(ended.exception, kind), ended.output
    assert "\n" not in ended.exception.message
    return ended.exception.message


def test_the_listing_pages_searches_and_sorts(
    url: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_runtime.client.MAX_PAGE", 2)
    for number in range(3):
        engine.registry.put(f"more-{number}", file_bytes(number))
    listed = reft(url, "ls")
    head, *lines = listed.stdout.splitlines()
    assert head.split() == ["name", "description", "kinds", "layers", "tier", "size", "requests"]
    assert [line.split()[0] for line in lines] == ["more-0", "more-1", "more-2", "one", "two"]
    assert "The one [bold]of them." in lines[3]
    backwards = json.loads(reft(url, "ls", "--sort", "-name", "--json").stdout)
    assert [entry["id"] for entry in backwards] == ["two", "one", "more-2", "more-1", "more-0"]
    [found] = json.loads(reft(url, "ls", "-q", "ONE", "--json").stdout)
    assert found["kinds"] == ["loreft"]
    nothing = reft(url, "ls", "-q", "three")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert nothing.stderr == "No intervention has 'three' in its name or description.\n"
    assert "Did you mean `size`?" in refused(url, ConfigError, "ls", "--sort", "sise")


def test_a_file_goes_there_and_back(url: str, engine: Any, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"file-{number}.safetensors").write_bytes(file_bytes(number))
    first, second = (digest(file_bytes(number))[:12] for number in range(2))
    pushed = reft(url, "push", str(tmp_path))
    assert pushed.stdout.splitlines()[0].startswith(f"file-0: added, {first}, ")
    same = reft(url, "push", str(tmp_path / "file-0.safetensors"))
    assert same.stdout.startswith(f"file-0: unchanged, {first}, ")
    again = reft(url, "push", f"{tmp_path}/*-1.safetensors", "--name", "file-0")
    assert again.stdout.startswith(f"file-0: replaced, {second}, ")
    back = reft(url, "rollback", "file-0")
    assert back.stdout == f"file-0: {first} is served, {second} was\n"
    assert reft(url, "rollback", "file-0", first).stdout == f"file-0: {first} is served already\n"
    shown = reft(url, "show", "file-0")
    assert f"digest      {digest(file_bytes(0))}\n" in shown.stdout
    versions = [line.split()[:2] for line in shown.stdout.splitlines()[-2:]]
    assert versions == [[first, "served"], [second, "kept"]]
    out = tmp_path / "pulled.safetensors"
    assert reft(url, "pull", f"file-0@{second}", "--out", str(out)).exit_code == 0
    assert out.read_bytes() == file_bytes(1)
    assert "is there already; --force" in refused(
        url, ConfigError, "pull", "file-0", "--out", str(out)
    )
    assert reft(url, "pull", "file-0", "--out", str(out), "--force").exit_code == 0
    assert out.read_bytes() == file_bytes(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "file-0.safetensors",
        "file-1.safetensors",
        "pulled.safetensors",
    ]


def test_a_file_is_pulled_to_standard_output(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pulled = reft(url, "pull", "one", "--out", "-")
    assert pulled.exit_code == 0
    assert digest(pulled.stdout_bytes) == digest(file_bytes(description="The one [bold]of them."))
    assert "leave out --json" in refused(url, ConfigError, "pull", "one", "--out", "-", "--json")
    assert not list(tmp_path.iterdir())


def test_a_version_where_a_name_is_asked_for(url: str, engine: Any) -> None:
    version = f"one@{engine.registry.entry('one').digest[:12]}"
    for command in ("show", "rollback", "pin", "warm", "unpin", "rm"):
        options = ["--yes"] if command == "rm" else []
        said = refused(url, ConfigError, command, version, *options)
        assert said.startswith(f"name: {version!r} is a version, and this takes a name. `reft show")
    assert engine.registry.entry("one")


def test_a_place_for_a_pulled_file_that_is_none(url: str, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for out in (tmp_path / "taken" / "x", tmp_path / "missing" / "x", tmp_path / ("x" * 300)):
        said = refused(url, ConfigError, "pull", "one", "--out", str(out))
        assert said.startswith(f"out: {out} cannot be written: ")


def test_what_has_no_end_is_not_pushed(url: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "circle.safetensors").symlink_to("circle.safetensors")
    pushed = reft(url, "push", str(tmp_path))
    assert pushed.exit_code == 2
    for name, reason in (
        ("pipe", "Not a regular file."),
        ("zero", "Not a regular file."),
        ("circle", "Too many levels of symbolic links."),
    ):
        assert f"reft: {tmp_path}/{name}.safetensors: {reason}" in pushed.stderr
    refused(url, InvalidFile, "inspect", str(tmp_path / "circle.safetensors"))


@pytest.mark.parametrize("name", ["", ".", "..", "one/versions", "interventions/one.safetensors"])
def test_what_is_no_name_is_told(url: str, engine: Any, tmp_path: Path, name: str) -> None:
    for command in (["show"], ["rm", "--yes"], ["rollback"], ["pull"]):
        assert f"{name!r} is no intervention's name" in refused(url, ConfigError, *command, name)
    file = tmp_path / "three.safetensors"
    file.write_bytes(file_bytes(3))
    pushed = reft(url, "push", str(file), "--name", name)
    assert pushed.exit_code == 2
    assert f"reft: {file}: name: {name!r} is no intervention's name" in pushed.stderr
    assert [entry.name for entry in engine.registry.entries()] == ["one", "two"]


def test_the_base_models_name_is_one_small_request(
    url: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(self: Server) -> list[str]:
        raise AssertionError("all names were fetched")

    monkeypatch.setattr(Server, "names", listed)
    assert RemoteBackend(Server(url)).model == engine.info.model == Server(url).base_model()


def test_a_file_that_is_refused_keeps_no_other_back(url: str, engine: Any, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("no tensors")
    (tmp_path / "b.safetensors").write_bytes(file_bytes(1))
    pushed = reft(url, "push", str(tmp_path), f"{tmp_path}/c.safetensors")
    assert pushed.exit_code == 2
    assert pushed.stdout.startswith("b: added, ")
    wrong, missing, last = pushed.stderr.splitlines()
    assert wrong.startswith(f"reft: {tmp_path}/a.safetensors: the server answered 400: Not an")
    assert missing.startswith(f"reft: {tmp_path}/c.safetensors: No such file or directory.")
    assert last == "reft: 2 of 3 were not taken."
    assert "there is no *.safetensors" in refused(url, ReftError, "push", f"{tmp_path}/x*")


def test_an_upload_is_told_though_another_comes_at_once(
    url: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = engine.registry.put

    def twice(name: str, *rest: Any, **options: Any) -> Any:
        monkeypatch.setattr(engine.registry, "put", put)  # which calls itself
        result = put(name, *rest, **options)
        put(name, file_bytes(9))
        return result

    monkeypatch.setattr(engine.registry, "put", twice)
    entry, change = Server(url).upload("one", file_bytes(1))
    assert (entry["digest"], change) == (digest(file_bytes(1)), "replaced")
    assert Server(url).entry("one")["digest"] == digest(file_bytes(9))


def test_removal_asks_and_looks_first(
    url: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--yes" in refused(url, ConfigError, "rm", "one")
    assert "Did you mean `two`?" in refused(url, NotServed, "rm", "--yes", "one", "twoo")
    assert len(engine.registry.entries()) == 2
    typed = type("Typed", (), {"isatty": lambda self: True})()
    monkeypatch.setattr("server.cli.remote.sys", type("Sys", (), {"stdin": typed})())
    kept = reft(url.replace("//", "//me:SECRET@"), "rm", "one", stdin="n\n")
    assert kept.exit_code == 1
    assert kept.stdout.startswith(f"Remove one ({digest(_one())[:12]}) from {url}? [y/N]")
    assert len(engine.registry.entries()) == 2
    assert reft(url, "rm", "one", stdin="y\n").stdout.endswith("one: removed\n")
    assert json.loads(reft(url, "rm", "-y", "two", "--json").stdout) == [
        {"id": "two", "deleted": True}
    ]
    assert engine.registry.entries() == []


def test_replicas_that_are_behind_are_named(engine: Any, tmp_path: Path) -> None:
    engine.registry.shares_state = True
    path = tmp_path / "one.safetensors"
    path.write_bytes(file_bytes(1))
    with served(engine, Settings(), OnlyBehind("second", "third")) as address:
        for arguments in (
            ("push", str(path)),
            ("rollback", "one"),
            ("pin", "one"),
            ("rm", "-y", "one"),
        ):
            done = reft(address, *arguments)
            assert (done.exit_code, "second" in done.stdout) == (0, False)
            assert done.stderr.startswith("reft: one: not yet on second, third;")
        told = reft(address, "rm", "-y", "two", "--json")
    assert json.loads(told.stdout) == [
        {"id": "two", "deleted": True, "replicas_behind": ["second", "third"]}
    ]


def _one() -> bytes:
    return file_bytes(description="The one [bold]of them.")


def test_what_runs_is_shown(url: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    version = engine.registry.resolve("two")
    engine.registry.hold(version)
    shown = reft(url, "ps")
    assert "0 running of 8, 0 waiting" in shown.stdout
    assert "problem" not in shown.stdout
    assert shown.stdout.splitlines()[-1].split() == ["two", "1", "1"]
    [used] = json.loads(reft(url, "ps", "--json").stdout)["in_use"]
    assert used["id"] == "two"
    monkeypatch.setattr(engine.registry, "state_problem", lambda: "The state cannot be used now.")
    assert "The state cannot be used now." in reft(url, "ps").stdout
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            engine.registry.release(version)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("server.cli.remote.time.sleep", wait)
    watched = reft(url, "ps", "--watch")
    assert watched.exit_code == 0
    assert waits == [1.0] * 3


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["show", "on"], 1),
        (["rollback", "on"], 1),
        (["rollback", "one", "0123456789"], 1),
        (["pull", "one@0123456789"], 1),
        (["rollback", "one", "zz"], 2),
        (["ls", "--url", "http://127.0.0.1:9"], 2),
        (["ls", "--url", "127.0.0.1:9"], 2),
        (["ls", "--orders"], 2),
        (["push"], 2),
        (["sweep", "Hi"], 2),
        (["lss"], 2),
    ],
)
def test_the_status_says_what_is_not_so(
    url: str,
    arguments: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("REFT_URL", url)
    monkeypatch.setattr(sys, "argv", ["reft", *arguments])
    left: list[Any] = []
    monkeypatch.setattr(cli, "_leave", left.append)
    cli.main()
    assert left == [status]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("reft: ")
    assert said.err.count("\n") == 1


def test_a_number_that_is_cut_says_so() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=14)
    console.print(table({"name": "whole", "size": "right"}, [("question-type", "282.7 kB")]))
    assert [line.count("…") for line in stream.getvalue().splitlines()] == [0, 2]


def test_keys_and_addresses(engine: Any, tmp_path: Path) -> None:
    with served(engine, Settings(api_key=SecretStr("right"))) as url:
        assert "--api-key or REFT_API_KEY" in refused(url, ConfigError, "ls")
        assert "--api-key or REFT_API_KEY" in refused(url, ConfigError, "ps", "--api-key", "wrong")
        (tmp_path / "a.safetensors").touch()
        (tmp_path / "b.safetensors").touch()
        assert "--api-key or REFT_API_KEY" in refused(url, KeyRefused, "push", str(tmp_path))
        assert reft(url, "ls", "--api-key", "right").exit_code == 0
        assert reft(f"{url}/v1/", "ls", "--api-key", "right").exit_code == 0
    assert "reft serve" in refused(url, Unreachable, "ls")
    assert "no answer from http://[::" in refused("http://[::", Unreachable, "ls")
    assert "write it with its scheme, http://here:8000" in refused("here:8000", ConfigError, "ls")
    assert "write http://HOST:PORT, not 'ftp://x'" in refused("ftp://x", ConfigError, "ls")
    assert "write http://HOST:PORT, not 'http:'" in refused("http://", ConfigError, "ls")


@pytest.mark.parametrize(
    ("status", "kind", "body", "told"),
    [
        (200, "text/html; charset=utf-8", "<html>\n</html>", "it answered with text/html."),
        (200, "", "", "it answered with nothing that could be read."),
        (404, "text/html", "<html>\n</html>", "it answered 404: Not Found"),
        (404, "application/json", '{"detail": "Not Found"}', 'answered 404: {"detail": "Not'),
        (404, "application/json", '{"error": {"message": "No.", "code": null}}', "404: No."),
    ],
)
def test_what_is_no_reft_server_is_told_so(status: int, kind: str, body: str, told: str) -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", kind.encode())] if kind else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body.encode()})

    config = uvicorn.Config(other, port=0, log_config=None, lifespan="off")
    with listening(uvicorn.Server(config)) as url:
        message = refused(url, ConfigError, "ls")
    assert message.startswith("url: no reft-server is there, or one of another version: ")
    assert told in message


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://me:SECRET@127.0.0.1:9/v1?token=SECRET", "no answer from http://127.0.0.1:9/v1: "),
        ("http://me:SE/CRET@127.0.0.1:9", "http://127.0.0.1:9: it is no valid URL"),
        ("http://me:SE#CRET@127.0.0.1:9", "http://127.0.0.1:9: it is no valid URL"),
        ("me:SECRET@127.0.0.1:9", "write it with its scheme, http://127.0.0.1:9, not"),
    ],
)
def test_what_is_secret_in_an_address_is_not_said(address: str, shown: str) -> None:
    said = refused(address, ConfigError, "ls") + repr(Server(address, "KEY"))
    assert shown in said
    assert not {"SE", "CRET", "KEY"} & set(re.findall(r"[A-Z]+", said))


def test_pinned_and_warm(url: str, engine: Any) -> None:
    one, two = (f"{name}: pinned, 1.1 kB" for name in ("one", "two"))
    assert reft(url, "pin", "two", "one", "two").stdout.splitlines() == [two, one]
    listed = [line.split()[-5:-3] for line in reft(url, "ls").stdout.splitlines()[1:]]
    assert listed == [["host,", "pinned"]] * 2
    assert "\ntier         host, pinned\n" in reft(url, "show", "one").stdout
    [entry] = json.loads(reft(url, "unpin", "one", "--json").stdout)
    assert (entry["id"], entry["pinned"]) == ("one", False)
    assert reft(url, "unpin", "two").stdout == "two: not pinned, 1.1 kB\n"
    assert reft(url, "warm", "one").stdout == "one: in memory, 1.1 kB\n"
    assert "Did you mean `two`?" in refused(url, NotServed, "pin", "twoo")


TEAM = """
[tenants.team-a]
keys = ["{}"]
interventions = ["one"]
upload = true
requests_per_minute = 1
limits.max_tokens = 512
"""


def test_a_tenant_is_told_who_it_is_and_what_it_may_not_do(engine: Any, tmp_path: Path) -> None:
    key, hashed = new_key()
    file = tmp_path / "keys.toml"
    file.write_text(TEAM.format(hashed))
    with served(engine, Settings(keys=file, api_key=SecretStr("owner"))) as url:
        mine = ("--api-key", key)
        assert reft(url, "whoami", *mine).stdout.splitlines() == [
            "tenant      team-a",
            "role        user",
            "sees        one team-a.*",
            "changes     team-a.*",
            "limits      1 requests a minute, max_tokens 512",
            "base model  tiny",
        ]
        owner = reft(url, "whoami", "--api-key", "owner").stdout
        assert "changes     what it sees\nlimits      none\n" in owner
        assert json.loads(reft(url, "whoami", *mine, "--json").stdout)["tenant"] == "team-a"
        others = ["usage", "--tenant", "team-b"]
        for command in (["pin", "one"], ["rm", "-y", "one"], ["ps"], others):
            assert refused(url, ConfigError, *command, *mine).startswith(
                "api_key: this key may not do that. "
            )
        # A user's commands find the base model's name without what is for admins.
        asked = ("compare", "Hi", "-i", "one", "--max-tokens", "2", *mine)
        assert re.fullmatch(
            r"api_key: This key may send 1 requests a minute\. Send this one again in \d+ s\.",
            refused(url, ConfigError, *asked),
        )
        Server(url, "owner").ask([("/v1/completions", {"model": "tiny", "prompt": "Hello"})])
        rows = [line.split()[:2] for line in reft(url, "usage", *mine).stdout.splitlines()]
        assert rows == [["tenant", "requests"], ["team-a", "1"], ["total", "1"]]


def test_no_more_is_asked_at_once_than_a_tenant_may_have(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.cli.batch.TRIES", 1)
    key, hashed = new_key()
    file, requests, answers = (tmp_path / name for name in ("keys.toml", "in", "out"))
    file.write_text(TEAM.format(hashed).replace("requests_per_minute", "concurrent_requests"))
    body = {"model": "one", "prompt": "Hello", "max_tokens": 8}
    line = {"method": "POST", "url": "/v1/completions", "body": body}
    requests.write_text("".join(json.dumps({**line, "custom_id": f"{i}"}) + "\n" for i in range(4)))
    with served(engine, Settings(keys=file)) as url:
        assert len(Server(url, key).ask([("/v1/completions", body)] * 4)) == 4
        reft(url, "run", str(requests), "--out", str(answers), "--api-key", key)
    told = [
        json.loads(line)["response"]["status_code"] for line in answers.read_text().splitlines()
    ]
    assert told == [200] * 4


def test_usage(url: str, engine: Any) -> None:
    nothing = reft(url, "usage", "--from", "2024-01-01", "--to", "2024-01-31")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert nothing.stderr.splitlines() == [
        "Nothing was used from 2024-01-01 to 2024-01-31.",
        "Counted in memory since the server's start: it has no --state-dir.",
    ]
    for model in ("tiny", "one", "one"):
        body = {"model": model, "prompt": "Hello", "max_tokens": 4}
        Server(url).ask([("/v1/completions", body)])
    shown = [line.split() for line in reft(url, "usage").stdout.splitlines()]
    assert shown == [
        ["tenant", "requests", "prompt", "cached", "generated"],
        ["(owner)", "3", "15", "6", "12"],
        ["total", "3", "15", "6", "12"],
    ]
    by = reft(url, "usage", "--by", "intervention,day", "--tenant", "(owner)").stdout.splitlines()
    assert by[0].split()[:2] == ["day", "intervention"]
    assert [line.split()[1:] for line in by[1:3]] == [
        ["(base)", "1", "5", "2", "4"],
        ["one", "2", "10", "4", "8"],
    ]
    found = json.loads(reft(url, "usage", "--by", "intervention", "--json").stdout)
    assert [row["requests"] for row in found["data"]] == [1, 2]
    assert "day, tenant and intervention" in refused(url, ConfigError, "usage", "--by", "week")

"""The keys file: what it may say, how it is followed, and that no key is ever told."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import socket
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from typer.testing import CliRunner

from reft_runtime.errors import ConfigError
from server.cli.main import app as command
from server.lifecycle import check_exposure, listen
from server.settings import Settings, load_settings
from server.tenants import keys
from server.tenants.keys import Keys, digest_of
from server.tenants.keys_file import read_keys_file
from server.tenants.tenant import OWNER, Limits, Tenant
from tests.http.conftest import completion
from tests.http.fake_engine import FakeEngine

KEY, OTHER = "reft-AAAAtheFirstKeyOfTheseTests", "reft-BBBBtheOtherKeyOfTheseTests"
HASH, OTHER_HASH = ("sha256:" + digest_of(key.encode()).hex() for key in (KEY, OTHER))
SEEN = 'interventions = ["*"]'


def table(name: str = "team-a", hashed: str = HASH, lines: str = SEEN) -> str:
    return f'[tenants.{name}]\nkeys = ["{hashed}"]\n{lines}\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text(table())
    return file


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# What it says


def test_a_whole_file(file: Path) -> None:
    file.write_text(
        f"""
        [tenants.team-a]
        keys = ["{HASH}", "{OTHER_HASH}"]
        role = "user"
        interventions = ["team-a.*", "sentiment", "[ab]?"]
        upload = true
        weight = 2
        requests_per_minute = 600
        tokens_per_minute = 100_000
        concurrent_requests = 16
        limits = {{ max_tokens = 512, n = 4 }}

        [tenants.ops]
        keys = ["sha256:{"0" * 64}"]
        role = "admin"
        """
    )
    team = Tenant(
        "team-a",
        "user",
        ("team-a.*", "sentiment", "[ab]?"),
        upload=True,
        weight=2.0,
        requests_per_minute=600,
        tokens_per_minute=100_000,
        concurrent_requests=16,
        limits=Limits(max_tokens=512, n=4),
    )
    tenants = read_keys_file(file)
    assert list(tenants.values()) == [team, team, Tenant("ops", "admin")]
    assert next(iter(tenants)) == hashlib.sha256(KEY.encode()).digest()
    for name, seen in (("sentiment", True), ("team-a.x", True), ("a1", True), ("team-ab", False)):
        assert team.sees(name) is seen


def test_the_documents_example_is_usable(file: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/tenants.md").read_text()
    [example] = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    file.write_text(example)
    team, ops = read_keys_file(file).values()
    assert (team.name, team.upload, team.limits.n) == ("team-a", True, 4)
    assert ops.may_change("sentiment")


def test_a_user_sees_its_own_uploads_without_a_pattern(file: Path) -> None:
    file.write_text(table(lines="interventions = []\nupload = true"))
    [tenant] = read_keys_file(file).values()
    assert tenant.sees("team-a.x")
    assert not tenant.sees("team-a")
    assert not tenant.sees("team-ab.x")


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["tenants: field required."]),
        ("[tenants]", ["tenants: is empty; give at least one"]),
        (
            '[tenants.team-a]\nkeys = []\nrole = "user"\n' + table(name="b", lines=""),
            [
                r"tenants\.team-a\.interventions: say which the user sees",
                r"tenants\.b\.interventions: say which the user sees",
                r"tenants\.team-a\.keys: is empty; give at least one\.",
            ],
        ),
        ("tenants = 1", ["tenants: input should be a valid dictionary."]),
        ("a = ", [r"is not valid TOML, see end of document\."]),
        (f'{KEY} = "{HASH}', [r"is not valid TOML, see end of document\."]),
        (f"{table()}\n[tenants.team-a]", [r"is not valid TOML, see line 5, column \d+\."]),
        (
            table(lines="role = 'root'\nupload = 'yes'\nweight = 0"),
            [
                r"tenants\.team-a\.role: input should be 'user' or 'admin'\.",
                r"tenants\.team-a\.upload: input should be a valid boolean\.",
                r"tenants\.team-a\.weight: input should be greater than or equal to 0\.01\.",
            ],
        ),
        (table(lines=""), [r"tenants\.team-a\.interventions: say which the user sees"]),
        (table(lines=f"requests_per_minute = {'9' * 5000}"), [r"is not valid TOML\."]),
        (
            table(lines="interventions = ['Team A']"),
            [r"tenants\.team-a\.interventions\.0: write a shell pattern of names"],
        ),
        (
            table(hashed=KEY),
            [r"tenants\.team-a\.keys\.0: write sha256: and 64 .*`reft key new` prints"],
        ),
        (
            table(hashed=HASH.removeprefix("sha256:")),
            [r"tenants\.team-a\.keys\.0: write sha256: and 64"],
        ),
        (
            f'[tenants.a]\nkeys = "{HASH}"\n{SEEN}',
            [r"tenants\.a\.keys: input should be a valid list\."],
        ),
        (
            table(
                lines=f"{SEEN}\nrequests_per_minute = 0\nconcurrent_requests = 1.5\nlimits.n = 0"
            ),
            [
                r"tenants\.team-a\.requests_per_minute: input should be greater than or equal to 1",
                r"tenants\.team-a\.concurrent_requests: input should be a valid integer\.",
                r"tenants\.team-a\.limits\.n: input should be greater than or equal to 1\.",
            ],
        ),
        (
            table(lines=f'{SEEN}\nwheight = 2\n"{KEY}" = 1'),
            [
                r"tenants\.team-a\.wheight: is no setting; leave it out",
                r"tenants\.team-a\.\(a name that is none\): is no setting",
            ],
        ),
        (table(name='"Team.A"'), [r"tenants: the name of tenant 1 is not allowed: give 1 to 32"]),
        (
            table() + table(name=f'"{HASH}"', hashed="x"),
            [
                r"tenants: the name of tenant 2 is not allowed: give 1 to 32",
                r"tenants\.\(tenant 2\)\.keys\.0: write sha256:",
            ],
        ),
        (
            table() + table(name="b"),
            [r"tenants\.b\.keys\.0: is a key of `team-a`, too; give each tenant a key of its own"],
        ),
    ],
)
def test_all_problems_are_told_at_once_and_no_key(
    file: Path, text: str, problems: list[str]
) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys_file(file)
    lines = caught.value.message.split("\n")
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert line.startswith(f"{file}: ")
        assert re.match(problem, line.removeprefix(f"{file}: ")), line
    assert_no_secret(caught.value.message)


def test_a_mark_of_utf_8_is_no_part_of_the_file(file: Path) -> None:
    file.write_text(table(), encoding="utf-8-sig")
    assert [tenant.name for tenant in read_keys_file(file).values()] == ["team-a"]


def test_a_file_that_cannot_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_keys_file(file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_keys_file(file.parent / "absent")
    file.write_text(f'[tenants.a]\nkeys = ["{HASH}", "{OTHER_HASH}"]\n{SEEN}')
    monkeypatch.setattr("server.tenants.keys_file.MAX_KEYS", 2)
    assert len(read_keys_file(file)) == 2
    monkeypatch.setattr("server.tenants.keys_file.MAX_KEYS", 1)
    with pytest.raises(ConfigError, match="there are 2 keys, and may be 1"):
        read_keys_file(file)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match="is not a regular file"):
            read_keys_file(place)


def test_the_owner_and_the_tenants_have_keys_of_their_own(file: Path) -> None:
    known = Keys(OTHER, file)
    assert known.tenant_of(OTHER.encode()) is OWNER
    tenant = known.tenant_of(KEY.encode())
    assert tenant is not None
    assert tenant.name == "team-a"
    assert known.tenant_of(HASH.encode()) is None  # who reads the file has no key by it
    with pytest.raises(ConfigError, match="the key of --api-key is a key of `team-a`, too") as told:
        Keys(KEY, file)
    assert_no_secret(told.value.message)


def test_a_key_is_compared_with_all_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(table() + table("b", OTHER_HASH))
    known = Keys("owner", file)
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def note(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", note)
    for key in (KEY, "owner", "wrong"):
        known.tenant_of(key.encode())
    assert len(compared) == 9


# How it is followed


class TestFollowed:
    @pytest.fixture
    def settings(self, file: Path) -> Settings:
        return Settings(keys=file, api_key=SecretStr("sesame-42"))

    async def test_a_change_is_taken_at_the_second_look(
        self, client: httpx.AsyncClient, app: FastAPI, file: Path
    ) -> None:
        known = app.state.context.keys
        statuses = []
        file.write_text(table("team-b", OTHER_HASH))
        for _ in range(2):
            known.refresh()
            answers = [await client.get("/version", headers=bearer(key)) for key in (KEY, OTHER)]
            statuses.append([answer.status_code for answer in answers])
        assert statuses == [[200, 401], [401, 200]]
        assert (await client.get("/version", headers=bearer("sesame-42"))).status_code == 200

    @pytest.mark.parametrize("mended", [False, True])
    async def test_a_change_that_the_time_of_writing_does_not_show(
        self,
        client: httpx.AsyncClient,
        app: FastAPI,
        file: Path,
        monkeypatch: pytest.MonkeyPatch,
        mended: bool,
    ) -> None:
        known = app.state.context.keys
        written = os.stat(file)
        file.write_text(table(hashed=OTHER_HASH))
        if mended:  # by another mode, once it was found that the file cannot be read
            unreadable = ConfigError("keys.toml: cannot be read: Permission denied.")
            with monkeypatch.context() as denied:
                denied.setattr(keys, "read_keys_file", Mock(side_effect=unreadable))
                for _ in range(2):
                    known.refresh()
            assert known.problem is not None
            file.chmod(0o600)
        else:
            os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
        for _ in range(2):
            known.refresh()
        assert known.problem is None
        assert (await client.get("/version", headers=bearer(OTHER))).status_code == 200
        assert (await client.get("/version", headers=bearer(KEY))).status_code == 401

    async def test_a_file_that_is_being_written_is_not_taken(
        self, client: httpx.AsyncClient, app: FastAPI, file: Path
    ) -> None:
        known = app.state.context.keys
        for number in range(4):
            file.write_text(table("team-b", OTHER_HASH) + "#" * number)
            known.refresh()
        assert (await client.get("/version", headers=bearer(KEY))).status_code == 200

    @pytest.mark.parametrize("text", ["tenants = ", table(hashed=OTHER), "", None])
    async def test_a_broken_file_keeps_the_old_keys(
        self,
        client: httpx.AsyncClient,
        app: FastAPI,
        file: Path,
        caplog: pytest.LogCaptureFixture,
        text: str | None,
    ) -> None:
        caplog.set_level(logging.DEBUG)
        known = app.state.context.keys
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        for _ in range(4):
            known.refresh()
        assert (await client.get("/version", headers=bearer(KEY))).status_code == 200
        assert (await client.get("/version", headers=bearer(OTHER))).status_code == 401
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json() == {
            "status": "ok",
            "problems": ["The keys file cannot be used as it is now; the keys from before count."],
        }
        told = [line for line in caplog.messages if "The keys file is not usable" in line]
        assert len(told) == 1
        assert_no_secret(caplog.text + ready.text)
        file.write_text(table("team-b", OTHER_HASH))
        for _ in range(2):
            known.refresh()
        assert (await client.get("/version", headers=bearer(OTHER))).status_code == 200
        assert (await client.get("/readyz")).json() == {"status": "ok"}

    @pytest.fixture
    def looking(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keys, "LOOK_SECONDS", 0.01)

    async def test_the_server_follows_by_itself_and_ends_no_request(
        self, looking: None, client: httpx.AsyncClient, engine: FakeEngine, file: Path
    ) -> None:
        engine.step_seconds = 0.02
        body = completion(max_tokens=20)
        running = asyncio.ensure_future(
            client.post("/v1/completions", json=body, headers=bearer(KEY))
        )
        while not engine.running:
            await asyncio.sleep(0.01)
        file.write_text(table("team-b", OTHER_HASH))
        while (await client.get("/version", headers=bearer(KEY))).status_code == 200:
            await asyncio.sleep(0.01)
        assert not running.done()
        answer = await running
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 20

    async def test_no_key_and_no_hash_is_told(
        self,
        client: httpx.AsyncClient,
        caplog: pytest.LogCaptureFixture,
        app: FastAPI,
        settings: Settings,
    ) -> None:
        caplog.set_level(logging.DEBUG)
        told = repr(settings) + repr(app.state.context.keys)
        for key in (KEY, f"{KEY}x", "sesame-42", HASH):
            for method, path, content in (
                ("GET", "/readyz", b""),
                ("GET", "/v1/models", b""),
                ("GET", "/metrics", b""),
                ("POST", "/v1/completions", b"{"),
                ("PUT", "/v1/interventions/a", b"x"),
                ("DELETE", "/v1/interventions/emoji", b""),
            ):
                answer = await client.request(method, path, content=content, headers=bearer(key))
                told += answer.text + repr(answer.headers)
        assert_no_secret(told + caplog.text)


def assert_no_secret(text: str) -> None:
    for secret in (KEY, OTHER, HASH, OTHER_HASH, "sesame-42"):
        assert secret not in text
        assert secret.removeprefix("sha256:")[:16] not in text


@pytest.mark.parametrize("key", ["sesame\n", " sesame", "ses\tame", "\udcff", " "])
def test_an_owners_key_that_no_client_can_send(key: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--api-key \(or REFT_API_KEY\): it has a space"
    ) as caught:
        load_settings({"api_key": key})
    assert "ses" not in caught.value.message


class TestAKeyBeyondAscii:
    """Its last byte is a space in Latin-1, the encoding in which headers are handed on."""

    @pytest.fixture
    def settings(self) -> Settings:
        return load_settings({"api_key": "sésame à"})

    async def test_it_is_taken(self, client: httpx.AsyncClient) -> None:
        for value in ("Bearer sésame à", "Bearer  sésame à \t"):
            headers = {b"authorization": value.encode()}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200


# The command line


@pytest.mark.parametrize("upload", [False, True])
def test_a_new_key_works_as_it_is_printed(tmp_path: Path, upload: bool) -> None:
    options = ["--tenant", "team-a", *(["--upload"] if upload else [])]
    done = CliRunner().invoke(command, ["key", "new", *options])
    assert done.exit_code == 0
    first, _, _, *lines = done.output.splitlines()
    file = tmp_path / "keys.toml"
    file.write_text("\n".join(lines))
    tenant = Keys(None, file).tenant_of(first.rpartition(" ")[2].encode())
    assert tenant == Tenant("team-a", patterns=("team-a.*",), upload=upload)
    assert f"\nupload = {str(upload).lower()}  # " in done.output
    checked = CliRunner().invoke(command, ["key", "check", str(file)])
    assert checked.output == f"{file}: 1 key of team-a\n"


def test_a_new_key_of_an_admin_is_for_every_route(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["key", "new", "--tenant", "ops", "--admin"])
    first, _, _, *lines = done.output.splitlines()
    file = tmp_path / "keys.toml"
    file.write_text("\n".join(lines))
    tenant = Keys(None, file).tenant_of(first.rpartition(" ")[2].encode())
    assert tenant == Tenant("ops", "admin")
    assert tenant.sees_server


def test_an_admin_is_not_told_that_it_may_upload() -> None:
    done = CliRunner().invoke(command, ["key", "new", "--upload", "--admin"])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.message.startswith("--upload: leave it out")


@pytest.mark.parametrize("name", ["Team-A", "team.a", "a]", "", "a" * 33])
def test_no_key_is_made_for_a_name_that_the_file_may_not_have(name: str) -> None:
    done = CliRunner().invoke(command, ["key", "new", "--tenant", name])
    assert isinstance(done.exception, ConfigError)
    assert "--tenant: give 1 to 32 of a-z" in done.exception.message
    assert "reft-" not in done.output


def test_a_broken_file_stops_the_start_before_the_model(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(table(hashed=KEY))
    monkeypatch.setattr("server.cli.main.start_engine", lambda settings: pytest.fail("loaded"))
    monkeypatch.setattr("server.logs.configure_logging", lambda settings: None)
    done = CliRunner().invoke(command, ["serve", "--keys", str(file), "--port", "0"])
    assert isinstance(done.exception, ConfigError)
    assert "keys.0: write sha256:" in done.exception.message


def test_a_server_without_keys_is_not_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.cli.main.start_engine", lambda settings: pytest.fail("loaded"))
    monkeypatch.setattr("server.logs.configure_logging", lambda settings: None)
    done = CliRunner().invoke(command, ["serve", "--host", "0.0.0.0", "--port", "0"])
    assert isinstance(done.exception, ConfigError)
    assert "--host: without keys whoever reaches 0.0.0.0 can use" in done.exception.message


def test_a_host_that_is_no_name_is_told() -> None:
    with pytest.raises(ConfigError, match=r"Cannot listen on a{64} port 0: it is no host's name"):
        listen("a" * 64, 0)


@pytest.mark.parametrize(
    ("host", "options", "refused"),
    [
        ("0.0.0.0", {}, True),
        ("0.0.0.0", {"insecure": True}, False),
        ("0.0.0.0", {"api_key": "sesame"}, False),
        ("0.0.0.0", {"keys": "keys.toml"}, False),
        ("127.0.0.1", {}, False),
        ("localhost", {}, False),
    ],
)
def test_exposure(host: str, options: dict[str, Any], refused: bool) -> None:
    settings = load_settings({"host": host, **options})
    with socket.create_server((host, 0)) as listener:
        if refused:
            with pytest.raises(ConfigError, match="--insecure"):
                check_exposure(listener, settings)
        else:
            check_exposure(listener, settings)

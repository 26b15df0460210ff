"""Text that is none, or that the output's encoding does not have, and outputs without room."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from reft_runtime.client import Server
from reft_runtime.errors import ConfigError, InvalidRequest, ReftError
from reft_runtime.interventions import Registry
from server.settings import Settings
from tests.e2e.conftest import served
from tests.http.fake_engine import FakeEngine
from tests.interventions.make import BASE, file_bytes


@pytest.fixture
def engine() -> Any:
    engine: Any = FakeEngine()
    engine.registry = Registry(BASE)
    engine.registry.put("one", file_bytes(description="Ein \U0001f34e"))
    return engine


@pytest.fixture
def url(engine: Any) -> Iterator[str]:
    with served(engine, Settings()) as address:
        yield address


def reft(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONUTF8": "0", **options.pop("env", {})}
    call = [sys.executable, "-m", "server.cli.main", *arguments]
    options = {"stdout": subprocess.PIPE, **options}
    return subprocess.run(call, check=False, stderr=subprocess.PIPE, env=environment, **options)


def test_characters_that_the_output_does_not_have_are_escaped(url: str) -> None:
    for command in ("ls", "show one"):
        ended = reft(*command.split(), "--url", url, env={"PYTHONIOENCODING": "latin-1"})
        assert (ended.returncode, ended.stderr) == (0, b"")
        assert rb"Ein \U0001f34e" in ended.stdout


@pytest.mark.parametrize("command", ["ls", "show one", "pull one --out -"])
def test_a_command_without_standard_output_says_nothing(url: str, command: str) -> None:
    ended = reft(*command.split(), "--url", url, preexec_fn=lambda: os.close(1), stdout=None)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_without_room_is_told_in_one_line(url: str) -> None:
    for command in ("ls", "ls --json", "show one", "key new"):
        asked = command.split() + ([] if command == "key new" else ["--url", url])
        with open("/dev/full", "wb") as full:
            ended = reft(*asked, stdout=full)
        assert ended.returncode == 2
        assert ended.stderr == (b"reft: the output cannot be written: No space left on device.\n")


def test_a_file_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # Where Typer looks for the shell, it may find none.
    env = {"HOME": str(tmp_path / "file"), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ended = reft("--install-completion", "bash", env=env)
    assert ended.returncode == 2
    assert re.fullmatch(rb"reft: .*/file.*: (File exists|Not a directory)\.\n", ended.stderr)


def test_a_question_that_is_no_text_is_refused_and_the_chat_goes_on(url: str) -> None:
    ended = reft("chat", "--max-tokens", "3", "--url", url, input=b"a \xff b\nsecond\n")
    assert ended.returncode == 0
    assert ended.stdout.split() == [b"abc"]
    assert b"reft: What was given is not UTF-8, and cannot be sent.\n" in ended.stderr
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [("compare",), ("classify", "--labels", "a,b")])
def test_an_argument_that_is_no_text_is_refused(url: str, command: tuple[str, ...]) -> None:
    ended = reft(*command, b"\xff", "--url", url)
    told = b"reft: What was given is not UTF-8, and cannot be sent.\n"
    assert (ended.returncode, ended.stderr) == (2, told)


def test_a_name_that_is_no_text_is_no_name(url: str) -> None:
    server = Server(url)
    for ask in (server.entry, server.check_model, server.remove, server.download):
        with pytest.raises(ReftError):
            ask("\udcff")
    with pytest.raises(InvalidRequest):
        list(server.listing("\udcff"))


@pytest.mark.parametrize("key", ["", " ", "key\n", "key ", "k\x00y", "k\udcff"])
def test_a_key_that_no_header_can_have_is_told_and_not_shown(url: str, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Server(url, key).me()
    assert refused.value.param == "api_key"
    assert "no answer" not in refused.value.message
    assert "key\n" not in refused.value.message


def test_a_key_may_have_any_letters(engine: Any) -> None:
    with served(engine, Settings(api_key=SecretStr("ключ"))) as url:
        assert Server(url, "ключ").me()["role"] == "admin"

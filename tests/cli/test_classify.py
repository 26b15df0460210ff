"""`reft classify`: at a server and in this process, of one text and of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reft_runtime.errors import ConfigError, ReftError
from server.cli.main import app
from server.settings import Settings
from tests.e2e.conftest import served
from tests.http.fake_engine import FakeEngine, FakeVersion
from tests.training.make import folder


@pytest.fixture
def engine() -> Any:
    engine = FakeEngine()
    engine.own.versions["task"] = FakeVersion("task", labels=("a", "b"))
    return engine


@pytest.fixture
def url(engine: Any) -> Iterator[str]:
    with served(engine, Settings()) as address:
        yield address


def reft(*arguments: object, url: str | None = None, given: str | None = None) -> Any:
    env = {} if url is None else {"REFT_URL": url}
    return CliRunner(env=env).invoke(app, ["classify", *map(str, arguments)], input=given)


def test_one_text(url: str) -> None:
    ended = reft("some text", "-i", "task", url=url)
    assert ended.exit_code == 0, ended.output
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert lines == [["LABEL", "PROBABILITY"], ["a", "0.667"], ["b", "0.333"]]
    ended = reft("some text", "--labels", "x, y z", "--json", url=url)
    said = json.loads(ended.stdout)
    assert said == {"text": "some text", "label": "x", "probs": {"x": 2 / 3, "y z": 1 / 3}}


def test_a_file_and_standard_input(url: str, engine: Any, tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(130)]
    file = tmp_path / "texts.txt"
    file.write_bytes("\r\n\r\n".join(texts).encode("utf-8-sig"))  # as Windows' editors write it
    ended = reft("--file", file, "-i", "task=0.5", "--template", r"Q: {x}\nA:", url=url)
    assert ended.stdout.splitlines() == [f"a\t0.667\t{text}" for text in texts]
    # They go in two requests at once, of which either may come first.
    asked = [bytes(stream.prompt).decode() for stream in engine.streams[1:]]
    assert sorted(asked) == sorted(f"Q: {text}\nA:" for text in texts)
    assert engine.streams[-1].interventions[0][1] == 0.5
    ended = reft("-f", "-", "--labels", "x,y", "--template", "chat", url=url, given="one\ntwo\n")
    assert ended.stdout == "x\t0.667\tone\nx\t0.667\ttwo\n"
    asked = [bytes(stream.prompt).decode() for stream in engine.streams[-2:]]
    assert sorted(asked) == ["<user>one", "<user>two"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a text, or texts with --file"),
        (["text", "--file", "-"], "give a text, or texts with --file"),
        (["text", "--template", "no field"], "template: write chat, or a text with one field"),
        (["text"], "labels: the base model has none of its own"),
        (["text", "--labels", "one"], "give 2 to 1000 labels"),
        (["text", "-i", "nowhere"], "does not exist"),
    ],
)
def test_what_is_refused(url: str, arguments: list[str], said: str) -> None:
    ended = reft(*arguments, url=url)
    assert isinstance(ended.exception, ReftError)
    assert said in ended.exception.message


def test_a_file_that_is_not_text(url: str, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(b"\xff\xfe")
    ended = reft("--file", file, "--labels", "a,b", url=url)
    assert isinstance(ended.exception, ConfigError)
    assert "not UTF-8" in ended.exception.message


def test_a_model_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = folder(tmp_path / "model")
    ended = reft("is it", "--labels", "the,and,you is", "--json", "--model", place)
    assert ended.exit_code == 0, ended.output
    said = json.loads(ended.stdout)
    assert said["label"] == max(said["probs"], key=lambda label: said["probs"][label])
    assert sum(said["probs"].values()) == pytest.approx(1)

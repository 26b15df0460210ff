"""The commands on rows, and the mistakes that they tell before any work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reft_runtime.errors import ConfigError, ReftError
from reft_runtime.interventions import parse, read
from reft_runtime.training import train
from server.cli.main import app
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import ROWS, folder, model


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    error = run(*arguments).exception
    assert isinstance(error, ReftError), error
    return error.message


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.csv"
    lines = [f"{row['prompt']},{row['label']}" for row in ROWS]
    path.write_text("\n".join(["ticket,category", *lines]))
    return path


def test_check(tickets: Path) -> None:
    done = run("check", tickets)
    assert done.exit_code == 0
    assert done.stdout.startswith("tickets: 24 rows, 2 labels: the 12, and 12\n  text from the col")
    tickets.write_text(tickets.read_text() + "\nx,\ny\n")
    done = run("check", tickets, "--eval", tickets)
    assert done.exit_code == 1
    assert done.stdout.count("tickets.csv, line 27: has 1 cells") == 2
    assert "eval: 25 rows are among the training's too" in done.stdout
    # Shells pass a backslash and an n where a new line is wanted.
    assert r"not 'a\nb'" in refused("check", tickets, "--template", r"a\nb")
    assert "--max-length needs --model" in refused("check", tickets, "--max-length", 3)


def test_a_table_is_trained_without_options(
    tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = folder(tmp_path / "model")
    common = ("--model", base, "--steps", 1, "--dtype", "float32")
    done = run("train", tickets, *common, "--plot", "-")
    assert done.exception is None
    assert done.stdout_bytes.startswith(b"\x89PNG")
    assert "tickets.safetensors: " in done.stderr
    assert "tickets: 24 rows, 2 labels: the 12, and 12" in done.stderr
    assert " tokens, 1,040 trained parameters, 1 step\n" in done.stderr
    manifest = parse(read(tmp_path / "tickets.safetensors")).manifest
    assert manifest.training["rows"] == 24
    assert "is there already" in refused("train", tickets, *common)
    assert run("train", tickets, *common, "--force").exception is None


def test_mistakes_are_told_before_the_model_is_loaded(
    tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(sys.modules["reft_runtime.training.train"], "load_base", load)
    monkeypatch.setattr(sys.modules["reft_runtime.training.states"], "load_base", load)
    monkeypatch.setattr(sys.modules["reft_runtime.training.evaluate"], "Engine", load)
    base = folder(tmp_path / "model")
    common = ("train", tickets, "--model", base)
    monkeypatch.chdir(tmp_path)
    assert "no name for an intervention" in refused(*common, "--out", "My File.safetensors")
    (tmp_path / "taken.safetensors").mkdir()
    assert "is a folder; name a file" in refused(*common, "--out", "taken.safetensors")
    assert "must end with .safetensors" in refused(*common, "--out", "x.bin")
    (tmp_path / "trained.safetensors").touch()
    kept = "out: trained.safetensors is there already; --force replaces it."
    assert refused(*common, "--out", "trained.safetensors") == kept
    assert "there is no column 'no'" in refused(*common, "--text", "no")
    assert "longer than 3 tokens" in refused(*common, "--max-length", 3)
    assert "there is no folder" in refused(*common[:2], "--model", tmp_path / "missing")
    assert "nothing to resume" in refused(*common, "--resume")
    assert "push: no answer" in refused(*common, "--push", "http://127.0.0.1:9")
    tickets.write_text("ticket,category\na,\nb\n")
    assert "1 row is wrong" in refused(*common)
    assert "1 row is without an answer" in refused(*common)
    (tmp_path / "broken.safetensors").write_bytes(b"no file")
    tickets.write_text("ticket,category\na,b\n")
    said = refused("eval", tickets, "--intervention", "./broken.safetensors", "--model", base)
    assert "intervention: broken.safetensors: " in said
    (tmp_path / "t").write_text("the end\n")
    steer = ("direction", tmp_path / "t", tmp_path / "t", "--layer", 1, "--model", base)
    assert "is a folder" in refused(*steer, "--out", "taken.safetensors")
    assert refused(*steer, "--out", "trained.safetensors") == kept
    assert "out: name the file" in refused(*steer)
    texts = ("direction", tmp_path / "t", tmp_path / "t", "--model", base)
    assert "layer: say which layer is steered; --layers all" in refused(*texts, "--out", "x")
    assert "out: --layers writes no file" in refused(*texts, "--layers", "all", "--out", "x")
    assert "layers: 4; model has 0 to 3" in refused(*texts, "--layers", "1,4")
    assert "layers: write all, or numbers" in refused(*texts, "--layers", "last")


def test_a_folder_that_is_not_writable(
    tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("reft_runtime.machine.places.tempfile.TemporaryFile", closed)
    said = refused("train", tickets, "--out", tmp_path / "closed" / "x.safetensors")
    assert f"{tmp_path / 'closed'} cannot be written to: Permission denied" in said


def test_what_the_format_refuses_is_told_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: object, **__: object) -> None:
        raise AssertionError("the training began")

    monkeypatch.setattr(sys.modules["reft_runtime.training.run"], "EditTrainer", begin)
    with pytest.raises(ReftError, match="description"):
        train(
            ROWS,
            tmp_path / "x.safetensors",
            model=model(),
            tokenizer=tiny_tokenizer(),
            description="x" * 5000,
        )
    with pytest.raises(ConfigError, match="write prepend, drop or refuse"):
        train(ROWS, tmp_path / "x.safetensors", model=model(), system="x")  # type: ignore[arg-type]

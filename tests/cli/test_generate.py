"""`reft generate`: what its interventions mean, and what it prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reft_runtime.errors import InvalidFile, InvalidRequest, NotFound, WrongBaseModel
from reft_runtime.interventions import Edit, Intervention, write
from reft_runtime.use import Use
from server.cli.applied import read_asked
from server.cli.main import app
from tests.interventions.make import intervention, loreft_tensors
from tests.training.make import SHAPE, folder

HIDDEN = SHAPE.hidden_size


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def served(tmp_path: Path) -> Path:
    path = tmp_path / "served"
    path.mkdir()
    edits = [Edit(layer, "f1+l2", loreft_tensors(layer, HIDDEN)) for layer in (1, 3)]
    write(path / "two.safetensors", Intervention.build(SHAPE, edits, template="a {prompt}"))
    foreign = SHAPE.model_copy(update={"vocab_size": 7})
    write(path / "foreign.safetensors", intervention(base=foreign))
    return path


@pytest.mark.parametrize(
    ("text", "name", "strength"),
    [
        ("pirate", "pirate", 1),
        ("pirate=0.5", "pirate", 0.5),
        ("pirate@0123abcd=-2", "pirate@0123abcd", -2),
        ("./a=b/x.safetensors", "./a=b/x.safetensors", 1),
        ("./x=1.safetensors=3", "./x=1.safetensors", 3),
    ],
)
def test_a_use_as_an_option_says_it(text: str, name: str, strength: float) -> None:
    assert Use.parse(text) == Use(name, strength)


@pytest.mark.parametrize("text", ["pirate=", "pirate=much", "pirate=nan", "pirate=inf"])
def test_a_strength_that_is_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"intervention: '{text}': .* such as pirate=0.5"):
        Use.parse(text)


def test_files_are_checked_before_the_model(model: Path, served: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_text("Hello")
    for given, error, message in (
        (broken, InvalidFile, "but a text file"),
        (f"{broken}=2", InvalidFile, "but a text file"),
        (served / "foreign.safetensors", WrongBaseModel, "vocab_size 7"),
        (served / "twoo.safetensors", NotFound, f"Did you mean {served}/two.safetensors?"),
    ):
        with pytest.raises(error) as caught:
            read_asked([str(given)], str(model))
        path = str(given).removesuffix("=2")
        assert caught.value.message.startswith(f"{path}: ")
        assert message in caught.value.message


def generate(model: Path, served: Path, *options: str) -> Any:
    command = ["generate", "the", "--model", str(model), "--interventions", str(served)]
    return CliRunner().invoke(app, [*command, "--max-tokens", "3", *options])


def traced(ended: Any) -> str:
    """What standard error has behind the stages of the start."""
    return "INTERVENTION" + str(ended.stderr).partition("INTERVENTION")[2]


def test_names_and_files_compose_and_are_traced(model: Path, served: Path, tmp_path: Path) -> None:
    file = tmp_path / "Mine.safetensors"
    renamed = SHAPE.model_copy(update={"model": "renamed"})
    write(file, intervention(1, base=renamed))
    base = generate(model, served)
    assert base.exit_code == 0
    assert "Loading the weights: " in base.stderr
    assert base.stdout.count("\n") == 1
    ended = generate(model, served, "-i", "two=0.5", "-i", str(file), "--trace")
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.count("\n") == 1
    head, *rows = traced(ended).split("\n\n")[0].splitlines()
    assert head.split()[:4] == ["INTERVENTION", "LAYER", "COMPONENT", "ROWS"]
    assert [row.split()[:4] for row in rows] == [
        ["two=0.5", "1", "block_output", "2"],
        ["two=0.5", "3", "block_output", "2"],
        ["Mine", "1", "block_output", "1"],
    ]
    number = re.search(r"first token +([\d.]+) nats", ended.stderr)
    assert number is not None
    assert float(number[1]) > 0
    other = generate(model, served, "-i", str(file), "-i", "two=0.5", "--trace")
    assert [row.split()[0] for row in traced(other).splitlines()[1:4]] == [
        "Mine",
        "two=0.5",
        "two=0.5",
    ]
    nothing = generate(model, served, "-i", "two=0", "--trace")
    assert "\nNo row was edited." in nothing.stderr
    assert "first token    0.000 nats" in nothing.stderr
    assert "answer         0.000 nats a token" in nothing.stderr


def test_names_that_are_not_served(
    model: Path, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, message in (
        ("twoo", "--intervention: there is no 'twoo'. Did you mean `two`?"),
        ("nothing", "--intervention: there is no 'nothing'. There are: two."),
        ("foreign", "foreign.safetensors is not served: The file was made for"),
    ):
        ended = generate(model, served, "-i", given)
        assert isinstance(ended.exception, NotFound)
        assert message in ended.exception.message
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.safetensors").touch()
    said = str(generate(model, served, "-i", "here").exception)
    assert said.endswith("there is no 'here'. For the file in this folder give ./here.safetensors.")


def test_templates_that_differ(model: Path, served: Path) -> None:
    edit = Edit(1, "l1", loreft_tensors(5, HIDDEN))
    other = Intervention.build(SHAPE, [edit], template="b {prompt}")
    write(served / "other.safetensors", other)
    ended = generate(model, served, "-i", "two", "-i", "other")
    assert isinstance(ended.exception, InvalidRequest)
    assert "--raw" in ended.exception.message
    assert generate(model, served, "-i", "two", "-i", "other", "--raw").exit_code == 0


def test_an_answer_that_nobody_reads_ends(
    model: Path,
    served: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(text: str, *, nl: bool = True, err: bool = False) -> None:
        if not err:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("typer.echo", full)
    ended = generate(model, served, "--max-tokens", "200")
    assert isinstance(ended.exception, OSError)
    assert "Events could not be delivered" not in caplog.text

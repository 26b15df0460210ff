"""Scores in process and through HTTP, and the commands."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from typer.testing import CliRunner

from reft_runtime import Engine
from reft_runtime.client import Answer, Server
from reft_runtime.errors import ConfigError, NotFound, ReftError, WrongBaseModel
from reft_runtime.interventions import Edit, Intervention, parse, read, read_header, serialise
from reft_runtime.outputs import Choice, Generation
from reft_runtime.training import TrainSettings, direction, evaluate, train
from reft_runtime.training.scoring import is_right, plain
from reft_runtime.training.tasks import read_tasks
from server.cli.main import app
from server.settings import Settings
from tests.e2e.conftest import served
from tests.helpers.models import HIDDEN
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import ROWS, SHAPE, examples, folder, in_process, jsonl, model, own
from tools.tiny_models import tiny_config, tiny_model

CHATS = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": "the end"},
        ]
    }
    for row in ROWS[:5]
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, data, and two interventions: for raw prompts, and for chats."""
    path = tmp_path_factory.mktemp("evaluate")
    folder(path / "model")
    jsonl(path / "goodbad.jsonl", ROWS)
    jsonl(path / "chats.jsonl", CHATS)
    settings = TrainSettings(steps=60, batch_size=8, lr=5e-2, dtype="float32")
    kept = path / "interventions"
    for name, rows in (("task", ROWS), ("talk", CHATS)):
        train(
            rows,
            kept / f"{name}.safetensors",
            model=path / "model",
            settings=settings,
            progress=False,
        )
    return path


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    with Engine(
        own(model()), tokenizer=tiny_tokenizer(), interventions=place / "interventions"
    ) as engine:
        with served(engine, Settings()) as url:
            yield url
        engine.check_integrity()


def test_many_by_many(place: Path) -> None:
    data = [place / "goodbad.jsonl", place / "chats.jsonl"]
    # So small a model learns its labels, but not to end behind them.
    report = evaluate(data, ["ta*"], prefixes=True, **in_process(place))
    assert [(s.intervention, s.data, s.metric) for s in report.scores] == [
        ("base", "goodbad", "accuracy"),
        ("talk", "goodbad", "accuracy"),
        ("task", "goodbad", "accuracy"),
        ("base", "chats", "perplexity"),
        ("talk", "chats", "perplexity"),
        ("task", "chats", "perplexity"),
    ]
    assert report.value("task", "goodbad") == 1
    assert report.value("base", "goodbad") < 0.5
    assert report.value("talk", "chats") < report.value("base", "chats") / 2
    frame = report.frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.shape == (6, 5)
    head, *lines = report.table().splitlines()
    assert head.split() == ["goodbad", "(accuracy,", "n=24)", "chats", "(perplexity,", "n=5)"]
    assert [line.split()[0] for line in lines] == ["base", "talk", "task"]
    assert json.loads(json.dumps(report.as_json()))[2]["right"] == [True] * 24


def test_the_server_gives_the_same_to_the_example(place: Path, address: str) -> None:
    mine = evaluate([place / "goodbad.jsonl"], ["t*"], **in_process(place))
    theirs = evaluate([place / "goodbad.jsonl"], ["t*"], url=address, progress=False)
    assert theirs == mine
    exact: dict[str, Any] = {"metric": "exact"}
    chats = evaluate([place / "chats.jsonl"], ["talk"], url=address, progress=False, **exact)
    assert chats == evaluate([place / "chats.jsonl"], ["talk"], **in_process(place), **exact)


LATE = [
    {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": "\n\n\nsting"},
        ],
        "label": "sting",
    }
    for row in ROWS[:5]
]
"""Answers that begin with more than a blank, and whose label has more tokens."""


@pytest.mark.parametrize("metric", ["accuracy", "exact"])
@pytest.mark.parametrize("served", [False, True])
def test_answers_are_as_long_as_they_are_written(
    place: Path, address: str, monkeypatch: pytest.MonkeyPatch, metric: Any, served: bool
) -> None:
    """A model that answers what the rows want gets all points, whatever tokens it needs."""
    tokenizer = tiny_tokenizer()
    wanted = tokenizer.encode("\n\n\nsting", add_special_tokens=False)
    allowed: list[int] = []

    def cut(max_tokens: int) -> str:
        allowed.append(max_tokens)
        text = str(tokenizer.decode(wanted[:max_tokens]))
        return text if max_tokens > len(wanted) else text + "?"  # it has to end, too

    def generate(self: Engine, prompts: Any, sampling: Any, **_: Any) -> Any:
        choices = [Choice(0, cut(one.max_tokens), finish_reason="stop") for one in sampling]
        return [Generation([], [choice]) for choice in choices]

    def answers(self: Server, questions: Any, **_: Any) -> list[Answer]:
        return [Answer(cut(question.max_tokens), True) for question in questions]

    monkeypatch.setattr(Engine, "generate", generate)
    monkeypatch.setattr(Server, "answers", answers)
    where = {"url": address, "progress": False} if served else in_process(place)
    report = evaluate([LATE], ["talk"], metric=metric, **where)
    assert report.value("talk", "rows") == 1
    assert max(allowed) < len(wanted) + 8


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        ("1", "1", True), (" 1\n2", "1", True), ("1.", "1", True), ("1, or 2", "1", True),
        ("10", "1", False), ("1.5", "1", False), ("1,000", "1", False), ("1st", "1", False),
        ("1:30", "1", False), ("yes.", "yes", True), ("yes", "yes", True), ("yes!", "yes", True),
        ("yesterday", "yes", False), ("don't", "don", False), ("don\u2019t", "don", False),
        ("yes_no", "yes", False), ("cafe\u0301", "cafe", False), ("C++", "C++", True),
        ("New York", "New", False), ("New", "New", True), ("New York", "New York", True),
        ("(a) x", "(a)", True), ("nothing", "no", False), ("", "no", False),
        ("no", "nothing", False),
    ],
)  # fmt: skip
def test_a_label_is_a_whole_word(answer: str, label: str, right: bool) -> None:
    labels = {"New York", label}
    assert is_right(answer, label, "accuracy", labels) is right
    assert is_right(answer, label, "accuracy") is plain(answer).startswith(label)  # prefixes


def test_labels_that_say_nothing_or_stand_inside_a_word(place: Path) -> None:
    for label in ("", " \n"):
        with pytest.raises(ConfigError, match="row 2: label is empty"):
            evaluate([[ROWS[0], {**ROWS[1], "label": label}]], **in_process(place))
    inside = [{"prompt": "x", "completion": " 10", "label": "1"}]
    with pytest.raises(ConfigError, match="row 1: the label '1' is not what the completion '10'"):
        evaluate([inside], **in_process(place))
    assert evaluate([inside], prefixes=True, **in_process(place)).value("base", "rows") == 0


def test_without_the_base(place: Path, address: str) -> None:
    data = [place / "goodbad.jsonl"]
    every = evaluate(data, ["t*"], **in_process(place))
    edited = tuple(score for score in every.scores if score.intervention != "base")
    assert len(edited) == len(every.scores) - 1
    assert evaluate(data, ["t*"], base=False, **in_process(place)).scores == edited
    assert evaluate(data, ["t*"], base=False, url=address, progress=False).scores == edited


def test_perplexity_of_the_base_is_the_models(place: Path) -> None:
    report = evaluate([place / "goodbad.jsonl"], metric="perplexity", **in_process(place))
    plain = model()
    total, count = 0.0, 0
    for example in examples():
        ids = torch.tensor([example.tokens])
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[0, example.prompt_length - 1 : -1]
        total += float(
            torch.nn.functional.cross_entropy(
                logits, torch.tensor(example.completion), reduction="sum"
            )
        )
        count += len(example.completion)
    assert report.scores[0].value == pytest.approx(math.exp(total / count), rel=1e-4)


def test_push(place: Path, address: str, tmp_path: Path) -> None:
    file = place / "interventions" / "task.safetensors"
    server = Server(address)
    assert server.upload("pushed", file.read_bytes())[1] == "added"
    assert server.upload("pushed", file.read_bytes())[1] == "unchanged"
    assert "pushed" in server.names()
    with pytest.raises(ConfigError, match="the server answered 400"):
        server.upload("broken", (place / "goodbad.jsonl").read_bytes())


@pytest.mark.parametrize(
    ("interventions", "changes", "error", "message"),
    [
        (["nothing"], {}, NotFound, "there is no nothing in "),
        (["x/*.safetensors"], {}, NotFound, "there is no x/"),
        (["task"], {"folder": None}, NotFound, "there is no task[.]"),
        (["task"], {"folder": "gone"}, NotFound, "no task in gone. No folder gone exists."),
        ([], {"metric": "bleu"}, ConfigError, "metric: one of accuracy, exact, perplexity"),
        ([], {"url": "http://127.0.0.1:9"}, ConfigError, "url: no answer from http://127.0.0.1:9"),
        ([], {"url": "http://x", "metric": "perplexity"}, ConfigError, "cannot be asked of a"),
    ],
)
def test_mistakes(
    place: Path,
    interventions: list[str],
    changes: dict[str, Any],
    error: type[ReftError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        evaluate([place / "goodbad.jsonl"], interventions, **{**in_process(place), **changes})


def test_mistakes_in_names_and_labels(place: Path, address: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"the server has no 'x\*'; it has .*task"):
        evaluate([ROWS], ["x*"], url=address)
    with pytest.raises(ConfigError, match="row 1: there is no field 'label'"):
        evaluate([CHATS], metric="accuracy", **in_process(place))
    with pytest.raises(ConfigError, match="two data sets are called rows; ask one at a time"):
        evaluate([ROWS, ROWS], **in_process(place))
    file = tmp_path / "task.safetensors"
    file.write_bytes(read(place / "interventions" / "task.safetensors"))
    with pytest.raises(ConfigError, match="have one name"):
        evaluate([ROWS], ["task", str(file)], **in_process(place))


def test_files_that_are_called_by_one_folder_go_by_their_paths(tmp_path: Path) -> None:
    files = [jsonl(tmp_path / f"{name}.jsonl", ROWS) for name in ("dev", "test", "other")]

    def names(data: Sequence[Any]) -> list[str]:
        tasks = read_tasks(data, None, template=None, prefixes=False, text=None, label=None)
        return [task.rows.name for task in tasks]

    assert names(files[:1]) == [tmp_path.name]
    assert names(files) == [str(files[0]), str(files[1]), "other"]
    with pytest.raises(ConfigError, match=r"are called .*dev\.jsonl; ask one at a time"):
        names([files[0], files[0]])


@pytest.mark.filterwarnings("ignore")
def test_places_that_a_base_lacks(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "mixer.safetensors"
    edit = Edit(1, "all", {"v": torch.ones(HIDDEN)}, "steering", "mixer_output")
    file.write_bytes(serialise(Intervention.build(SHAPE, [edit])))
    with pytest.raises(WrongBaseModel, match="no mixer_output of layer 1"):
        evaluate([ROWS], [str(file)], metric="perplexity", **in_process(place))
    # Layers of Gemma 3n give several rows for a token.
    given: dict[str, Any] = {"model": tiny_model(tiny_config("gemma3n_text"))}
    given |= {"tokenizer": tiny_tokenizer(), "progress": False}
    settings = TrainSettings(steps=1, layers=(1,), rank=2)
    with pytest.raises(WrongBaseModel, match="no block_output of layer 1"):
        train(ROWS, tmp_path / "task.safetensors", settings=settings, **given)
    with pytest.raises(WrongBaseModel, match="no block_output of layer 1"):
        direction(["and the end"], ["you"], layer=1, **given)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_the_commands(place: Path, address: str, tmp_path: Path) -> None:
    rows = [{"text": row["prompt"], **row} for row in ROWS]
    data, out = jsonl(tmp_path / "data.jsonl", rows), tmp_path / "mine.safetensors"
    common = ("--model", place / "model", "--dtype", "float32")
    said = run(
        "train", data, "--out", out, "--eval", data, *common, "--layers", "1,2", "--rank", "2",
        "--steps", "3", "--template", "Is it {text}\\n?", "--push", address,
    )  # fmt: skip
    assert f"{out}: {out.stat().st_size:,} bytes, trained in" in said
    assert "accuracy" in said
    assert f"{address}: mine added" in said
    manifest = read_header(out).manifest
    assert manifest.template == "Is it {prompt}\n?"
    assert [edit.layer for edit in manifest.edits] == [1, 2]
    asked = ("--template", "Is it {text}\\n?", "--json", "--prefixes")
    mine = run("eval", data, "--intervention", out, *common, *asked)
    assert json.loads(mine) == json.loads(
        run("eval", data, "--intervention", "mine", "--url", address, *asked)
    )
    assert "data (accuracy, n=24)" in run("eval", data, *common, "--template", "{text}")
    for name in ("up", "down"):
        (tmp_path / name).write_text(f"the sting {name}\n\nand the {name}\n")
    steer = tmp_path / "steer.safetensors"
    run("direction", tmp_path / "up", tmp_path / "down", "--layer", 2, "--out", steer, *common,
        "--read", "l2", "--template", "Say\\n{prompt}")  # fmt: skip
    texts = ("direction", tmp_path / "up", tmp_path / "down", "--layers", "0,2", *common)
    found = json.loads(run(*texts, "--json"))
    assert [each["layer"] for each in found] == [0, 2]
    head, first, *_ = run(*texts).splitlines()
    assert head.split()[:4] == ["layer", "auroc", "accuracy", "norm"]
    assert first.split()[:2] == ["0", f"{found[0]['auroc']:.3f}"]
    manifest = parse(read(steer)).manifest
    assert manifest.edits[0].kind == "steering"
    assert manifest.template == "Say\n{prompt}"
    assert manifest.training["read"] == "l2"


def test_mistakes_of_the_commands(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers: write all, or numbers"):
        run("train", place / "goodbad.jsonl", "--out", tmp_path / "x.safetensors", "--layers", "a")
    with pytest.raises(ConfigError, match="push: no answer"):
        run(
            "train", place / "goodbad.jsonl", "--out", tmp_path / "x.safetensors",
            "--push", "http://127.0.0.1:9",
        )  # fmt: skip
    (tmp_path / "t").write_text("the end\n")
    with pytest.raises(ConfigError, match=r"out: .* cannot be made: "):
        run(
            "direction", tmp_path / "t", tmp_path / "t", "--layer", 1, "--model", place / "model",
            "--out", tmp_path / "t" / "x.safetensors",
        )  # fmt: skip
    with pytest.raises(ConfigError, match="missing: No such file"):
        run("direction", "missing", "missing", "--layer", 1, "--out", tmp_path / "x.safetensors")

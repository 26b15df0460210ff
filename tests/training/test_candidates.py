"""What is evaluated, at which strengths, and that it is asked as it was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reft_runtime import Engine, SamplingParams
from reft_runtime.errors import InvalidRequest, NotFound
from reft_runtime.interventions.format.manifest import Manifest
from reft_runtime.interventions.format.template import CHAT
from reft_runtime.training import TrainSettings, evaluate, train
from reft_runtime.training.tasks import read_tasks
from server.cli.main import app
from server.settings import Settings
from tests.e2e.conftest import served
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import ROWS, folder, in_process, model, own

TABLE = [{"text": row["prompt"], "label": row["label"]} for row in ROWS]
TEMPLATES = {"bare": "{prompt}", "talk": "chat", "framed": "Is it {text}\nor not:"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and a classifier of each kind of template."""
    path = tmp_path_factory.mktemp("candidates")
    folder(path / "model")
    for name, template in TEMPLATES.items():
        settings = TrainSettings(
            steps=80, batch_size=8, lr=2e-2, positions="l3", rank=16, dtype="float32",
            template=template,
        )  # fmt: skip
        train(
            TABLE,
            path / "interventions" / f"{name}.safetensors",
            model=path / "model",
            settings=settings,
            progress=False,
        )
    return path


@pytest.fixture(scope="module")
def engine(place: Path) -> Iterator[Engine]:
    with Engine(
        own(model()), tokenizer=tiny_tokenizer(), interventions=place / "interventions"
    ) as engine:
        yield engine
        engine.check_integrity()


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(engine, Settings()) as url:
        yield url


def test_answers_end_after_their_label(engine: Engine) -> None:
    """What the training put behind a label is an end, in chat and in completions."""
    greedy = SamplingParams(temperature=0, max_tokens=8)
    labels = [row["label"] for row in TABLE]
    texts = [row["text"] for row in TABLE]
    chats = [[{"role": "user", "content": text}] for text in texts]
    framed = [f"Is it {text}\nor not:" for text in texts]
    for name, prompts in (
        ("bare", texts), ("bare", chats), ("talk", chats), ("framed", framed), ("framed", chats),
    ):  # fmt: skip
        answers = engine.generate(prompts, greedy, intervention=name, progress=False)
        assert [answer.text for answer in answers] == labels
        assert {answer.choices[0].finish_reason for answer in answers} == {"stop"}


def test_rows_are_asked_as_the_file_was_trained(place: Path, address: str) -> None:
    mine = evaluate([TABLE], ["*"], **in_process(place))
    assert {name: mine.value(name, "rows") for name in TEMPLATES} == dict.fromkeys(TEMPLATES, 1)
    assert all(score.runs_on == 0 for score in mine.scores[1:])
    assert evaluate([TABLE], ["*"], url=address, progress=False) == mine
    told = evaluate([TABLE], ["talk"], template="{text}", **in_process(place))
    assert told.value("talk", "rows") < 1
    assert told.scores[0] == mine.scores[0]  # the base is asked by the prompt alone


def test_prompts_that_are_written_out_stay(place: Path, address: str) -> None:
    rows = [
        {"prompt": f"Is it {row['text']}\nor not: ", "completion": row["label"], **row}
        for row in TABLE
    ]
    assert evaluate([rows], ["framed"], **in_process(place)).value("framed", "rows") == 1
    found = evaluate([rows], ["framed"], url=address, progress=False)
    assert found.value("framed", "rows") == 1


@pytest.mark.parametrize(
    ("template", "asked", "prompt"),
    [
        (None, None, "x"),
        ("{prompt}", None, "x"),
        ("Q: {prompt}\nA:", None, [{"role": "user", "content": "x"}]),
        (CHAT, None, [{"role": "user", "content": "x"}]),
        (CHAT, "{prompt}", "x"),
        ("Q: {prompt}\nA:", "chat", [{"role": "user", "content": "x"}]),
        (None, "chat", [{"role": "user", "content": "x"}]),
    ],
)
def test_how_a_prompt_is_asked(template: str | None, asked: str | None, prompt: object) -> None:
    [task] = read_tasks(
        [[{"text": "x", "label": "y"}]],
        None,
        template=asked,
        prefixes=False,
        text=None,
        label=None,
    )
    manifest = Manifest.model_construct(template=template)
    assert task.asked_of(manifest).prompt(task.rows.rows[0]) == prompt


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_strengths(place: Path, metric: Any) -> None:
    wanted = ["bare=0", "bare=0.5", "b*", "bare=1"]
    report = evaluate([TABLE], wanted, metric=metric, **in_process(place))
    assert [s.intervention for s in report.scores] == ["base", "bare=0", "bare=0.5", "bare"]
    base, none, half, full = (score.value for score in report.scores)
    assert none == pytest.approx(base)
    if metric == "perplexity":
        assert base > half > full
    else:
        assert base <= half <= full == 1


def test_strengths_and_versions_of_a_server(place: Path, address: str, engine: Engine) -> None:
    digest = engine.registry.resolve("bare").digest
    wanted = ["bare=0", "bare=-0.5", f"bare@{digest[:12]}=-0.5", "bare"]
    theirs = evaluate([TABLE], wanted, url=address, progress=False)
    mine = evaluate([TABLE], ["bare=0", "bare=-0.5", "bare"], **in_process(place))
    assert [s.intervention for s in theirs.scores[1:]] == wanted
    assert [s.outcomes for s in theirs.scores[1:]] == [
        mine.scores[place].outcomes for place in (1, 2, 2, 3)
    ]


@pytest.mark.parametrize("strength", ["", "much", "nan", "-101", "1e3"])
def test_strengths_that_are_none(place: Path, address: str, strength: str) -> None:
    for where in (in_process(place), {"url": address}):
        with pytest.raises(InvalidRequest, match=f"intervention: 'bare={strength}': .*must be"):
            evaluate([TABLE], [f"bare={strength}"], **where)


def test_unknown_names(
    place: Path, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match=r"no frame in .*interventions\. Did you mean `framed`\?"):
        evaluate([TABLE], ["frame=0.5"], **in_process(place))
    with pytest.raises(NotFound, match=r"There are: bare, framed, talk\."):
        evaluate([TABLE], ["sentiment"], **in_process(place))
    with pytest.raises(NotFound, match=r"no .*/framd\. Did you mean `framed`\?"):
        evaluate([TABLE], [str(place / "interventions" / "framd")], **in_process(place))
    (tmp_path / "sentiment.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match=r"Did you mean the file `sentiment.safetensors`\?"):
        evaluate([TABLE], ["sentiment"], **in_process(place))
    with pytest.raises(NotFound, match=r"the server has no 'frame'\. Did you mean `framed`\?"):
        evaluate([TABLE], ["frame"], url=address)
    with pytest.raises(NotFound, match="the server has no version 'bare@0123456789'"):
        evaluate([TABLE], ["bare@0123456789"], url=address)


def test_the_command(place: Path, address: str, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["eval", str(data), "--url", address, *arguments])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    data = tmp_path / "held-out.csv"
    data.write_text("\n".join(["text,label", *(f"{r['text']},{r['label']}" for r in TABLE)]))
    one = run("-i", "talk")
    assert "held-out (accuracy, n=24)" in one
    assert "\n\ntalk on held-out: 100.0% of 24 rows right, base 0.0%, always the 50.0%\n" in one
    several = run("-i", "talk=0", "-i", "talk")
    assert [line.split()[0] for line in several.splitlines()[1:]] == ["base", "talk=0", "talk"]
    assert "talk=0 on held-out: " in run("-i", "talk=0", "-i", "talk", "--details")
    assert json.loads(run("-i", "talk", "--json"))[1]["outcomes"][0]["answered"] == "the"

"""Rows that are empty, as long as the model takes, and longer: trained on, and evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reft_runtime.errors import ConfigError
from reft_runtime.training import TrainSettings, check, evaluate, train
from reft_runtime.training.scoring import Metric
from server.cli.main import app
from tests.helpers.models import MAX_LENGTH, tiny
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import ROWS, folder, jsonl, model

BARE = TrainSettings(steps=2, batch_size=8, template="{prompt}", dtype="float32")


def evaluated(rows: list[dict[str, str]], metric: Metric | None, model_type: str = "llama") -> Any:
    return evaluate(
        [rows],
        metric=metric,
        model=tiny(model_type, eos_token_id=2),
        tokenizer=tiny_tokenizer(),
        progress=False,
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("metric", ["perplexity", "exact"])
def test_a_row_that_is_too_long_to_be_evaluated_is_named(metric: Metric, model_type: str) -> None:
    rows = [ROWS[0], {"prompt": "the" * (MAX_LENGTH + 1), "completion": "a"}]
    with pytest.raises(ConfigError, match=rf"^row 2: .*{MAX_LENGTH} tokens; shorten it, or leave"):
        evaluated(rows, metric, model_type)


def test_an_answer_is_as_long_as_the_model_has_room_for() -> None:
    fits = {"prompt": "the" * (MAX_LENGTH - 2), "completion": "a"}
    report = evaluated([fits, {"prompt": "the", "completion": "a long answer of many words"}], None)
    assert report.scores[0].metric == "perplexity"
    assert evaluated([fits], "exact").scores[0].rows == 1


@pytest.mark.parametrize("positions", ["l1", "all"])
def test_an_empty_prompt_is_told_with_its_row(tmp_path: Path, positions: str) -> None:
    empty = {**ROWS[0], "prompt": " "}
    settings = replace(BARE, positions=positions)
    out = tmp_path / "x.safetensors"
    for rows, held_out in ((ROWS, [empty]), ([*ROWS, empty], None)):
        with pytest.raises(ConfigError, match=r"row (1|25): the prompt is empty"):
            train(
                rows,
                out,
                model=model(),
                tokenizer=tiny_tokenizer(),
                evaluation=held_out,
                settings=settings,
                progress=False,
            )
    for metric in ("perplexity", "exact", "accuracy"):
        with pytest.raises(ConfigError, match="row 1: the prompt is empty"):
            evaluated([{**ROWS[0], "prompt": ""}], metric)
    assert not list(tmp_path.iterdir())


def test_the_check_finds_empty_prompts(tmp_path: Path) -> None:
    base = folder(tmp_path / "model")
    rows = [*ROWS, {**ROWS[0], "prompt": ""}]
    [bare] = check(rows, template="{prompt}", model=base)
    assert "row 25: the prompt is empty" in str(bare)
    [chats] = check(rows, template="chat", model=base)
    assert not chats.errors


def test_a_training_whose_rows_cannot_be_judged_has_succeeded(tmp_path: Path) -> None:
    base, out = folder(tmp_path / "model"), tmp_path / "x.safetensors"
    long = [{**row, "prompt": row["prompt"] * 50} for row in ROWS]
    data = jsonl(tmp_path / "long.jsonl", long)
    words = ("train", data, "--model", base, "--out", out, "--steps", 1, "--hold-out", 0.2)
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--truncate")])
    assert done.exception is None, done.exception
    assert out.exists()
    assert "The report on the held-out rows is left out: long.jsonl, line" in done.stderr

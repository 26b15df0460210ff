"""Labels that a tokenizer spells otherwise than the rows do, and labels that begin others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from reft_runtime.training import TrainSettings, evaluate, train
from reft_runtime.training.scoring import given_label, is_right
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import model

ACCENTED = "e\u0301"
"""The accent as a character of its own, as some systems write files."""


def trained_and_evaluated(out: Path, rows: list[dict[str, str]], tokenizer: Any, **how: Any) -> Any:
    """The accuracy that a training on rows tells, and that of an evaluation on the same rows."""
    settings = TrainSettings(
        steps=60, batch_size=8, lr=5e-2, positions="all", dtype="float32", **how
    )
    made = train(
        rows,
        out,
        model=model(),
        tokenizer=tokenizer,
        evaluation=rows,
        settings=settings,
        progress=False,
    )
    report = evaluate(
        [rows], [str(out)], model=made.model, tokenizer=tokenizer, base=False, progress=False
    )
    [score] = report.scores
    return made.metrics["accuracy"], score


@pytest.mark.parametrize("form", ["NFC", "NFD", None])
def test_accents_are_spelled_as_the_tokenizer_does(tmp_path: Path, form: str | None) -> None:
    tokenizer = tiny_tokenizer()
    if form is not None:
        tokenizer.backend_tokenizer.normalizer = getattr(normalizers, form)()
    rows = [
        {"text": f"{i} {word}", "label": label}
        for i, (word, label) in enumerate([("good", ACCENTED), ("bad", "and")] * 12)
    ]
    told, score = trained_and_evaluated(tmp_path / "x.safetensors", rows, tokenizer)
    assert (told, score.value, score.runs_on) == (1, 1, 0)
    assert {figures.label for figures in score.labels} == {ACCENTED, "and"}
    assert {figures.precision for figures in score.labels} == {1}


def test_accents_of_either_form_are_equal() -> None:
    one, other = ACCENTED, "\u00e9"
    labels = {one, "and"}
    for metric in ("accuracy", "exact"):
        assert is_right(other, one, metric, labels)
        assert is_right(one, other, metric, {other, "and"})
    assert is_right(other + "s", one, "accuracy")
    assert not is_right("e", one, "accuracy", labels)
    assert given_label(other, labels) == one
    assert given_label(other + "s", labels, prefixes=True) == one


def test_a_label_that_begins_another_is_right_where_it_ends(tmp_path: Path) -> None:
    """Always answering the longer label is right for half of the rows, not for all."""
    rows = [{"prompt": "x y", "completion": label, "label": label} for label in ("the", "the on")]
    rows = [rows[0]] * 4 + [rows[1]] * 12
    told, score = trained_and_evaluated(
        tmp_path / "x.safetensors", rows, tiny_tokenizer(), template="{prompt}"
    )
    assert score.value == 0.75
    assert told == 0.75

"""The shipped classifiers: what the trainer counts as right is what the server answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_runtime import Engine
from reft_runtime.interventions import CanonicalEdit, parse, read
from reft_runtime.loading.base import load_base
from reft_runtime.text import Tokenizer
from reft_runtime.training import evaluate
from reft_runtime.training.forward import Base, predict
from reft_runtime.training.layout import Layout
from reft_runtime.training.prompts import Formatter
from reft_runtime.training.rows import read_rows
from tests.e2e.conftest import INTERVENTIONS

FIXTURES = Path(__file__).parents[1] / "fixtures"
TASKS = {"sentiment": "reviews", "question-type": "questions"}


def rows_of(data: str) -> list[dict[str, str]]:
    lines = (FIXTURES / f"{data}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[::3]]


def as_chat(row: Mapping[str, str]) -> dict[str, Any]:
    turns = ("user", row["prompt"]), ("assistant", row["completion"])
    return {
        "messages": [{"role": role, "content": content} for role, content in turns],
        "label": row["label"],
    }


@pytest.fixture(scope="module")
def base() -> tuple[Base, Tokenizer]:
    _, loaded, tokenizer = load_base("demo", None, "float32", None, differentiable=True)
    return Base(loaded), Tokenizer(tokenizer, loaded.max_model_len)


@torch.no_grad()
def counted(
    base: tuple[Base, Tokenizer], name: str | None, rows: Sequence[Mapping[str, Any]]
) -> list[bool]:
    """By the trainer's own evaluation."""
    model, tokenizer = base
    edits: tuple[CanonicalEdit, ...] = ()
    template = None
    if name is not None:
        intervention = parse(read(INTERVENTIONS / f"{name}.safetensors"))
        edits, template = intervention.canonical(), intervention.manifest.template
    found = read_rows(rows)
    formatter = Formatter(Layout(None, found.rows[0]), tokenizer, model.loaded.eos_ids, template)
    examples = [formatter.example(row) for row in found.rows]
    return predict(model, edits, examples).right(examples)


@pytest.mark.parametrize("chats", [False, True], ids=["completions", "chats"])
def test_the_server_answers_what_the_trainer_counts(
    base: tuple[Base, Tokenizer], engine: Engine, url: str, tmp_path: Path, chats: bool
) -> None:
    data = {}
    for name in TASKS.values():
        rows = [as_chat(row) for row in rows_of(name)[::2]] if chats else rows_of(name)
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        data[name] = rows
    # Both data sets through both interventions and the base, 32 requests at once.
    report = evaluate(
        [tmp_path / f"{name}.jsonl" for name in data], list(TASKS), url=url, progress=False
    )
    found = {(score.intervention, score.data): list(score.right) for score in report.scores}
    assert found == {
        (name or "base", rows_name): counted(base, name, rows)
        for name in (None, *TASKS)
        for rows_name, rows in data.items()
    }
    for name, rows_name in TASKS.items():
        assert report.value(name, rows_name) > 0.7

"""A tiny model and a task that it can learn."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from reft_runtime.base.model import LoadedModel
from reft_runtime.interventions import BaseShape
from reft_runtime.loading.loader import adopt_model
from reft_runtime.text import Tokenizer
from reft_runtime.training.forward import Base
from reft_runtime.training.layout import Layout
from reft_runtime.training.prompts import Example, Formatter
from reft_runtime.training.rows import Row
from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.trainable import TrainableEdits, new_edits
from tests.helpers.models import HIDDEN, VOCABULARY, tiny
from tests.helpers.tokenizer import tiny_tokenizer

SHAPE = BaseShape(
    model="LlamaForCausalLM",
    architecture="LlamaForCausalLM",
    hidden_size=HIDDEN,
    num_layers=4,
    vocab_size=VOCABULARY,
)
EOS = frozenset({2})

ROWS = [
    {"prompt": f"{i} {word}", "completion": f" {label}", "label": label}
    for i, (word, label) in enumerate([("good", "the"), ("bad", "and")] * 12)
]


def model(model_type: str = "llama") -> PreTrainedModel:
    return tiny(model_type, eos_token_id=2)


def loaded(model_type: str = "llama") -> LoadedModel:
    return adopt_model(model(model_type), differentiable=True)


def base(model_type: str = "llama") -> Base:
    return Base(loaded(model_type))


def examples(rows: Sequence[dict[str, Any]] = ROWS, template: str | None = None) -> list[Example]:
    made = [Row(f"row {i}", fields) for i, fields in enumerate(rows, 1)]
    formatter = Formatter(Layout(template, made[0]), Tokenizer(tiny_tokenizer(), 256), EOS)
    return [formatter.example(row) for row in made]


def random_edits(seed: int = 0, **settings: Any) -> TrainableEdits:
    """Edits that change something, as if trained."""
    edits = new_edits(SHAPE, TrainSettings(**settings).complete(SHAPE, 100))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in edits.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return edits


def folder(path: Path) -> Path:
    """The tiny model and its tokenizer as a folder."""
    model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own(made: PreTrainedModel) -> PreTrainedModel:
    """A copy, because an engine changes the model that it is given."""
    return copy.deepcopy(made)


def in_process(place: Path) -> dict[str, Any]:
    """Options of `evaluate` for the model and the interventions of a folder."""
    kept = place / "interventions"
    return {"model": place / "model", "folder": kept, "dtype": "float32", "progress": False}

"""How well each layer tells two sets of texts apart, beside numpy on transformers' own states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.training import direction, separations
from reft_runtime.training.forward import Base
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import model

UP = ["and the end", "the sting is", "the end", "and on the end is", "a sting", "the", "end the"]
DOWN = ["you", "er you on st", "is it on", "you it", "on er you", "it is you"]
GIVEN: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "progress": False}


def states(texts: list[str]) -> np.ndarray[Any, Any]:
    """The outputs [texts, layers, d] of all layers, each text's mean without its first token."""
    plain, tokenizer, found = model(), tiny_tokenizer(), []
    layers: list[torch.Tensor] = []
    for layer in plain.model.layers:  # the last of `hidden_states` is normalised
        layer.register_forward_hook(lambda _, __, output: layers.append(output))
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        layers.clear()
        with torch.no_grad():
            plain(input_ids=ids)
        if ids.shape[1] > 1:
            found.append(torch.stack([output[0, 1:].mean(0) for output in layers]).numpy())
    return np.stack(found).astype(np.float64)


def measured(ups: np.ndarray[Any, Any], downs: np.ndarray[Any, Any]) -> tuple[float, float]:
    """AUROC and accuracy, one text and one pair after another."""
    folds = min(5, len(ups), len(downs))
    aurocs, accuracies = [], []
    for fold in range(folds):
        rest = [
            np.mean([row for i, row in enumerate(rows) if i % folds != fold], axis=0)
            for rows in (ups, downs)
        ]
        axis, threshold = rest[0] - rest[1], (rest[0] - rest[1]) @ (rest[0] + rest[1]) / 2
        up, down = ([row @ axis for row in rows[fold::folds]] for rows in (ups, downs))
        pairs = [(a > b) + (a == b) / 2 for a in up for b in down]
        aurocs.append(np.mean(pairs))
        right = np.mean([a > threshold for a in up]), np.mean([b < threshold for b in down])
        accuracies.append(np.mean(right))
    return float(np.mean(aurocs)), float(np.mean(accuracies))


def test_every_layer_is_measured_by_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    logits = Base.logits

    def counted(self: Base, parts: Any, *rest: Any) -> Any:
        passes.append(len(parts))
        return logits(self, parts, *rest)

    monkeypatch.setattr(Base, "logits", counted)
    found = separations(UP, DOWN, model=model(), **GIVEN)
    ups, downs = states(UP), states(DOWN)
    assert passes == [len(ups), len(downs)]
    assert [each.layer for each in found] == [0, 1, 2, 3]
    for each in found:
        up, down = ups[:, each.layer], downs[:, each.layer]
        assert (each.auroc, each.accuracy) == pytest.approx(measured(up, down), abs=1e-6)
        norm = np.linalg.norm(up.mean(0) - down.mean(0))
        length = np.linalg.norm(np.concatenate((up, down)), axis=1).mean()
        assert each.norm == pytest.approx(norm, rel=1e-4)
        assert each.relative_norm == pytest.approx(norm / length, rel=1e-4)
    assert len({each.auroc for each in found}) > 1
    made = direction(UP, DOWN, layer=2, model=model(), **GIVEN)
    assert found[2].norm == pytest.approx(float(made.tensors["edits.0.v"].norm()), rel=1e-4)
    assert separations(UP, DOWN, layers=[3, 1, 3], model=model(), **GIVEN) == [found[1], found[3]]


def test_texts_that_are_alike_are_told_apart_by_chance() -> None:
    for each in separations(UP[:2], UP[:2], model=model(), **GIVEN):
        assert (each.norm, each.relative_norm) == (0, 0)
        assert (each.auroc, each.accuracy) == (0.5, 0.5)
    with pytest.raises(ConfigError, match="negative: only one text can be read"):
        separations(UP, ["er you on st", "a"], model=model(), **GIVEN)
    with pytest.raises(InvalidFile, match="template: write `chat`, or a text that holds"):
        separations(UP, DOWN, template="no field", model=model(), **GIVEN)
    with pytest.raises(ConfigError, match=r"layers: -1; .* has 0 to 3"):
        separations(UP, DOWN, layers=[-1], model=model(), **GIVEN)

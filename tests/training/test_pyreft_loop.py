"""Beside pyreft's modules in a plain loop: the same loss at the same weights, the same outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reft_runtime.training import TrainSettings, train
from reft_runtime.training.forward import EditedModel
from reft_runtime.training.prompts import Example
from tests.helpers.pyreft import interventions
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import ROWS, base, examples, model, random_edits

LAYERS = (1, 3)


def modules() -> list[Any]:
    torch.manual_seed(0)
    return [
        interventions.LoreftIntervention(embed_dim=32, low_rank_dimension=4, dtype=torch.float32)
        for _ in LAYERS
    ]


def loss_and_right(plain: Any, edits: list[Any], rows: list[Example]) -> tuple[Tensor, int]:
    """Each row by itself, through hooks of this test's own, edited at its last prompt token."""
    losses, right = [], 0
    for example in rows:
        at = example.prompt_length - 1

        def hook(edit: Any, at: int = at) -> Any:
            def change(module: Any, args: Any, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                changed = torch.cat(
                    [hidden[:, :at], edit(hidden[:, at : at + 1]), hidden[:, at + 1 :]], dim=1
                )
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return change

        handles = [
            plain.model.layers[layer].register_forward_hook(hook(edit))
            for layer, edit in zip(LAYERS, edits, strict=True)
        ]
        logits = plain(input_ids=torch.tensor([example.tokens[:-1]])).logits[0, at:]
        for handle in handles:
            handle.remove()
        targets = torch.tensor(example.completion)
        losses.append(cross_entropy(logits, targets, reduction="sum"))
        right += bool((logits.argmax(-1) == targets)[: example.label_length].all())
    return torch.stack(losses).sum() / sum(len(row.completion) for row in rows), right


def test_the_loss_is_pyrefts() -> None:
    ours = random_edits(positions="l1", layers=LAYERS)
    theirs = modules()
    with torch.no_grad():
        for mine, its in zip(ours, theirs, strict=True):
            stored = mine.stored()
            its.learned_source.weight.copy_(stored["W"])
            its.learned_source.bias.copy_(stored["b"])
            its.rotate_layer.parametrizations.weight[0].base.zero_()
            its.rotate_layer.weight = stored["R"]
    rows = examples()
    wanted, _ = loss_and_right(model(), theirs, rows)
    got = EditedModel(base(), ours)(rows)["loss"]
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_both_learn_the_task(tmp_path: Path) -> None:
    settings = TrainSettings(layers=LAYERS, steps=60, batch_size=8, lr=5e-2, dtype="float32")
    trained = train(
        ROWS, tmp_path / "x.safetensors", model=model(), tokenizer=tiny_tokenizer(),
        evaluation=ROWS, settings=settings, progress=False,
    )  # fmt: skip
    plain, rows, edits = model().requires_grad_(False), examples(), modules()
    # Weight decay would end the training: torch's parametrisation of R takes int(diagonal), which
    # is -1, and 0 as soon as the diagonal shrinks.
    optimizer = torch.optim.AdamW(
        [p for e in edits for p in e.parameters()], lr=1e-2, weight_decay=0
    )
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 120)
    for step in range(120):
        first = 8 * step % len(rows)
        loss, _ = loss_and_right(plain, edits, rows[first : first + 8])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    _, right = loss_and_right(plain, edits, rows)
    assert trained.metrics["accuracy"] == right / len(rows) == 1

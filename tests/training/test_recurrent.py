"""Training on models with recurrent layers: each row by itself, with the model's own gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reft_runtime.interventions import CanonicalEdit
from reft_runtime.training.forward import Base, predict
from reft_runtime.training.prompts import Example
from tests.helpers.models import edited_positions, prompt, tiny
from tests.training.make import base, random_edits

EXAMPLES = [
    Example("", prompt(length), length - made) for length, made in ((9, 3), (5, 1), (9, 2), (20, 4))
]


def plain_loss(model: Any, edits: list[CanonicalEdit]) -> Tensor:
    """The summed loss, one row at a time through transformers' model, with hooks."""
    total = torch.zeros(())
    for example in EXAMPLES:
        ids = torch.tensor([example.tokens[:-1]])

        def hook(edit: CanonicalEdit, length: int = example.prompt_length) -> Any:
            at = edited_positions(edit.positions, length)

            def change(module: nn.Module, args: Any, output: Any) -> Any:
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                hidden[0, at] = edit.edited(hidden[0, at], 1.0)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return change

        layers = model.get_decoder().layers
        hooks = [layers[edit.layer].register_forward_hook(hook(edit)) for edit in edits]
        logits = model(input_ids=ids, use_cache=False).logits[0, example.prompt_length - 1 :]
        for one in hooks:
            one.remove()
        total = total + cross_entropy(logits, torch.tensor(example.completion), reduction="sum")
    return total


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "nemotron_h", "falcon_h1", "jamba", "lfm3"])
def test_loss_and_gradients_are_those_of_the_model_alone(model_type: str) -> None:
    edits = random_edits(positions="f1+l2", layers=(0, 1))
    ours = predict(base(model_type), edits.canonical(), EXAMPLES).loss()
    found = torch.autograd.grad(ours, list(edits.parameters()))
    plain = plain_loss(tiny(model_type, eos_token_id=2), edits.canonical())
    wanted = torch.autograd.grad(plain, list(edits.parameters()))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    for ours_of_it, wanted_of_it in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours_of_it, wanted_of_it, rtol=1e-3, atol=1e-4)


def test_no_prefix_is_kept() -> None:
    trained: Base = base("lfm3")
    edits = random_edits(positions="l1").canonical()
    assert [trained.start(edits, example) for example in EXAMPLES] == [0] * len(EXAMPLES)

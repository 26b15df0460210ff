"""Logits and gradients of a packed batch are those of the model's own attention, row by row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reft_runtime.base.model import forward
from reft_runtime.loading.loader import adopt_model
from reft_runtime.training.attention import BatchAttention
from tests.helpers.models import HIDDEN, VOCABULARY, WINDOW, prompt, tiny

LENGTHS = [3, 2 * WINDOW + 3, WINDOW + 1]


def shifted(layer: nn.Module, shift: Tensor) -> Any:
    """Add `shift` to what a layer gives."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + shift, *output[1:])
        return output + shift

    return layer.register_forward_hook(hook)


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt_oss", "llama4_text", "deepseek_v3", "gemma4_text"]
)
def test_gradients_are_those_of_the_models_own_attention(model_type: str) -> None:
    own: Any = tiny(model_type)
    own.requires_grad_(False).set_attn_implementation("eager")
    loaded = adopt_model(copy.deepcopy(own), differentiable=True)
    rows = [torch.tensor(prompt(length)) for length in LENGTHS]
    generator = torch.Generator().manual_seed(0)
    shifts = [0.1 * torch.randn(n, HIDDEN, generator=generator) for n in LENGTHS]
    weights = torch.randn(sum(LENGTHS), VOCABULARY, generator=generator)

    packed = torch.cat(shifts).requires_grad_()
    with shifted(loaded.layers[0], packed):
        logits = forward(
            loaded.model,
            torch.cat(rows),
            torch.cat([torch.arange(length) for length in LENGTHS]),
            torch.arange(sum(LENGTHS)),
            BatchAttention(LENGTHS, torch.device("cpu")),
        )
    (logits * weights).sum().backward()
    assert packed.grad is not None

    for ids, shift, found, gradient, weight in zip(
        rows,
        shifts,
        torch.split(logits.detach(), LENGTHS),
        torch.split(packed.grad, LENGTHS),
        torch.split(weights, LENGTHS),
        strict=True,
    ):
        shift.requires_grad_()
        with shifted(own.model.layers[0], shift):
            wanted = own(input_ids=ids[None], use_cache=False).logits[0]
        (wanted * weight).sum().backward()
        assert shift.grad is not None
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            gradient, shift.grad, rtol=1e-3, atol=1e-3 * float(shift.grad.abs().max())
        )

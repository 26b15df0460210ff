"""The floor: what the model's linear layers take, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.workload import ANSWER_TOKENS, PROMPT_TOKENS
from reft_runtime.engine.linears import prepack


def linear_floor(model: nn.Module, n: int) -> Callable[[int], None]:
    """Runs the prepacked linear layers: one pass over n prompts, then one for each further token.

    The output head computes n rows in each pass.
    """
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    dtype = head.weight.dtype
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {
        (rows, module.in_features): torch.randn(rows, module.in_features).to(dtype)
        for module in linears
        for rows in (n, n * PROMPT_TOKENS)
    }
    prepack(model)

    @torch.inference_mode()
    def run(_: int) -> None:
        for step in range(ANSWER_TOKENS):
            rows = n * PROMPT_TOKENS if step == 0 else n
            for module in linears:
                module(inputs[n if module is head else rows, module.in_features])

    return run

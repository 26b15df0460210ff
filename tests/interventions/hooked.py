"""The reference for edits of projects without a library: their formulas in plain hooks.

RED, BREP, LoFiT, JoLA and steerling are in no registry, or not for today's transformers: the hooks
are written after their published sources.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_runtime.interventions import Intervention, parse, serialise
from reft_runtime.loading.loader import adopt_model
from reft_runtime.schedule.request import AppliedIntervention
from tests.helpers.models import DEVICE, answers, make_core, prompt, request, tiny_llama

STEPS = 20
PROMPT = prompt(9)

Hook = Callable[[nn.Module, Any, Any], Any]
"""A forward hook: what a module gives instead."""


def random(*shape: int, seed: int, size: float = 0.5) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def reference(model: PreTrainedModel, hooks: Mapping[str, Hook]) -> tuple[list[int], list[float]]:
    """Greedy tokens with a cache, and the log-probabilities of the prompt's and of these."""
    with ExitStack() as stack:
        for path, hook in hooks.items():
            stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        ids = torch.tensor([PROMPT])
        before = model(ids, use_cache=False).logits[0, :-1]
        found: Any = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens: list[int] = found.sequences[0].tolist()
    rows = torch.cat([before, *found.logits]).log_softmax(-1)
    logprobs = [float(row[token]) for row, token in zip(rows, tokens[1:], strict=True)]
    return tokens[len(PROMPT) :], logprobs


def agrees(
    made: Intervention,
    hooks: Callable[[float], Mapping[str, Hook]],
    model: PreTrainedModel | None = None,
    strengths: tuple[float, ...] = (1.0,),
) -> None:
    """The engine answers as the hooks for a strength do, whose answer is not the base model's."""
    loaded = None if model is None else adopt_model(copy.deepcopy(model).to(DEVICE))  # type: ignore[arg-type]
    model = tiny_llama()[0] if model is None else model
    edits = parse(serialise(made)).canonical()
    plain = reference(model, {})[0]
    for strength in strengths:
        tokens, logprobs = reference(model, hooks(strength))
        assert tokens != plain
        use = AppliedIntervention("a", edits, strength)
        asked = request("a", PROMPT, use, max_tokens=STEPS, logprobs=1, prompt_logprobs=1)
        found = answers(make_core(loaded), [asked])["a"]
        assert found.tokens[0] == tokens
        ours = [each.logprob for each in (*found.prompt_logprobs, *found.logprobs[0]) if each]
        torch.testing.assert_close(ours, logprobs, atol=1e-4, rtol=0)

"""State-space layers whose own code bounds time steps for several tokens, and not for one."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import generate, make_core, prompt, request, run, tiny
from tools.tiny_models import tiny_config, tiny_model

NEW_TOKENS = 12


def zamba2() -> PreTrainedModel:
    return tiny_model(tiny_config("zamba2", time_step_min=0.1))


def nemotron_h() -> PreTrainedModel:
    return tiny("nemotron_h", time_step_min=0.1)


@torch.inference_mode()
def answer(model: PreTrainedModel, tokens: tuple[int, ...]) -> list[int]:
    """The greedy answer by forwards of the whole text, without a cache."""
    ids = list(tokens)
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(tokens) :]


@pytest.mark.parametrize("make", [zamba2, nemotron_h])
def test_answers_do_not_depend_on_how_prompts_are_cut(make: object) -> None:
    assert callable(make)
    model = make()
    prompts = [prompt(length) for length in (5, 19, 24)]
    wanted = [answer(model, tokens) for tokens in prompts]
    assert wanted != [generate(model, tokens, NEW_TOKENS) for tokens in prompts], "nothing to see"
    loaded = adopt_model(copy.deepcopy(model))
    for step_tokens in (512, 3, 1):
        core = make_core(loaded, max_running=min(3, step_tokens), max_step_tokens=step_tokens)
        asked = [request(str(i), p, max_tokens=NEW_TOKENS) for i, p in enumerate(prompts)]
        found = run(core, asked)
        assert [found[str(i)][0] for i in range(len(prompts))] == wanted

"""Log-probabilities of prompts and answers are those of the model itself."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reft_runtime.outputs import TokenLogprob
from tests.helpers.models import (
    MAX_LENGTH,
    Answer,
    answers,
    applied,
    loreft,
    make_core,
    prompt,
    request,
    step,
    tiny_llama,
)

K = 3


@torch.inference_mode()
def reference(tokens: tuple[int, ...]) -> Tensor:
    """Log-probabilities [T, vocabulary] after each token."""
    model, _ = tiny_llama()
    logits: Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits.log_softmax(-1)


def check(found: list[TokenLogprob], tokens: tuple[int, ...], first: int) -> None:
    """Entry i is about token `first` + i, after the tokens before it."""
    assert [each.token for each in found] == list(tokens[first : first + len(found)])
    wanted = reference(tokens)[first - 1 :]
    for each, row in zip(found, wanted, strict=False):
        assert each.logprob == pytest.approx(row[each.token].item(), abs=1e-4)
        best = row.topk(K)
        assert [token for token, _ in each.top] == best.indices.tolist()
        assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("max_step_tokens", [512, 7, 2])
@pytest.mark.parametrize("length", [2, 3, 40])
def test_of_a_prompt_across_chunks(length: int, max_step_tokens: int) -> None:
    core = make_core(max_running=2, max_step_tokens=max_step_tokens)
    asked = request("a", prompt(length), prompt_logprobs=K, n=2)
    found = answers(core, [request("b", prompt(11)), asked])["a"]
    assert len(found.prompt_logprobs) == length - 1
    check(found.prompt_logprobs, prompt(length), 1)


def test_a_prompt_of_one_token_has_none() -> None:
    scored = answers(make_core(), [request("a", prompt(1), prompt_logprobs=K)])
    assert scored == answers(make_core(), [request("a", prompt(1))])


@pytest.mark.parametrize("scored_from", [1, 10])
def test_after_a_preemption_in_mid_prompt(scored_from: int) -> None:
    # Decoding requests use up the KV while a long prompt, the newest, is computed bit by bit.
    core = make_core(max_running=8, max_step_tokens=8, kv_tokens=MAX_LENGTH + 16)
    found: dict[str, Answer] = {}
    for i in range(5):
        core.add(request(f"{i}", prompt(14, seed=i), max_tokens=100))
    while len(found) < 5:
        step(core, found)
    scored = request("a", prompt(100), prompt_logprobs=K, max_tokens=4)
    core.add(replace(scored, scored_from=scored_from))
    longest = 0
    while not core.idle:
        sequences = core.requests._sequences.get("a", [])
        before = [s.computed for s in sequences]
        step(core, found)
        if sequences and before[0] and not sequences[0].computed:
            longest = max(longest, before[0])
    assert 0 < longest < 100, "the prompt was preempted part way"
    assert len(found["a"].prompt_logprobs) == 100 - scored_from
    check(found["a"].prompt_logprobs, prompt(100), scored_from)


def test_of_generated_tokens_with_alternatives() -> None:
    found = answers(
        make_core(),
        [
            request("a", prompt(9), logprobs=K, max_tokens=12),
            request("sampled", prompt(9), logprobs=K, temperature=2.0, logit_bias={5: 20.0}),
            request("bare", prompt(9), logprobs=0),
            request("none", prompt(9)),
        ],
    )
    for name in ("a", "sampled"):
        logprobs = [each for each in found[name].logprobs[0] if each is not None]
        assert len(logprobs) == len(found[name].tokens[0])
        check(logprobs, (*prompt(9), *found[name].tokens[0]), 9)
    assert [e.top for e in found["bare"].logprobs[0] if e] == [()] * 8
    assert found["none"].logprobs[0] == [None] * 8


def test_of_a_prompt_under_an_intervention_are_the_edited_models() -> None:
    edited = request("a", prompt(20), applied(loreft(0, "f2")), prompt_logprobs=0, max_tokens=0)
    base = request("b", prompt(20), prompt_logprobs=0, max_tokens=0)
    found = answers(make_core(), [edited, base])
    a, b = ([each.logprob for each in found[name].prompt_logprobs] for name in "ab")
    assert all(abs(x - y) > 1e-4 for x, y in zip(a, b, strict=True))
    late = request("c", prompt(20), applied(loreft(0, "l2")), prompt_logprobs=0, max_tokens=0)
    c = [each.logprob for each in answers(make_core(), [late])["c"].prompt_logprobs]
    assert c[:17] == pytest.approx(b[:17], abs=1e-4)
    assert abs(c[18] - b[18]) > 1e-4

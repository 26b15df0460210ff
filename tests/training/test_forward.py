"""What is trained is what is served, and gradients reach the edits only."""

from __future__ import annotations

import pytest
import torch

from reft_runtime import Engine, SamplingParams
from reft_runtime.interventions import Intervention, serialise
from reft_runtime.interventions.format.kinds import KINDS
from reft_runtime.training.forward import EditedModel, first_edited, predict
from reft_runtime.training.prompts import Example
from tests.helpers.models import prompt
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import SHAPE, base, examples, model, own, random_edits

CASES = [(kind, "l1") for kind in KINDS] + [
    ("loreft", positions)
    for positions in (
        *("f1+l1", "f2+l3", "all", "decode", "l2+decode", "decode[1:3]", "[1,-2]", "f40+l40"),
        *("prompt", "[:3]+[-2:]+decode", "[2:-1]"),
    )
]


@pytest.mark.parametrize(("kind", "positions"), CASES)
def test_the_engine_gives_the_trainers_logits(kind: str, positions: str) -> None:
    edits = random_edits(kind=kind, positions=positions)
    built = Intervention.build(SHAPE, edits.export())
    prompts = [list(prompt(length)) for length in (2, 3, 9, 17)]
    with Engine(own(model()), tokenizer=tiny_tokenizer()) as engine:
        engine.registry.put("it", serialise(built))
        sampling = SamplingParams(temperature=0, max_tokens=5, logprobs=20, ignore_eos=True)
        answers = engine.generate(prompts, sampling, intervention="it", progress=False)
    assert len({tuple(answer.tokens) for answer in answers}) > 1
    made = predict(
        base(),
        edits.canonical(),
        [
            Example("", (*tokens, *answer.tokens), len(tokens))
            for tokens, answer in zip(prompts, answers, strict=True)
        ],
    )
    ours = made.logits.detach().log_softmax(-1).split(5)  # type: ignore[no-untyped-call]
    for answer, rows in zip(answers, ours, strict=True):
        for logprob, row in zip(answer.choices[0].logprobs, rows, strict=True):
            for token, value in logprob.top:
                assert float(row[token]) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_oss", "llama4_text"]
)
def test_known_prefixes_change_nothing(model_type: str) -> None:
    """Sliding windows, learned positions: behind a kept prefix as in one pass over all tokens."""
    layers = (1, 2)
    edits = random_edits(positions="l1", layers=layers).canonical()
    whole = random_edits(positions="[0]", layers=layers)
    with torch.no_grad():
        for edit in whole:
            stored = edit.stored()
            stored["W"].copy_(stored["R"].T)
            stored["b"].zero_()
    nothing = whole.canonical()  # edits the first token, and changes nothing
    rows = [Example("", prompt(length), length - 2) for length in (4, 30, 11)]
    assert first_edited(edits, rows[1]) == 27
    assert first_edited([*nothing, *edits], rows[1]) == 0
    keeping = base(model_type)
    first = predict(keeping, edits, rows).logits
    keeping.keep((row.tokens[: first_edited(edits, row)] for row in rows), 1 << 20, progress=False)
    assert len(keeping._kept) == 3
    torch.testing.assert_close(predict(keeping, edits, rows).logits, first)
    torch.testing.assert_close(
        predict(base(model_type), [*nothing, *edits], rows).logits, first, atol=1e-4, rtol=1e-4
    )


def test_kept_prefixes_stay_within_their_memory() -> None:
    edits = random_edits(positions="l1").canonical()
    rows = [Example("", prompt(length), length - 2) for length in (4, 30, 11)]
    starts = [row.tokens[: first_edited(edits, row)] for row in rows]
    small = base()
    first = predict(small, edits, rows).logits
    small.keep(starts, 20 * small.loaded.kv_bytes_per_token, progress=False)
    assert set(small._kept) == {starts[0], starts[2]}
    size = sum(prefix.size_bytes for prefix in small._kept.values())
    assert size == (1 + 8) * small.loaded.kv_bytes_per_token
    torch.testing.assert_close(predict(small, edits, rows).logits, first)


@pytest.mark.parametrize("positions", ["l1", "f1+l1", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind: str, positions: str) -> None:
    edits = random_edits(kind=kind, positions=positions, layers=(0, 2), seed=3)
    edited = EditedModel(base(), edits)
    batch = examples()[:3]

    def loss() -> torch.Tensor:
        found: torch.Tensor = edited(batch)["loss"]
        return found

    loss().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in edited.base.loaded.model.parameters())
    generator = torch.Generator().manual_seed(0)
    for parameter in edits.parameters():
        assert parameter.grad is not None
        step = 1e-2 * torch.randn(parameter.shape, generator=generator)
        step /= step.norm() / 1e-2
        with torch.no_grad():
            parameter.add_(step)
            above = float(loss())
            parameter.sub_(2 * step)
            below = float(loss())
            parameter.add_(step)
        expected = float((parameter.grad * step).sum()) * 2
        assert above - below == pytest.approx(expected, rel=0.1, abs=2e-4)


def test_only_edits_are_parameters() -> None:
    edits = random_edits(rank=2, layers=(1,))
    edited = EditedModel(base(), edits)
    assert sum(p.numel() for p in edited.parameters()) == 32 * 2 * 2 + 2
    assert set(edited.state_dict()) == {f"edits.{name}" for name in edits.state_dict()}


def test_accuracy_is_that_of_the_labels_tokens() -> None:
    batch = examples()[:2]
    made = predict(base(), [], batch)
    made.logits.zero_()
    at = 0
    for example, wrong_end in zip(batch, (True, False), strict=True):
        for place, token in enumerate(example.completion):
            ends = place == len(example.completion) - 1
            made.logits[at, 5 if ends and wrong_end else token] = 1
            at += 1
    assert made.right(batch) == [True, True]
    unlabelled = [Example("", example.tokens, example.prompt_length) for example in batch]
    assert made.right(unlabelled) == [False, True]

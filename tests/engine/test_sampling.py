"""Kernels that sample on a device pick what the CPU's sampler picks, without waiting.

In Triton's interpreter, which takes a good part of a second a row, there are few rows.
"""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from reft_runtime.engine.device_sampler import DeviceSampler, Draw, Picked
from reft_runtime.engine.masks import allowed
from reft_runtime.engine.sampler import Sampled, SampleRow, has_penalties, sample
from reft_runtime.grammar import GrammarState
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import Sequence
from tests.helpers.models import DEVICE
from tests.helpers.pages import no_waiting
from tests.helpers.sampling import bits_of, triton_select

# NumPy, in the interpreter, warns where a device does not.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

EOS = 3
VOCABULARY = 150
CHUNK = 128
ON_DEVICE = DEVICE.type == "cuda"


def device_sampler(vocabulary: int = VOCABULARY, chunk: int = CHUNK) -> DeviceSampler:
    return DeviceSampler(vocabulary, 512, frozenset({EOS}), DEVICE, triton_select(chunk))


def sequence(
    params: SamplingParams,
    seed: int = 1,
    prompt: tuple[int, ...] = (8, 9),
    generated: tuple[int, ...] = (),
) -> Sequence:
    return Sequence(Request("", prompt, params, seed), seed % 2, 0, [*prompt, *generated])


def pick(
    sampler: DeviceSampler, logits: Tensor, draws: SequenceOf[Draw], before: Tensor | None = None
) -> Picked:
    """As the engine does; nothing may wait for a device."""
    logits = logits.to(DEVICE)
    with no_waiting() if ON_DEVICE else nullcontext():
        return sampler.pick(logits, draws, before)


def by_device(logits: Tensor, owners: SequenceOf[Sequence], **sizes: int) -> list[Sampled | None]:
    sampler = device_sampler(logits.shape[1], **sizes)
    sampler.warm_up(logits.dtype)
    draws = [Draw(each, each.generated_length, row) for row, each in enumerate(owners)]
    found = pick(sampler, logits, draws).result()
    sampler.release(owners)
    sampler.check_integrity(idle=True)
    return found


def by_cpu(logits: Tensor, owners: SequenceOf[Sequence]) -> list[Sampled | None]:
    rows = [
        SampleRow(
            each.request.sampling,
            each.request.seed,
            each.choice,
            each.generated_length,
            each.counts() if has_penalties(each.request.sampling) else None,
            frozenset({EOS}),
            mask,
        )
        for each, mask in zip(owners, allowed(owners, logits.shape[1], {EOS}), strict=True)
    ]
    return sample(logits, rows)


def tokens(found: SequenceOf[Sampled | None]) -> list[int | None]:
    return [None if one is None else one.token for one in found]


def same(found: SequenceOf[Sampled | None], wanted: SequenceOf[Sampled | None]) -> None:
    assert tokens(found) == tokens(wanted)
    for one, other in zip(found, wanted, strict=True):
        logprob = None if one is None else one.logprob
        theirs = None if other is None else other.logprob
        assert (logprob is None) == (theirs is None)
        if logprob is not None and theirs is not None:
            assert logprob.token == theirs.token
            assert logprob.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [value for _, value in logprob.top] == pytest.approx(
                [value for _, value in theirs.top], abs=1e-4
            )


def random_logits(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def any_params(rng: random.Random) -> SamplingParams:
    one = rng.choice
    return SamplingParams(
        temperature=one([0.0, 0.3, 1.0, 1.7, 50.0]),
        top_k=one([0, 0, 1, 5, 60, 10_000]),
        top_p=one([1.0, 1.0, 0.01, 0.5, 0.9, 0.999]),
        min_p=one([0.0, 0.0, 0.02, 0.5]),
        repetition_penalty=one([1.0, 1.5, 0.7]),
        presence_penalty=one([0.0, 1.5, -2.0]),
        frequency_penalty=one([0.0, 0.4, -0.3]),
        logit_bias=one([{}, {0: 30.0}, {5: -100.0, 140: 2.5, 11: 1.0}]),
        stop_token_ids=one([(), (2,)]),
        min_tokens=one([0, 3]),
        ignore_eos=one([True, False]),
        logprobs=one([None, 0, 2, 20]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_settings_in_one_batch(dtype: torch.dtype) -> None:
    rng = random.Random(5)
    count = 300 if ON_DEVICE else 7
    owners = [
        sequence(any_params(rng), seed=i, generated=rng.choice([(), (1, 1, 2), (4, 4, 4, 4)]))
        for i in range(count)
    ]
    logits = random_logits(count).to(dtype) * torch.tensor([[0.01], [1.0], [2.0]]).repeat(count, 1)[
        :count
    ].to(dtype)
    same(by_device(logits, owners), by_cpu(logits, owners))


class Bits:
    """What a grammar asks its library for: here always the same tokens."""

    def __init__(self, ids: Iterable[int]) -> None:
        self.bits = bits_of(ids, VOCABULARY)

    def unsafe_compute_mask_ptr(self, address: int, size: int) -> None:
        ctypes.memmove(address, self.bits.data_ptr(), size)


def test_tokens_that_a_grammar_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # else the library wants its own
    rng = random.Random(7)
    count = 300 if ON_DEVICE else 6
    owners = [
        sequence(any_params(rng), seed=i, generated=rng.choice([(), (4, 4, 5)]))
        for i in range(count)
    ]
    for i, each in enumerate(owners):
        if i % 3:  # others are free
            ids = rng.sample(range(VOCABULARY), rng.choice([1, 5, 100]))
            each.grammar = GrammarState(Bits(ids), "")  # type: ignore[arg-type]
    logits = random_logits(count)
    same(by_device(logits, owners), by_cpu(logits, owners))


@pytest.mark.skipif(not ON_DEVICE, reason="takes minutes in the interpreter")
@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 151_936])
def test_real_vocabularies(vocabulary: int) -> None:
    rng = random.Random(1)
    owners = [sequence(any_params(rng), seed=i, generated=(4, 4, 5)) for i in range(48)]
    logits = random_logits(48, vocabulary)
    logits[::3] *= 0.1
    same(by_device(logits, owners, chunk=4096), by_cpu(logits, owners))


FEW = {
    "the best alone": SamplingParams(top_k=1),
    "hardly any weight": SamplingParams(top_p=1e-6),
    "almost all weight": SamplingParams(top_p=1 - 1e-9),
    "more than there are": SamplingParams(top_k=10_000, top_p=0.7),
    "count, then weight": SamplingParams(top_k=40, top_p=0.6, temperature=2),
    "more than min_p leaves": SamplingParams(top_k=50, min_p=0.3, top_p=0.9),
    "those that min_p leaves": SamplingParams(top_k=50, min_p=0.3),
    "coldest": SamplingParams(temperature=1e-300, top_p=0.5),
    "hottest": SamplingParams(temperature=100, top_p=0.9),
}


def test_thresholds_at_their_ends() -> None:
    owners = [sequence(params, seed=i) for i, params in enumerate(FEW.values())]
    logits = random_logits(len(owners), seed=3)
    same(by_device(logits, owners), by_cpu(logits, owners))


def test_of_equals_the_lowest_ids_are_kept_also_across_chunks() -> None:
    """110 of 120 equals end in the second chunk of ids; the best of all come after them."""
    logits = torch.full((8, VOCABULARY), -2.0)
    logits[:, 20:140] = 1.0
    logits[:, 145:] = 2.0
    params = [SamplingParams(top_k=5 + 110, temperature=0.3, logprobs=20)] * 6
    params += [SamplingParams(top_p=0.5, temperature=3), SamplingParams(temperature=0)]
    owners = [sequence(one, seed) for one, seed in zip(params, range(8, 16), strict=True)]
    wanted = by_cpu(logits, owners)
    assert sum(token in range(145, 150) for token in tokens(wanted[:6])) > 2
    found = by_device(logits, owners)
    same(found, wanted)
    assert found[7] == Sampled(145)
    assert found[0] is not None
    assert found[0].logprob is not None
    assert [token for token, _ in found[0].logprob.top] == [*range(145, 150), *range(20, 35)]


def test_rows_that_are_not_finite() -> None:
    logits = random_logits(7)
    logits[6, 30:] = -math.inf
    logits[0, 140], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    logits[3, ::2] = -math.inf
    logits[4], logits[4, EOS] = -math.inf, 0
    params = SamplingParams(top_p=0.9, logprobs=20, repetition_penalty=1e-300)
    owners = [sequence(params, seed=i) for i in range(7)]
    owners[6] = sequence(SamplingParams(top_k=60, temperature=9))
    owners[4] = sequence(SamplingParams(min_tokens=1))
    owners[5] = sequence(SamplingParams(temperature=0, logprobs=3))
    wanted = by_cpu(logits, owners)
    assert [one is None for one in wanted] == [True, True, True, False, True, False, False]
    same(by_device(logits, owners), wanted)


def test_a_row_is_picked_alike_alone_and_in_chunks_of_any_size() -> None:
    logits = random_logits(3, seed=9)
    params = (
        SamplingParams(top_p=0.95, temperature=1.5),
        SamplingParams(top_k=30, frequency_penalty=1),
        SamplingParams(),
    )
    owners = [sequence(one, seed=i, generated=(5, 5)) for i, one in enumerate(params)]
    together = by_device(logits, owners)
    assert together == by_device(logits, owners, chunk=256)
    for row, owner in enumerate(owners):
        assert by_device(logits[row : row + 1], [owner]) == together[row : row + 1]


def test_tokens_that_only_the_device_knows_are_counted() -> None:
    """Steps launched one after the other, beside steps whose tokens the CPU knows."""
    params = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=1.1)
    owners = [sequence(params), sequence(SamplingParams(temperature=0)), sequence(params, seed=2)]
    logits = torch.zeros(3, VOCABULARY)
    logits[:, 8:20] = torch.linspace(4, 3, 12)
    sampler, steps = device_sampler(), 4
    made: list[list[int | None]] = []
    launched = pick(sampler, logits, [Draw(each, 0, i) for i, each in enumerate(owners)])
    flights = [launched]
    for step in range(1, steps):
        # The middle one has ended after two steps.
        rows = [0, 1, 2] if step < 3 else [0, 2]
        at = [0, 1, 2] if step < 4 else [0, 1]
        draws = [Draw(owners[row], step, row, at[row]) for row in rows]
        launched = pick(sampler, logits, draws, launched.tokens)
        flights.append(launched)
    made = [tokens(each.result()) for each in flights]
    known = [sequence(params), sequence(params, seed=2)]
    for step in range(steps):
        wanted = tokens(by_cpu(logits[:2], known))
        assert [made[step][0], made[step][-1]] == wanted
        for each, token in zip(known, wanted, strict=True):
            assert token is not None
            each.tokens.append(token)
    assert len(set(known[0].generated)) > 2
    # Now the CPU knows them, too; and one that was preempted is counted anew.
    sampler.release([owners[0]])
    owners[0].tokens.extend(known[0].generated)
    owners[2].tokens.extend(known[1].generated)
    draws = [Draw(owners[row], steps, row) for row in (0, 2)]
    assert tokens(pick(sampler, logits, draws).result()) == tokens(by_cpu(logits[:2], known))


def test_counts_take_memory_only_once_somebody_has_a_penalty() -> None:
    sampler = device_sampler()
    sampler.warm_up(torch.float32)
    logits = random_logits(1)
    plain, penalised = sequence(SamplingParams()), sequence(SamplingParams(presence_penalty=1))
    pick(sampler, logits, [Draw(plain, 0, 0)]).result()
    assert sampler._counts is None
    pick(sampler, logits, [Draw(penalised, 0, 0)]).result()
    assert sampler._counts is not None
    with pytest.raises(AssertionError, match="2 sequences"):
        sampler.check_integrity(idle=True)
    sampler.release([plain, penalised])
    sampler.release([plain])
    sampler.check_integrity(idle=True)

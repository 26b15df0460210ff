import dataclasses
import math
from collections.abc import Collection, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reft_runtime.engine import sampler
from reft_runtime.engine.sampler import SampleRow, has_penalties, noise, prompt_logprobs, sample
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.token_counts import TokenCounts
from tests.helpers.sampling import bits_of

EOS = 3


@pytest.fixture(scope="module", params=["compiled", "torch alone"], autouse=True)
def operators(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds with a compiler and without one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "compiled":
            patch.setattr(sampler, "cpu_operators", lambda: None)
        yield


def row(
    params: SamplingParams | None = None,
    *,
    seed: int = 1,
    choice: int = 0,
    prompt: tuple[int, ...] = (),
    generated: tuple[int, ...] = (),
    allowed: Collection[int] | None = None,
) -> SampleRow:
    bits = None if allowed is None else bits_of(allowed)
    params = params or SamplingParams()
    counts = None
    if has_penalties(params):
        counts = TokenCounts(len(prompt))
        counts.take([*prompt, *generated])
    return SampleRow(params, seed, choice, len(generated), counts, frozenset({EOS}), bits)


def tokens(logits: Tensor, rows: list[SampleRow]) -> list[int | None]:
    return [None if picked is None else picked.token for picked in sample(logits, rows)]


def random_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def reference(logits: Tensor, row: SampleRow) -> int | None:
    """The documented order of processing of one row [vocabulary], by sorting, in float64."""
    params, scores = row.params, logits.double().numpy().copy()
    ids = np.arange(len(scores))
    if row.allowed is not None:
        words = row.allowed.numpy()
        scores[words[ids // 32] >> ids % 32 & 1 == 0] = -math.inf
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if row.made < params.min_tokens and row.allowed is None:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else row.eos_ids)):
            scores[token] = -math.inf
    times = {} if row.counts is None else dict(zip(row.counts.ids, row.counts.times, strict=True))
    for token, count in times.items():
        scores[token] *= (
            params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
        )
        if count:
            scores[token] -= params.presence_penalty + params.frequency_penalty * count
    best = scores.max()
    if not math.isfinite(best):
        return None
    order = np.lexsort((ids, -scores))
    if params.temperature == 0:
        return int(order[0])
    weights = np.exp((scores - best) / params.temperature)
    order = order[weights[order] >= params.min_p][: params.top_k or None]
    before = weights[order].cumsum() - weights[order]
    kept = np.sort(order[before < params.top_p * weights[order].sum()])
    cumulated = weights[kept].cumsum()
    point = noise(row.seed, row.choice, row.made) * cumulated[-1]
    return int(kept[np.searchsorted(cumulated, point, side="right")])


class TestGreedy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_takes_the_best_token_and_the_lowest_id_of_equals(self, dtype: torch.dtype) -> None:
        logits = torch.zeros(2, 100, dtype=dtype)
        logits[0, 42] = 1
        logits[1, [7, 60]] = 2
        assert tokens(logits, [row(SamplingParams(temperature=0))] * 2) == [42, 7]

    def test_top_k_of_one_is_greedy_also_among_equals(self) -> None:
        logits = torch.zeros(1, 1000)
        logits[0, [500, 900]] = 1
        for seed in range(20):
            assert tokens(logits, [row(SamplingParams(top_k=1), seed=seed)]) == [500]

    def test_coldest_temperature_is_greedy(self) -> None:
        logits = random_logits(4, 500)
        cold = [row(SamplingParams(temperature=1e-300))] * 4
        assert tokens(logits, cold) == logits.argmax(-1).tolist()

    def test_leaves_the_logits_as_they_are(self) -> None:
        logits = random_logits(2, 50)
        before = logits.clone()
        sample(logits, [row(SamplingParams(temperature=0, logit_bias={1: 5})), row()])
        assert torch.equal(logits, before)

    def test_no_rows(self) -> None:
        assert sample(torch.empty(0, 50), []) == []


class TestAllowed:
    def test_a_token_is_drawn_as_if_there_were_no_others(self) -> None:
        logits = random_logits(60, 600)
        few = [5, 31, 32, 63, 64, 599]
        rows = [row(seed=i, allowed=few) for i in range(60)]
        among = [row(seed=i) for i in range(60)]
        assert tokens(logits, rows) == [few[token or 0] for token in tokens(logits[:, few], among)]

    def test_greedy_and_every_other_setting(self) -> None:
        logits = random_logits(3, 600)
        greedy = SamplingParams(temperature=0, logit_bias={40: 100, 41: 50})
        assert tokens(logits, [row(greedy, allowed=[3, 41])] * 3) == [41] * 3
        narrow = SamplingParams(top_k=1, min_p=0.5, top_p=0.1, repetition_penalty=5)
        one = row(narrow, prompt=(7,), generated=(7, 7), allowed=[7])
        assert tokens(logits, [one] * 3) == [7] * 3

    def test_the_end_is_put_off_by_who_made_the_bits(self) -> None:
        params = SamplingParams(min_tokens=9)
        assert tokens(random_logits(1, 600), [row(params, allowed=[EOS])]) == [EOS]

    def test_log_probabilities_are_the_models_own(self) -> None:
        logits = random_logits(1, 600)
        [picked] = sample(logits, [row(SamplingParams(logprobs=2), allowed=[9])])
        assert picked is not None
        assert picked.logprob is not None
        assert picked.logprob.logprob == pytest.approx(logits[0].log_softmax(-1)[9].item())
        assert picked.logprob.top[0][0] == logits[0].argmax().item()


class TestDraw:
    @given(
        params=st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1e-3, 0.3, 1.0, 1.7, 100.0]),
            top_k=st.sampled_from([0, 0, 1, 5, 300, 400, 10_000]),
            top_p=st.sampled_from([1.0, 1.0, 0.01, 0.5, 0.9, 0.999]),
            min_p=st.sampled_from([0.0, 0.0, 0.02, 0.5]),
            repetition_penalty=st.sampled_from([1.0, 1.5, 0.7]),
            presence_penalty=st.sampled_from([0.0, 1.5, -2.0]),
            frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
            logit_bias=st.sampled_from([{}, {0: 30.0}, {5: -100.0, 11: 2.5}]),
            stop_token_ids=st.sampled_from([(), (2,)]),
            min_tokens=st.sampled_from([0, 3]),
            ignore_eos=st.booleans(),
        ),
        seed=st.integers(-(2**63), 2**63 - 1),
        generated=st.sampled_from([(), (1, 1, 2), (4, 4, 4, 4)]),
        scale=st.sampled_from([0.01, 1.0, 4.0]),
        data=st.integers(0, 1000),
        kind=st.sampled_from(["any", "any", "equals", "half are -inf"]),
        allowed=st.sampled_from([None, None, range(5, 600, 7)]),
    )
    @settings(deadline=None, max_examples=300, derandomize=True)
    def test_is_what_the_plain_reference_draws(
        self,
        params: SamplingParams,
        seed: int,
        generated: tuple[int, ...],
        scale: float,
        data: int,
        kind: str,
        allowed: range | None,
    ) -> None:
        """The vocabulary is wider than the first look, so thresholds also need the second."""
        logits = random_logits(1, 600, data, scale)
        if kind == "equals":
            logits = logits.round()
        elif kind == "half are -inf":
            logits[0, 100:400] = -math.inf
        one = row(params, seed=seed, prompt=(8, 9), generated=generated, allowed=allowed)
        assert tokens(logits, [one]) == [reference(logits[0], one)]

    @pytest.mark.parametrize("vocabulary", [300, 20_000])
    def test_truncates_many_rows_as_each_alone(self, vocabulary: int) -> None:
        logits = random_logits(70, vocabulary)
        settings_ = [
            SamplingParams(top_p=0.9),
            SamplingParams(top_k=50, top_p=0.5),
            SamplingParams(temperature=50, top_p=0.99),
            SamplingParams(top_k=9000),
            SamplingParams(temperature=0),
            SamplingParams(),
            SamplingParams(temperature=0, logit_bias={17: 100}),
        ]
        rows = [row(settings_[i % 7], seed=i, choice=i % 3) for i in range(70)]
        together = tokens(logits, rows)
        assert together == [tokens(logits[i : i + 1], rows[i : i + 1])[0] for i in range(70)]
        order = torch.randperm(70, generator=torch.Generator().manual_seed(1)).tolist()
        assert tokens(logits[order], [rows[i] for i in order]) == [together[i] for i in order]
        assert together == [reference(line, one) for line, one in zip(logits, rows, strict=True)]

    @pytest.mark.parametrize("vocabulary", [1, 31, 49_152, 152_001])
    @pytest.mark.parametrize("kind", ["peaked", "flat", "equals", "half are -inf", "one in 500"])
    def test_vocabularies_of_any_size(
        self, vocabulary: int, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Settings whose thresholds lie among a few best tokens, and among most of all."""
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        settings_ = [
            SamplingParams(temperature=0.7, top_p=0.9),
            SamplingParams(temperature=1.3, top_p=0.99),
            SamplingParams(temperature=100, top_p=0.5),
            SamplingParams(temperature=1e-3, top_p=0.9999),
            SamplingParams(top_p=1e-9),
            SamplingParams(temperature=30, top_p=1 - 1e-6, min_p=0.7),
            SamplingParams(top_k=50, top_p=0.95),
            SamplingParams(temperature=5, top_k=30_000, top_p=0.8),
            SamplingParams(top_k=10**9),
        ]
        count = len(settings_)
        logits = random_logits(count, vocabulary, scale=0.7 if kind == "flat" else 4)
        if kind == "equals":
            logits = logits.round()
        elif kind == "half are -inf":
            logits[:, : vocabulary // 2] = -math.inf
        elif kind == "one in 500":
            logits[:, torch.arange(vocabulary) % 500 != 17 % vocabulary] = -math.inf
        rows = [row(params, seed=i) for i, params in enumerate(settings_)]
        wanted = [reference(line, one) for line, one in zip(logits, rows, strict=True)]
        assert tokens(logits, rows) == wanted
        # One row alone is shared among the threads.
        assert [tokens(logits[i : i + 1], rows[i : i + 1])[0] for i in range(count)] == wanted

    def test_follows_the_distribution(self) -> None:
        """Pearson's chi-square over 20,000 fixed seeds; 27.9 is the 0.1 % point for 9 degrees."""
        logits = random_logits(1, 10, scale=1.0)
        drawn = tokens(logits.expand(20_000, -1), [row(seed=seed) for seed in range(20_000)])
        expected = logits[0].softmax(-1) * 20_000
        counts = torch.tensor([drawn.count(token) for token in range(10)])
        assert ((counts - expected) ** 2 / expected).sum() < 27.9

    def test_top_p_follows_the_renormalised_distribution(self) -> None:
        logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
        rows = [row(SamplingParams(top_p=0.6), seed=seed) for seed in range(10_000)]
        drawn = tokens(logits.expand(10_000, -1), rows)
        assert set(drawn) == {0, 1}
        assert drawn.count(0) == pytest.approx(6667, abs=200)

    def test_equals_at_the_border_are_kept_by_lowest_id(self) -> None:
        rows = [row(SamplingParams(top_k=3), seed=seed) for seed in range(200)]
        assert set(tokens(torch.zeros(200, 1000), rows)) == {0, 1, 2}
        rows = [row(SamplingParams(top_p=0.004), seed=seed) for seed in range(200)]
        assert set(tokens(torch.zeros(200, 1000), rows)) == {0, 1, 2, 3}

    def test_masked_tokens_are_never_drawn(self) -> None:
        logits = torch.full((500, 64), -math.inf)
        logits[:, [0, 9, 63]] = 1.0
        for params in (SamplingParams(), SamplingParams(top_p=0.99), SamplingParams(top_k=60)):
            drawn = tokens(logits, [row(params, seed=seed) for seed in range(500)])
            assert set(drawn) == {0, 9, 63}

    @pytest.mark.parametrize(("point", "token"), [(0.0, 2), (1 - 2**-53, 5)])
    def test_ends_of_the_noise_fall_on_tokens_with_a_weight(
        self, monkeypatch: pytest.MonkeyPatch, point: float, token: int
    ) -> None:
        monkeypatch.setattr(sampler, "noise", lambda *_: point)
        logits = torch.full((1, 8), -math.inf)
        logits[0, 2:6] = torch.tensor([0.1, 0.2, 0.3, 0.4])
        assert tokens(logits, [row()]) == [token]


class TestNoise:
    def test_is_fixed(self) -> None:
        """Another value would change the answer that a seed gives."""
        assert noise(0, 0, 0) == 0.156742553465558
        assert noise(-(2**63), 127, 10**6) == 0.01621329264419402

    def test_each_of_seed_choice_and_step_matters(self) -> None:
        values = [
            noise(seed, choice, step) for seed in (0, 1, -1) for choice in (0, 1) for step in (0, 1)
        ]
        assert len(set(values)) == 12
        assert all(0 <= value < 1 for value in values)

    def test_choices_and_steps_draw_differently_and_repeat(self) -> None:
        logits = torch.zeros(1, 10_000)
        first = tokens(logits, [row(seed=5)])
        assert first == tokens(logits, [row(seed=5)])
        assert first != tokens(logits, [row(seed=5, choice=1)])
        assert first != tokens(logits, [row(seed=5, generated=(0,))])

    def test_is_the_same_in_every_dtype(self) -> None:
        logits = random_logits(50, 64).bfloat16()
        rows = [row(seed=seed) for seed in range(50)]
        assert tokens(logits, rows) == tokens(logits.float(), rows)


class TestEdits:
    def best(self, logits: list[float], params: SamplingParams, **context: tuple[int, ...]) -> int:
        greedy = dataclasses.replace(params, temperature=0)
        (token,) = tokens(torch.tensor([logits]), [row(greedy, **context)])  # type: ignore[arg-type]
        assert token is not None
        return token

    def test_repetition_divides_positive_and_multiplies_negative_of_prompt_and_answer(self) -> None:
        params = SamplingParams(repetition_penalty=2.0)
        assert self.best([4.0, 2.1, 1.9, 0], params, prompt=(0,)) == 1
        assert self.best([4.0, 1.9, 1.9, 0], params, prompt=(0,)) == 0
        assert self.best([4.0, 2.1, 1.9, 0], params, generated=(0, 0, 0)) == 1
        assert self.best([-1.0, -1.9, -5, -5], params, prompt=(0,)) == 1
        assert self.best([-1.0, -2.1, -5, -5], params, prompt=(0,)) == 0

    def test_presence_counts_once_and_only_the_answer(self) -> None:
        params = SamplingParams(presence_penalty=1.0)
        assert self.best([3.0, 2.1, 0, 0], params, generated=(0,)) == 1
        assert self.best([3.0, 1.9, 0, 0], params, generated=(0, 0, 0)) == 0
        assert self.best([3.0, 2.1, 0, 0], params, prompt=(0,)) == 0

    def test_frequency_counts_each_time_and_only_the_answer(self) -> None:
        params = SamplingParams(frequency_penalty=0.5)
        assert self.best([3.0, 1.9, 0, 0], params, generated=(0, 0)) == 0
        assert self.best([3.0, 1.9, 0, 0], params, generated=(0, 0, 0)) == 1
        assert self.best([3.0, 1.9, 0, 0], params, prompt=(0, 0, 0)) == 0

    def test_bias_adds(self) -> None:
        assert self.best([1.0, 0, 0, 0], SamplingParams(logit_bias={2: 1.5})) == 2
        assert self.best([1.0, 0, 0, 0], SamplingParams(logit_bias={0: -100})) == 1

    def test_min_tokens_bans_what_would_end_the_choice_until_then(self) -> None:
        logits = [1.0, 0, 3, 5]
        params = SamplingParams(min_tokens=2, stop_token_ids=(2,))
        assert self.best(logits, params, generated=(0,)) == 0
        assert self.best(logits, params, generated=(0, 0)) == EOS
        kept = dataclasses.replace(params, ignore_eos=True)
        assert self.best(logits, kept, generated=(0,)) == EOS

    def test_smallest_repetition_penalty_overflows_nothing(self) -> None:
        params = SamplingParams(
            repetition_penalty=1e-300, min_tokens=1, temperature=0, logit_bias={0: 5}
        )
        (picked,) = sample(torch.zeros(1, 8), [row(params, prompt=(0, EOS))])
        assert picked is not None
        assert picked.token == 0


class TestNotFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_only_that_row(self, value: float, temperature: float, dtype: torch.dtype) -> None:
        logits = random_logits(5, 400).to(dtype)
        rows = [
            row(SamplingParams(temperature=temperature, top_p=0.9, logprobs=2), seed=seed)
            for seed in range(5)
        ]
        clean = sample(logits, rows)
        logits[2, 399] = value
        assert sample(logits, rows) == [*clean[:2], None, *clean[3:]]

    def test_nothing_left(self) -> None:
        logits = torch.full((2, 4), -math.inf)
        logits[1, EOS] = 0
        banned = SamplingParams(min_tokens=1)
        assert sample(logits, [row(), row(banned)]) == [None, None]


class TestLogprobs:
    def test_are_the_models_before_any_processing(self) -> None:
        logits = random_logits(3, 50)
        exact = logits.double().log_softmax(-1)
        rows = [
            row(SamplingParams(temperature=0.5, top_k=3, logit_bias={1: 100.0}, logprobs=0)),
            row(SamplingParams(temperature=0)),
            row(SamplingParams(temperature=0, logprobs=5)),
        ]
        first, second, third = sample(logits, rows)
        assert first is not None
        assert first.logprob is not None
        assert first.token == first.logprob.token == 1
        assert first.logprob.logprob == pytest.approx(float(exact[0, 1]), abs=1e-5)
        assert first.logprob.top == ()
        assert second is not None
        assert second.logprob is None
        assert third is not None
        assert third.logprob is not None
        best = exact[2].topk(5)
        assert [token for token, _ in third.logprob.top] == best.indices.tolist()
        assert [value for _, value in third.logprob.top] == pytest.approx(
            best.values.tolist(), abs=1e-5
        )

    def test_of_the_prompt(self) -> None:
        logits = random_logits(40, 50).bfloat16()
        exact = logits.double().log_softmax(-1)
        logits[7, 3] = math.nan
        next_tokens = [i % 50 for i in range(40)]
        found = prompt_logprobs(logits, next_tokens, 2)
        assert found[7] is None
        for i, entry in enumerate(found):
            if entry is not None:
                assert entry.token == next_tokens[i]
                assert entry.logprob == pytest.approx(float(exact[i, next_tokens[i]]), abs=1e-4)
                assert len(entry.top) == 2
        assert sum(entry is None for entry in found) == 1

"""The compiled attention with windows, chunks, soft-capping and sinks, beside plain float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reft_runtime.base.attention import Scoring
from reft_runtime.kernels.cpu import HeadScoring, Kernels
from tests.helpers.attention import HEADS, SCORINGS, SINKS, attention, described

CAPACITY = 224
RUNS = [(0, 1), (63, 1), (130, 1), (0, 5), (0, 70), (130, 9), (60, 20)]
"""Of each row: tokens before, and tokens of the step."""

EVERYTHING = Scoring(0.1, 70, 65, 1.5, SINKS)


def check(
    operators: Kernels,
    scoring: Scoring,
    dims: tuple[int, int],
    kv_heads: int,
    *,
    prompts: bool,
    inside: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Runs of several rows in one call. What lies beyond a row's tokens may be anything."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    runs = [run for run in RUNS if (run[1] > 1) == prompts]
    tokens = sum(own for _, own in runs)
    query, key = random(tokens, HEADS, dims[0]), random(tokens, kv_heads, dims[0])
    value = key[..., : dims[1]] if inside else random(tokens, kv_heads, dims[1])
    numbers = kv_heads * (dims[0] + (0 if inside else dims[1]))
    rows = torch.full((len(runs), CAPACITY * numbers), math.nan, dtype=dtype)
    before = 0, 0 if inside else kv_heads * dims[0]
    places, wanted, first = [], [], 0
    for row, (start, own) in zip(rows, runs, strict=True):
        held = row[: CAPACITY * kv_heads * dims[0]].view(kv_heads, CAPACITY, -1)
        held_values = held[..., : dims[1]]
        if not inside:
            held_values = row[CAPACITY * before[1] :].view(kv_heads, CAPACITY, -1)
            held_values[:, :start] = random(kv_heads, start, dims[1])
        held[:, :start] = random(kv_heads, start, dims[0])
        step = slice(first, first + own)
        keys, values = (
            torch.cat([known[:, :start].transpose(0, 1), new[step]])
            for known, new in ((held, key), (held_values, value))
        )
        wanted.append(attention(query[step], keys, values, start, scoring))
        places.append((row.data_ptr(), CAPACITY, *((first, start, own) if prompts else (start,))))
        first += own
    out = query.new_empty(tokens, HEADS, dims[1])
    run = operators.attend_prompts if prompts else operators.attend
    run(
        query,
        key,
        value,
        out,
        torch.tensor(places),
        before,
        HeadScoring(
            scoring.scale(dims[0]),
            scoring.window or 0,
            scoring.chunk or 0,
            scoring.softcap or 0.0,
            scoring.sinks,
        ),
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), torch.cat(wanted), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scoring", SCORINGS, ids=described)
def test_decoding_tokens(operators: Kernels, scoring: Scoring) -> None:
    check(operators, scoring, (24, 16), 2, prompts=False)


@pytest.mark.parametrize("scoring", SCORINGS, ids=described)
def test_prompts(operators: Kernels, scoring: Scoring) -> None:
    check(operators, scoring, (16, 16), 2, prompts=True)


@pytest.mark.parametrize("scoring", SCORINGS, ids=described)
def test_prompts_in_bfloat16(operators: Kernels, scoring: Scoring) -> None:
    """By matrix tiles where the CPU has them and no score is capped."""
    check(operators, scoring, (64, 64), 2, prompts=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (256, 256), (192, 128)])
@pytest.mark.parametrize("prompts", [False, True], ids=["decode", "prompts"])
def test_widths(
    operators: Kernels, prompts: bool, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    check(operators, EVERYTHING, dims, 3, prompts=prompts, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompts", [False, True], ids=["decode", "prompts"])
@pytest.mark.parametrize("scoring", [Scoring(0.05), EVERYTHING], ids=described)
def test_values_that_are_the_first_numbers_of_keys(
    operators: Kernels, scoring: Scoring, prompts: bool, dtype: torch.dtype
) -> None:
    check(operators, scoring, (576, 512), 1, prompts=prompts, inside=True, dtype=dtype)


def test_scores_of_any_size_are_capped(operators: Kernels) -> None:
    """Where tanh is linear, where it is 1, and between."""
    sizes = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 0.24, 0.26, 0.5, 2.0, 9.0, 50.0, 1e4])
    sizes = torch.cat([-sizes, sizes])
    scores = torch.zeros(len(sizes), 1, 16)
    scores[:, 0, 0] = sizes
    values = torch.randn(len(sizes), 1, 16, generator=torch.Generator().manual_seed(0))
    query = torch.zeros(1, 1, 16)
    query[0, 0, 0] = 1
    last = len(sizes) - 1
    row = torch.cat([scores, values]).flatten()
    out = torch.empty(1, 1, 16)
    places = torch.tensor([(row.data_ptr(), len(sizes), last)])
    scoring = HeadScoring(1.0, softcap=1.0)
    operators.attend(query, scores[last:], values[last:], out, places, (0, 16), scoring)
    wanted = attention(query, scores, values, last, Scoring(1.0, softcap=1.0))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-6)

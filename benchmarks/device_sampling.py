"""Sampling on a CUDA device: decode steps by settings, and the sampler alone beside its bytes.

    python -m benchmarks.device_sampling --shape llama-3-8b --out docs/measurements/device.json

Steps are those of a model of random weights, whose distributions are flat: thresholds of top_p lie
among thousands of tokens. The sampler alone is also timed on peaked ones, as trained models give.
Its floor is the logits, read once, over the bandwidth of a copy.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.device import STEP, Bench, bandwidth, build, name_of, seconds
from benchmarks.measuring import Figures, measure, median, speed_ratio, table
from benchmarks.workload import random_tokens
from reft_runtime.engine.device import sampler_for
from reft_runtime.engine.device_sampler import DeviceSampler, Draw
from reft_runtime.engine.sampler import SampleRow, has_penalties, sample
from reft_runtime.loading.loader import choose_device, choose_dtype
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import Sequence

GREEDY = "greedy"
CASES: dict[str, list[dict[str, Any]]] = {
    GREEDY: [{"temperature": 0}],
    "temperature 1": [{"temperature": 1}],
    "temperature 0.7, top_p 0.9": [{"temperature": 0.7, "top_p": 0.9}],
    "top_k 50": [{"top_k": 50}],
    "repetition_penalty 1.1": [{"repetition_penalty": 1.1}],
    "logprobs 5": [{"temperature": 0, "logprobs": 5}],
    "all of them": [
        {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "logprobs": 5}
    ],
    "temperature 1.3, top_p 0.99": [{"temperature": 1.3, "top_p": 0.99}],
}
CASES["each row its own"] = [settings for (settings,) in CASES.values()]

MADE = 32
"""The sampler alone is given rows of this many prompt tokens and as many generated ones."""
FLAT, PEAKED = "flat", "peaked"
WIDTHS = {FLAT: 1.3, PEAKED: 4.0}
"""The standard deviations of the random logits."""
LAUNCH = "launch"


def alone(
    logits: Tensor, settings: list[dict[str, Any]], sampler: DeviceSampler | None
) -> Callable[[int], Figures]:
    """A case of one step's sampling, a row for each row of logits; a launch is the CPU's share."""
    rng = random.Random(0)
    owners = []
    for i in range(len(logits)):
        tokens = random_tokens(rng, logits.shape[1], 2 * MADE)
        params = SamplingParams(**settings[i % len(settings)])
        owners.append(Sequence(Request("", tuple(tokens[:MADE]), params, i), 0, i, tokens))
    launches: list[float] = []

    def run() -> None:
        begin = time.perf_counter()
        if sampler is None:
            sample(logits, [_row(each) for each in owners])
        else:
            sampler.pick(logits, [Draw(each, MADE, row) for row, each in enumerate(owners)])
        launches.append(time.perf_counter() - begin)

    def case(number: int) -> Figures:
        launches.clear()
        took = seconds(run, logits.device)
        if sampler is not None:
            sampler.release(owners)
        return {"seconds": took, LAUNCH: sorted(launches)[len(launches) // 2]}

    return case


def _row(owner: Sequence) -> SampleRow:
    request = owner.request
    counts = owner.counts() if has_penalties(request.sampling) else None
    return SampleRow(request.sampling, request.seed, 0, owner.generated_length, counts, frozenset())


def main(
    shape: Annotated[str, typer.Option(help="As for benchmarks.device.")] = "llama-3-8b",
    device: Annotated[str, typer.Option(help="As for `reft serve`.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="As for `reft serve`.")] = "auto",
    concurrency: Annotated[
        str, typer.Option(help="Numbers of rows at once, comma-separated.")
    ] = "1,32,256",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[bool, typer.Option(help="Measure a model's decode steps, too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures here.")] = None,
) -> None:
    """Print the tables of the sampler alone and of decode steps."""
    place = choose_device(device)
    loaded = build(shape, place, choose_dtype(dtype, place))
    counts = [int(n) for n in concurrency.split(",")]
    speed = bandwidth(place)
    key: dict[str, str | int] = {"benchmark": "device sampling", "shape": shape}
    key["device"] = name_of(place)
    key["dtype"] = str(loaded.dtype).removeprefix("torch.")
    print(f"{shape}, {loaded.dtype} on {name_of(place)}: copies {speed / 1e12:.2f} TB/s")

    sampler = sampler_for(loaded, max(counts))
    rows: list[tuple[object, ...]] = []
    for n in counts:
        floor = n * loaded.vocab_size * loaded.dtype.itemsize / speed
        taken = {}
        for kind, width in WIDTHS.items():
            torch.manual_seed(0)
            logits = width * torch.randn(n, loaded.vocab_size, device=place)
            logits = logits.to(loaded.dtype)
            cases = {label: alone(logits, own, sampler) for label, own in CASES.items()}
            taken[kind] = measure(cases, rounds, {**key, "n": n, "logits": kind}, out)
        for label in CASES:
            flat, peaked = (median(taken[kind], label) for kind in (FLAT, PEAKED))
            launch = median(taken[FLAT], label, LAUNCH)
            times = (round(1e6 * each) for each in (launch, flat, peaked))
            rows.append((n, label, *times, round(flat / floor, 1), round(peaked / floor, 1)))
    header = ("n", "case", "launch, us", "flat, us", "peaked, us", "flat / floor", "peaked / floor")
    print(f"\nThe sampler alone:\n\n{table(header, rows)}")

    if not steps:
        return
    bench = Bench(loaded, max(counts))
    rows = []
    for n in counts:
        cases = {label: bench.case(n, [()], settings=own) for label, own in CASES.items()}
        found = measure(cases, rounds, {**key, "n": n, "logits": "of steps"}, out)
        for label in CASES:
            step = median(found, label, STEP)
            ratio = "" if label == GREEDY else speed_ratio(found, label, GREEDY, STEP)
            rows.append((n, label, round(1000 * step, 2), ratio))
    print(f"\nDecode steps:\n\n{table(('n', 'case', 'step, ms', 'over greedy'), rows)}")


if __name__ == "__main__":
    typer.run(main)

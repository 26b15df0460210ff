"""Decoding while other processes want the same cores: as the engine does it, and by fixed threads.

    python -m benchmarks.busy_cores --rounds 3

One process for each core counts without a pause. Eight streams are decoded by an engine that
chooses its threads, by one that has one thread, and by one with a thread for each core, which does
not change that. Each has the process for itself: with several, the OpenMP runtime would count their
threads together, and let them wait in another way. The first seconds count, in which the engine
notices the others.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measuring import SECONDS, Case, Figures, measure, median, speed_ratio, table
from benchmarks.workload import random_tokens
from reft_runtime import Engine, SamplingParams
from reft_runtime.machine.cores import usable_cores

STREAMS = 8
PROMPT_TOKENS, ANSWER_TOKENS = 16, 256
FEW = 24
"""Tokens where each takes ten times as long."""

CHOSEN, ONE, ALL = "chosen", "one thread", "a thread for each core"


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that compute without a pause, for the time of the block."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_count, daemon=True) for _ in range(count)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()


def _count() -> None:
    number = 0
    while True:
        number += 1


def case(dtype: str, threads: int | None, tokens: int) -> Case:
    """Seconds that a token of all streams takes, on an engine that is closed behind each run."""

    def run(number: int) -> Figures:
        torch.set_num_threads(usable_cores())  # the engine before may have had one
        rng = random.Random(number)
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        with Engine("demo", dtype=dtype, threads=threads, prefix_cache=False) as engine:
            prompts = [
                random_tokens(rng, engine.info.vocab_size, PROMPT_TOKENS) for _ in range(STREAMS)
            ]
            start = time.perf_counter()
            engine.generate(prompts, sampling, progress=False)
            return {SECONDS: (time.perf_counter() - start) / tokens}

    return run


def main(
    dtype: Annotated[str, typer.Option(help="Number format.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures in this file.")] = None,
) -> None:
    """Print tokens per second beside busy neighbours, and over one thread."""
    cores = usable_cores()
    cases = {
        CHOSEN: case(dtype, None, ANSWER_TOKENS),
        ONE: case(dtype, 1, ANSWER_TOKENS),
        ALL: case(dtype, cores, FEW),
    }
    with neighbours(cores):
        setting: dict[str, str | int] = {"benchmark": "busy cores", "dtype": dtype}
        taken = measure(cases, rounds, setting, out)
    rows = [
        (
            label,
            round(STREAMS / median(taken, label)),
            "" if label == ONE else speed_ratio(taken, label, ONE),
        )
        for label in cases
    ]
    print(table(("threads", "tokens/s", "over one thread"), rows))


if __name__ == "__main__":
    typer.run(main)

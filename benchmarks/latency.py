"""What streams feel of a long prompt: time between tokens of 16 streams before and while it comes.

A round lets the streams decode alone, then sends one prompt of 2,000 random tokens and takes the
gaps between the streams' tokens up to the first that follow its own first token. The ratio is that
of the two 95th percentiles of the same round. In process, on the engine's own event loop.

    python -m benchmarks.latency --dtypes float32,bfloat16 --rounds 7
"""

from __future__ import annotations

import asyncio
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measuring import SECONDS, Case, Figures, interval, measure, median, table
from benchmarks.workload import percentile, random_tokens
from reft_runtime import Engine, SamplingParams

STREAMS = 16
STREAM_PROMPT_TOKENS = 64
LONG_PROMPT_TOKENS = 2000
ALONE_TOKENS = 48
"""Every stream has this many tokens before the long prompt comes."""
SETTLING_TOKENS = 4
"""The first tokens of a stream, which come with other streams' prompts, are not counted."""

ALONE, BESIDE = "gap_p95_alone", "gap_p95_beside"


def long_prompt_among_streams(engine: Engine) -> Case:
    """A case: seconds to the long prompt's first token, and the streams' gaps before and then."""
    vocabulary, length = engine.info.vocab_size, engine.info.max_model_len

    async def run(number: int) -> Figures:
        rng = random.Random(f"latency {number}")  # new to every prefix cache
        stamps: list[list[float]] = [[] for _ in range(STREAMS)]
        warm = asyncio.Event()

        async def tokens_of(prompt_tokens: int, answer: int, into: list[float]) -> None:
            prompt = random_tokens(rng, vocabulary, prompt_tokens)
            sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
            stream = await engine.open(prompt, sampling)
            try:
                async for deltas in stream:
                    into += [time.perf_counter()] * sum(len(delta.tokens) for delta in deltas)
                    if all(
                        len(times) >= ALONE_TOKENS and times[-1] > times[SETTLING_TOKENS]
                        for times in stamps
                    ):
                        warm.set()
            finally:
                stream.abort()

        longest = length - STREAM_PROMPT_TOKENS
        streams = [
            asyncio.create_task(tokens_of(STREAM_PROMPT_TOKENS, longest, times)) for times in stamps
        ]
        await warm.wait()
        sent, first = time.perf_counter(), list[float]()
        await tokens_of(LONG_PROMPT_TOKENS, 1, first)
        while any(
            times[-1] < first[0] and not stream.done()
            for times, stream in zip(stamps, streams, strict=True)
        ):  # the gap in which it came ends with the streams' next tokens
            await asyncio.sleep(0.001)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        while engine.stats().running:
            await asyncio.sleep(0.01)
        alone, beside = [], []
        for times in stamps:
            for before, now in pairwise(times[SETTLING_TOKENS:]):
                if before == now:
                    continue  # tokens that came together
                if now <= sent:
                    alone.append(now - before)
                elif before < first[0]:  # a short prompt may take part in one step alone
                    beside.append(now - before)
        return {
            SECONDS: first[0] - sent,
            ALONE: percentile(alone, 95),
            BESIDE: percentile(beside, 95),
        }

    return lambda number: asyncio.run(run(number))


def main(
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    dtypes: Annotated[
        str, typer.Option(help="Number formats, comma-separated.")
    ] = "float32,bfloat16",
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[
        Path | None, typer.Option(help="Keep the raw figures in this JSON file.")
    ] = None,
) -> None:
    """Print the 95th percentiles in milliseconds, their ratio, and the time to the first token."""
    lines = []
    label = "long prompt among streams"
    for dtype in dtypes.split(","):
        with Engine(model, dtype=dtype, max_running=2 * STREAMS) as engine:
            setting = {"benchmark": "latency", "model": engine.info.model, "dtype": dtype}
            cases = {label: long_prompt_among_streams(engine)}
            taken = measure(cases, rounds, setting, out)
        ratio = interval([found[label][BESIDE] / found[label][ALONE] for found in taken])
        alone, beside = (round(1000 * median(taken, label, figure)) for figure in (ALONE, BESIDE))
        lines.append((dtype, alone, beside, ratio, f"{median(taken, label):.1f}"))
    print(
        f"{STREAMS} streams, a prompt of {LONG_PROMPT_TOKENS} tokens; "
        f"{torch.get_num_threads()} threads, {rounds} rounds"
    )
    header = ("dtype", "p95 alone, ms", "p95 beside, ms", "ratio", "prompt's first token, s")
    print(table(header, lines))


if __name__ == "__main__":
    typer.run(main)

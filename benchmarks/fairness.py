"""What one tenant feels of another's flood: 500 requests at once beside one request a second.

    python -m benchmarks.fairness --rounds 3 --out docs/measurements/fairness.json

In every case tenant B sends one request a second. Idle: nobody else sends. Equal, double: tenant A
sent 500 requests at once just before, and B's weight is 1 or 2, A's 1. One tenant: the same flood
without tenants, so first come first served. A case ends with B's last answer. Printed are B's times
over the idle ones of the same round, and the flood's tokens a second. In process, on the engine's
own event loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measuring import SECONDS, Case, Figures, Ratio, interval, measure, median, table
from benchmarks.workload import percentile, random_tokens
from reft_runtime import Engine, SamplingParams
from reft_runtime.caller import ANYONE, Caller

FLOOD = 500
PROMPTS = (32, 64)
ANSWER_TOKENS = 32
EVERY_SECONDS = 1.0
FIRST, TOTAL = "first", "total"
"""Seconds to the first token, and of the whole request."""
FLOOD_TOKENS = "flood_tokens_per_second"

IDLE, EQUAL, DOUBLE, ONE = (
    "idle",
    "flood, equal weight",
    "flood, double weight",
    "flood, one tenant",
)
A = Caller("a")
CALLERS: dict[str, tuple[Caller | None, Caller]] = {
    IDLE: (None, Caller("b")),
    EQUAL: (A, Caller("b")),
    DOUBLE: (A, Caller("b", weight=2)),
    ONE: (ANYONE, ANYONE),
}
"""Who floods, if anyone does, and who sends one request a second, by case."""


def beside(engine: Engine, label: str, requests: int) -> Case:
    """A case: B's times, medians and 95th percentiles, and the flood's speed."""
    vocabulary = engine.info.vocab_size
    flooding, steady = CALLERS[label]
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)

    async def run(number: int) -> Figures:
        rng = random.Random(f"fairness {label} {number}")  # new to every prefix cache
        made = 0

        async def request(caller: Caller, times: dict[str, list[float]] | None) -> None:
            nonlocal made
            prompt = random_tokens(rng, vocabulary, rng.randint(*PROMPTS))
            sent = time.perf_counter()
            stream = await engine.open(prompt, sampling, caller=caller)
            first = None
            try:
                async for deltas in stream:
                    first = first or time.perf_counter()
                    if times is None:
                        made += sum(len(delta.tokens) for delta in deltas)
            finally:
                stream.abort()
            if times is not None and first is not None:
                times[FIRST].append(first - sent)
                times[TOTAL].append(time.perf_counter() - sent)

        flood = (
            []
            if flooding is None
            else [
                asyncio.create_task(request(flooding, None))
                for _ in range(FLOOD if number else FLOOD // 8)
            ]
        )
        while flood and not made:
            await asyncio.sleep(0.01)
        times: dict[str, list[float]] = {FIRST: [], TOTAL: []}
        began, made = time.perf_counter(), 0
        sent = []
        for index in range(requests if number else 3):
            await asyncio.sleep(max(0.0, began + index * EVERY_SECONDS - time.perf_counter()))
            sent.append(asyncio.create_task(request(steady, times)))
        await asyncio.gather(*sent)
        seconds = time.perf_counter() - began
        speed = made / seconds
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        while engine.stats().running:
            await asyncio.sleep(0.01)
        return {
            SECONDS: seconds,
            FLOOD_TOKENS: speed,
            **{
                f"{what}_p{percent}": percentile(taken, percent)
                for what, taken in times.items()
                for percent in (50, 95)
            },
        }

    return lambda number: asyncio.run(run(number))


def main(
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    dtype: Annotated[str, typer.Option(help="As for `reft serve`.")] = "auto",
    max_running: Annotated[int | None, typer.Option(help="As for `reft serve`.")] = None,
    threads: Annotated[int | None, typer.Option(help="As for `reft serve`.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of B in a case.")] = 20,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Keep the raw figures in this JSON file.")
    ] = None,
) -> None:
    """Print B's 50th and 95th percentiles, over the idle ones, and the flood's speed."""
    with Engine(model, dtype=dtype, max_running=max_running, threads=threads) as engine:
        setting: dict[str, str | int] = {
            "benchmark": "fairness",
            "model": engine.info.model,
            "dtype": engine.info.dtype,
            "max_running": engine.info.max_running,
            "threads": engine.info.threads,
            "requests": requests,
        }
        cases = {label: beside(engine, label, requests) for label in CALLERS}
        taken = measure(cases, rounds, setting, out)

    def over_idle(label: str, figure: str) -> Ratio:
        return interval([found[label][figure] / found[IDLE][figure] for found in taken])

    rows: list[list[object]] = []
    for label in CALLERS:
        row: list[object] = [label]
        for what in (FIRST, TOTAL):
            row += [round(1000 * median(taken, label, f"{what}_p{p}")) for p in (50, 95)]
            row.append("" if label == IDLE else over_idle(label, f"{what}_p95"))
        rows.append([*row, round(median(taken, label, FLOOD_TOKENS)) if label != IDLE else ""])
    header = ("B beside", "first p50, ms", "p95", "over idle", "whole p50, ms", "p95", "over idle")
    print(table((*header, "flood, tokens/s"), rows))


if __name__ == "__main__":
    typer.run(main)

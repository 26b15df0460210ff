"""Whole runs, side by side: this project, its peers, and the floor.

Closed: n prompts of 64 random tokens at once, each answered by 64 tokens, prefill included.
Mixed: 48 requests that arrive at random, prompts of 16 to 1,024 and answers of 8 to 256 tokens.
A machine's speed drifts, so compare the ratios, not the absolute figures. README.md in this folder
says more.

    python -m benchmarks.throughput --dtypes bfloat16 --concurrency 8 --rounds 3 --cases base,floor
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measuring import (
    Round,
    Setting,
    measure,
    median,
    recorded,
    speed_ratio,
    table,
)
from benchmarks.shapes import SHAPES, checkpoint
from benchmarks.testbed import Testbed
from benchmarks.throughput_cases import BASE, CLOSED, MIXED, ThroughputCase
from benchmarks.workload import ANSWER_TOKENS, MIXED_REQUESTS, PAPER, mixed

Row = Sequence[object]

CLOSED_HEADER = ("dtype", "n", "case", "tokens/s", "over base", "base over it", "n tasks over it")
MIXED_HEADER = (
    *("dtype", "case", "tokens/s", "first token", "p95", "between tokens, p95"),
    *("over base", "base over it"),
)


def closed_rows(
    dtype: str, n: int, shown: Sequence[ThroughputCase], rounds: list[Round]
) -> list[Row]:
    """Our own cases are compared with our base; our base and the paper's setting with peers."""
    labels = [one.label for one in shown]
    rows: list[Row] = []
    for one in shown:
        label = one.label
        rate = round(n * ANSWER_TOKENS / median(rounds, label))
        ratios: list[object] = ["", "", ""]
        if one.ours:
            ratios[0] = "" if label == BASE else speed_ratio(rounds, label, BASE)
        else:
            ratios[1] = speed_ratio(rounds, BASE, label)
            if PAPER in labels:
                ratios[2] = speed_ratio(rounds, PAPER, label)
        rows.append((dtype, n, label, rate, *ratios))
    return rows


def mixed_rows(dtype: str, shown: Sequence[ThroughputCase], rounds: list[Round]) -> list[Row]:
    """The lines of the mixed table; times are in seconds."""
    tokens = sum(mixed(1, "")["answers"])
    rows: list[Row] = []
    for one in shown:
        label = one.label
        times = [
            f"{median(rounds, label, figure):.2f}"
            for figure in ("ttft_median", "ttft_p95", "gap_p95")
        ]
        ratios: list[object] = ["", ""]
        if one.ours:
            ratios[0] = "" if label == BASE else speed_ratio(rounds, label, BASE)
        else:
            ratios[1] = speed_ratio(rounds, BASE, label)
        rows.append((dtype, label, round(tokens / median(rounds, label)), *times, *ratios))
    return rows


def main(
    model: Annotated[
        str, typer.Option(help=f"demo, a folder, or random weights: {', '.join(SHAPES)}.")
    ] = "demo",
    dtypes: Annotated[
        str, typer.Option(help="Number formats, comma-separated.")
    ] = "float32,bfloat16",
    concurrency: Annotated[
        str, typer.Option(help="Numbers of requests at once, comma-separated.")
    ] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    cases: Annotated[
        str, typer.Option(help="Measure the cases whose labels hold one of these, comma-separated.")
    ] = "",
    mix: Annotated[bool, typer.Option(help="Measure the mixed workload too.")] = True,
    vllm: Annotated[Path | None, typer.Option(help="Python of vLLM's environment.")] = None,
    peers: Annotated[Path | None, typer.Option(help="Python of PEFT's and pyreft's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep the raw figures here; what is there is not repeated.")
    ] = None,
) -> None:
    """Print medians in generated tokens per second, and ratios within rounds."""
    path = str(checkpoint(model))
    pythons = {None: Path(sys.executable), "vllm": vllm, "peers": peers}

    def chosen(known: Sequence[ThroughputCase], n: int | None = None) -> list[ThroughputCase]:
        return [
            one
            for one in known
            if one.label == BASE
            or (
                any(part in one.label for part in cases.split(","))
                and pythons[one.environment] is not None
                and (n is None or one.least <= n <= (one.most or n))
            )
        ]

    def run(
        testbed: Testbed, setting: Setting, shown: Sequence[ThroughputCase], n: int
    ) -> list[Round]:
        labels = [one.label for one in shown]
        key = {"benchmark": "throughput", "model": model, "dtype": testbed.dtype, **setting}
        print(f"{testbed.dtype} {setting}", file=sys.stderr, flush=True)
        done = recorded(out, key, labels)
        if len(done) >= rounds:
            return done[:rounds]
        started = {c.label: c.start(testbed, c.label, n) for c in shown}
        return measure(started, rounds, key, out)

    closed_table: list[Row] = []
    mixed_table: list[Row] = []
    for dtype in dtypes.split(","):
        with Testbed(path, dtype, pythons) as testbed:
            for n in map(int, concurrency.split(",")):
                shown = chosen(CLOSED, n)
                closed_table += closed_rows(
                    dtype, n, shown, run(testbed, {"workload": "closed", "n": n}, shown, n)
                )
            if mix:
                shown = chosen(MIXED)
                mixed_table += mixed_rows(
                    dtype, shown, run(testbed, {"workload": "mixed"}, shown, MIXED_REQUESTS)
                )
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {rounds} rounds\n")
    print(table(CLOSED_HEADER, closed_table))
    if mix:
        print(f"\n{table(MIXED_HEADER, mixed_table)}")


if __name__ == "__main__":
    typer.run(main)

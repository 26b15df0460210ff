"""What streams feel of their neighbours: 10,000 files, listings, pages, metrics, a long trace.

    python -m benchmarks.neighbours --out build/neighbours.json

A server with that many files in its folder streams 16 answers at a time. Printed is by how much
each stream's longest gap between tokens exceeds its median gap, the worst of all streams and the
median of all, in a quiet round and beside each kind of neighbour, which a process of its own asks
for without a pause.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.measuring import machine, table
from benchmarks.serving import served
from benchmarks.workload import random_intervention, random_tokens
from reft_runtime.interventions import BaseShape

STREAMS = 16
PROMPT_TOKENS = 64
ANSWER_TOKENS = 128
TRACED = "traced"
TRACED_TOKENS = 8_000
QUIET = "quiet"

Ask = Callable[[httpx.Client, str, int], None]


def _listings(client: httpx.Client, model: str, vocabulary: int) -> None:
    client.get("/v1/interventions").raise_for_status()
    client.get("/v1/models").raise_for_status()


def _pages(client: httpx.Client, model: str, vocabulary: int) -> None:
    for query in ("limit=100", "limit=100&q=task-77", "limit=100&sort=-requests"):
        client.get(f"/v1/interventions?{query}").raise_for_status()


def _stats(client: httpx.Client, model: str, vocabulary: int) -> None:
    client.get("/v1/stats").raise_for_status()


def _metrics(client: httpx.Client, model: str, vocabulary: int) -> None:
    client.get("/metrics").raise_for_status()


def _trace(client: httpx.Client, model: str, vocabulary: int) -> None:
    prompt = random_tokens(random.Random(), vocabulary, TRACED_TOKENS)
    body = {"model": TRACED, "prompt": prompt, "max_tokens": 1, "trace": True}
    client.post("/v1/completions", json=body).raise_for_status()


NEIGHBOURS: dict[str, Ask] = {
    "listings": _listings,
    "pages": _pages,
    "stats": _stats,
    "metrics": _metrics,
    "a trace": _trace,
}


def files(folder: Path, base: BaseShape, count: int) -> None:
    """Write `count` small interventions, and one that edits all tokens in two layers."""
    layer = base.num_layers // 2
    for number in range(count):
        (folder / f"task-{number}.safetensors").write_bytes(
            random_intervention(base, [layer], 1, "l1")
        )
    traced = random_intervention(base, [layer, layer + 1], 1, "all")
    (folder / f"{TRACED}.safetensors").write_bytes(traced)


async def gaps(url: str, model: str, vocabulary: int) -> list[list[float]]:
    """Seconds between the tokens of each of the streams, which all begin together."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def stream() -> list[float]:
            prompt = random_tokens(random.Random(), vocabulary, PROMPT_TOKENS)
            body = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "stream": True}
            body["ignore_eos"] = True
            stamps = []
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        stamps.append(time.perf_counter())
            return [b - a for a, b in pairwise(stamps)]

        return await asyncio.gather(*(stream() for _ in range(STREAMS)))


def _without_a_pause(kind: str, url: str, model: str, vocabulary: int) -> None:
    with httpx.Client(base_url=url, timeout=600) as client:
        while True:
            NEIGHBOURS[kind](client, model, vocabulary)


def worst(found: list[list[float]]) -> list[float]:
    """The longest gap of each stream over its median gap, apart from those beside prompts."""
    steady = [each[STREAMS:] for each in found]
    return [max(each) / statistics.median(each) for each in steady]


def main(
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    dtype: Annotated[str, typer.Option(help="As for `reft serve`.")] = "auto",
    count: Annotated[int, typer.Option(min=1, help="Files registered.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures here.")] = None,
) -> None:
    """Print by how much gaps grow beside each neighbour."""
    from reft_runtime import Engine

    with Engine(model, dtype=dtype) as engine:
        base, vocabulary = engine.registry.base, engine.info.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        files(Path(folder), base, count)
        taken: dict[str, list[list[float]]] = {}
        with served(model, dtype, {"interventions": folder}) as server:
            for _ in range(rounds):
                for kind in (QUIET, *NEIGHBOURS):
                    arguments = (kind, server.url, base.model, vocabulary)
                    beside = multiprocessing.Process(target=_without_a_pause, args=arguments)
                    if kind != QUIET:
                        beside.start()
                    found = asyncio.run(gaps(server.url, base.model, vocabulary))
                    if kind != QUIET:
                        beside.kill()
                        beside.join()
                    taken.setdefault(kind, []).append(worst(found))
    rows = []
    for kind, every in taken.items():
        ratios = [ratio for one in every for ratio in one]
        rows.append((kind, round(max(ratios), 2), round(statistics.median(ratios), 2)))
    print(table(("beside", "worst stream", "median stream"), rows))
    if out is not None:
        found_here: dict[str, Any] = {**machine(), "files": count, "model": base.model}
        out.write_text(json.dumps({**found_here, "longest over median gap": taken}) + "\n")


if __name__ == "__main__":
    typer.run(main)

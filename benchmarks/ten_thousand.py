"""Ten thousand interventions: the start, memory, streams that use all of them, a name replaced.

    python -m benchmarks.ten_thousand FOLDER --out build/ten_thousand.json

FOLDER gets the files (all layers, rank 4; some 6 GB for 10,000) unless it has them; delete it
afterwards. Printed is how long the start takes beside the model's load, the memory beyond the
model, the throughput of 32 streams that use all interventions over that of one, how much later the
first token of a cold one comes, and what streams of a name that is being replaced feel.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.measuring import SECONDS, Figures, Setting, interval, machine, measure, table
from benchmarks.workload import percentile, random_tokens
from reft_runtime import Engine, SamplingParams, Use, base_shape
from reft_runtime.front import engine as front
from reft_runtime.interventions import BaseShape, Edit, Intervention, Registry, serialise

STREAMS = 32
PROMPT_TOKENS = 32
ANSWER_TOKENS = 32
REQUESTS = 128
HOT = "hot"
UPLOADS, UPLOAD_RANK = 1_000, 36
"""Uploads of all layers and this rank, which are 5 MB for the demo model."""
REPLACEMENTS = 200
PAUSE = 0.4
"""Seconds between two replacements."""
RANK = 4


class Part(StrEnum):
    """What is measured."""

    MEMORY = "memory"
    SPEED = "speed"
    REPLACE = "replace"
    ALL = "all"


def drafts(base: BaseShape, rank: int, count: int, size: float = 0.02) -> Iterator[bytes]:
    """Files of all layers with the same directions, and biases of this size that differ."""
    d = base.hidden_size
    R = torch.linalg.qr(torch.randn(d, rank)).Q.contiguous()
    W = torch.randn(rank, d) * 0.02
    one = Intervention.build(
        base,
        [
            Edit(layer, "l1", {"W": W, "R": R, "b": torch.zeros(rank)})
            for layer in range(base.num_layers)
        ],
    )
    for _ in range(count):
        biases = {n: torch.randn(rank) * size for n in one.tensors if n.endswith(".b")}
        yield serialise(Intervention(one.manifest, {**one.tensors, **biases}))


def write_files(folder: Path, base: BaseShape, count: int) -> None:
    """Fill a folder with the files of `count` tasks, and of one that is hot."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.iterdir())) == count + 1:
        return
    names = [HOT, *(f"task-{number}" for number in range(count))]
    for name, data in zip(names, drafts(base, RANK, len(names)), strict=True):
        (folder / f"{name}.safetensors").write_bytes(data)


def resident() -> float:
    """Memory of this process, in MB."""
    gc.collect()
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


class Timed(Registry):
    """A registry that tells what making it took: seconds, and MB of memory."""

    seconds = 0.0
    memory = 0.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        before, began = resident(), time.perf_counter()
        super().__init__(*arguments, **options)
        Timed.seconds = time.perf_counter() - began
        Timed.memory = resident() - before


async def ask(
    engine: Engine, name: str, prompt: Sequence[int], tokens: int
) -> tuple[float, list[int]]:
    """Seconds to the first token of a greedy answer, and its tokens."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    began, first, made = time.perf_counter(), 0.0, list[int]()
    async for deltas in await engine.open(prompt, sampling, [Use(name)]):
        first = first or time.perf_counter() - began
        made += [token for delta in deltas for token in delta.tokens]
    return first, made


async def streams(
    engine: Engine, names: Sequence[str], tokens: int, seed: int
) -> tuple[float, list[float]]:
    """Seconds that answers take, 32 at a time, and those to each first token."""
    rng = random.Random(seed)
    prompts = [random_tokens(rng, engine.info.vocab_size, PROMPT_TOKENS) for _ in names]
    todo = iter(zip(names, prompts, strict=True))
    firsts: list[float] = []

    async def stream() -> None:
        for name, prompt in todo:
            firsts.append((await ask(engine, name, prompt, tokens))[0])

    began = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(STREAMS)))
    return time.perf_counter() - began, firsts


def loaded(engine: Engine, count: int, rounds: int, out: Path | None) -> dict[str, object]:
    """Throughput of random use over that of one hot task, by round; times to first token."""

    def case(choose: Callable[[random.Random], str]) -> Callable[[int], Figures]:
        def run(number: int) -> Figures:
            rng = random.Random(number)
            names = [choose(rng) for _ in range(REQUESTS if number else STREAMS)]
            seconds, firsts = asyncio.run(streams(engine, names, ANSWER_TOKENS, number))
            return {SECONDS: seconds, "ttft_p95": percentile(firsts, 95)}

        return run

    cases = {HOT: case(lambda _: HOT), "random": case(lambda r: f"task-{r.randrange(count)}")}
    setting: Setting = {"table": "ten thousand", "files": count, "requests": REQUESTS}
    taken = measure(cases, rounds, setting, out)
    ratios = [one[HOT][SECONDS] / one["random"][SECONDS] for one in taken]
    later = [one["random"]["ttft_p95"] - one[HOT]["ttft_p95"] for one in taken]
    return {
        "throughput of random use over one hot task": str(interval(ratios)),
        "first token of 32 streams, p95, ms later": round(1000 * sorted(later)[len(later) // 2]),
    }


async def cold(engine: Engine, names: Sequence[str]) -> dict[str, object]:
    """By how much the first token comes later of a task that is not in memory, one at a time."""
    rng = random.Random(0)
    times: dict[str, list[float]] = {HOT: [], "cold": []}
    for name in names:
        for kind, asked in ((HOT, HOT), ("cold", name)):
            prompt = random_tokens(rng, engine.info.vocab_size, PROMPT_TOKENS)
            times[kind].append((await ask(engine, asked, prompt, 1))[0])
    hot, first = (percentile(times[kind], 95) for kind in (HOT, "cold"))
    return {"cold first use, p95, ms later": round(1000 * (first - hot), 1)}


async def used(engine: Engine, names: Sequence[str]) -> None:
    """Use each once."""
    prompts = iter(names)

    async def stream() -> None:
        for name in prompts:
            await ask(engine, name, [1, 2, 3, 4], 1)

    await asyncio.gather(*(stream() for _ in range(STREAMS)))


def upload(engine: Engine, count: int) -> None:
    """Upload files of 5 MB under names of their own."""
    for number, data in enumerate(drafts(engine.registry.base, UPLOAD_RANK, count)):
        with engine.registry.incoming() as file:
            file.write(data)
            engine.registry.put(f"upload-{number}", file)


async def replacing(engine: Engine, rounds: int) -> dict[str, object]:
    """What 32 streams of a name feel of its being replaced, and whether all answers are of one."""
    files = list(drafts(engine.registry.base, RANK, 2, size=4.0))
    prompt = random_tokens(random.Random(0), engine.info.vocab_size, PROMPT_TOKENS)
    answers, made = list[list[int]](), list[list[int]]()
    for data in files:
        engine.registry.put("replaced", data)
        answers.append((await ask(engine, "replaced", prompt, ANSWER_TOKENS))[1])

    async def rate(change: Callable[[], Awaitable[object]]) -> float:
        """Answers a second of 32 streams while `change` runs."""
        began, before, done = time.perf_counter(), len(made), asyncio.Event()

        async def stream() -> None:
            while not done.is_set():
                made.append((await ask(engine, "replaced", prompt, ANSWER_TOKENS))[1])

        streams = [asyncio.ensure_future(stream()) for _ in range(STREAMS)]
        await change()
        done.set()
        await asyncio.gather(*streams)
        return (len(made) - before) / (time.perf_counter() - began)

    async def replace() -> None:
        for number in range(REPLACEMENTS // rounds):
            await asyncio.to_thread(engine.registry.put, "replaced", files[number % len(files)])
            await asyncio.sleep(PAUSE)

    ratios = []
    for _ in range(rounds):
        quiet = await rate(lambda: asyncio.sleep(PAUSE * REPLACEMENTS / rounds))
        ratios.append(await rate(replace) / quiet)
    await asyncio.sleep(1)
    return {
        "throughput while a name is replaced": str(interval(ratios)),
        "answers of one version": f"{sum(one in answers for one in made)} of {len(made)}",
        "the two versions differ": answers[0] != answers[1],
        "requests that hold a version afterwards": engine.registry.entry("replaced").in_flight,
    }


def memory(engine: Engine, names: Sequence[str], uploads: int) -> dict[str, object]:
    """Memory beyond the model: after the start, and after each kind of use."""
    asyncio.run(streams(engine, [HOT] * 2 * STREAMS, ANSWER_TOKENS, 0))
    before = resident() - Timed.memory
    found: dict[str, object] = {"memory after the start, MB": resident() - before}
    began = time.perf_counter()
    asyncio.run(used(engine, names))
    found["each used once, s"] = time.perf_counter() - began
    found["memory then, MB"] = resident() - before
    upload(engine, uploads)
    found["memory after uploads, MB"] = resident() - before
    found["budget, MB"] = engine.info.intervention_bytes / 2**20
    return found


def speed(engine: Engine, names: Sequence[str], rounds: int, out: Path | None) -> dict[str, object]:
    """What cold tasks and random use cost."""
    first = asyncio.run(cold(engine, random.Random(1).sample(names, min(200, len(names)))))
    return {
        **first,
        **loaded(engine, len(names), rounds, out),
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Where the files lie, or are made.")],
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    count: Annotated[int, typer.Option(min=1, help="Interventions.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    uploads: Annotated[int, typer.Option(min=0)] = UPLOADS,
    part: Annotated[Part, typer.Option(help="What to measure.")] = Part.ALL,
    out: Annotated[Path | None, typer.Option(help="Keep the figures here.")] = None,
    rounds_out: Annotated[Path | None, typer.Option(help="Keep the rounds here.")] = None,
) -> None:
    """Measure, and print a table."""
    write_files(folder, base_shape(model), count)
    vars(front)["Registry"] = Timed
    names = [f"task-{number}" for number in range(count)]
    found: dict[str, object] = {"files": count}
    with Engine(model, dtype="float32", interventions=folder) as engine:
        found["ready after the model, s"] = Timed.seconds
        if part in (Part.MEMORY, Part.ALL):
            found |= memory(engine, names, uploads)
        if part in (Part.SPEED, Part.ALL):
            found |= speed(engine, names, rounds, rounds_out)
        if part in (Part.REPLACE, Part.ALL):
            found |= asyncio.run(replacing(engine, rounds))
    rows = [(name, round(v, 2) if isinstance(v, float) else v) for name, v in found.items()]
    print(table(("what", "figure"), rows))
    if out is not None:
        out.write_text(json.dumps({**machine(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

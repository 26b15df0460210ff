"""How the engine scales: tables, plots and raw figures, in process.

    python -m benchmarks.scaling --out build/scaling

Interventions act on the prompt's last token in four layers (r=4, l1). Their number in flight is
varied at equal work: always the same number of requests, of which 64 run at once. That of
registered ones too: always the same ten are used, in turns with the base model, 64 requests at
once, or one at a time, whose first token is timed. A decode step is timed by the choices of one
request, which share a prompt of the length wanted. Memory is what the process takes at its most
beyond what it took before.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from matplotlib.figure import Figure

from benchmarks.line_plot import Line, draw
from benchmarks.measuring import (
    SECONDS,
    Case,
    Figures,
    Ratio,
    Round,
    interval,
    measure,
    median,
    speed_ratio,
    table,
    timed,
)
from benchmarks.workload import L1, random_intervention, random_tokens, settings
from reft_runtime import Engine, SamplingParams
from reft_runtime.front.asked import Uses

AT_ONCE = 64
PROMPT_TOKENS = 16
ANSWER_TOKENS = 16
STEP_TOKENS = 16
"""A figure of a decode step is the median of this many."""
MEMORY_CONTEXT = 512
USED = 10
"""This many interventions are used while more and more are registered."""

SECTIONS = ("memory", "steps", "in-flight", "registered")
BASE, TASKS, ALONE = "base", "tasks", "tasks, one at a time"
STEP, MEMORY, FIRST = "step", "bytes", "first token"


class Scaling:
    """The sections, all on one engine; each returns its lines of Markdown and its plot."""

    def __init__(self, engine: Engine, folder: Path, rounds: int, out: Path) -> None:
        self.engine = engine
        self.folder = folder
        self.rounds = rounds
        self.out = out
        self._made = 0

    def in_flight(self, counts: Sequence[int], requests: int) -> tuple[str, Figure]:
        """Throughput by the number of different interventions, `requests` requests each time."""
        setting = settings(self.engine.registry.base.num_layers)[L1]
        names = self._register(max(counts), setting)
        cases = {str(k): self._answer(names[:k], requests) for k in counts}
        taken = self._measure("in flight", cases, {"requests": requests})
        for file in self.folder.iterdir():
            file.unlink()
        self.engine.registry.scan()
        work = requests * ANSWER_TOKENS
        rates = [work / median(taken, label) for label in cases]
        over = [speed_ratio(taken, label, str(counts[0])) for label in cases]
        rows = [(k, round(rate), ratio) for k, rate, ratio in zip(counts, rates, over, strict=True)]
        change = change_of_speed(taken, counts)
        text = table(("in flight", "tokens/s", f"over {counts[0]}"), rows)
        text += f"\n\nFrom {counts[0]} to {counts[-1]}, by a fitted line: {change} %."
        figure = draw(
            "different interventions in flight",
            "generated tokens per second",
            [Line(f"{AT_ONCE} at once", list(counts), rates)],
        )
        return text, figure

    def registered(self, counts: Sequence[int]) -> tuple[str, Figure]:
        """Throughput and first tokens of ten interventions by how many are registered."""
        lines = {label: Line(label, [], []) for label in (TASKS, BASE)}
        layers = self.engine.registry.base.num_layers
        names = self._register(USED, settings(layers)[L1])
        rows = []
        for count in counts:
            # Those that only lie there are small, to be made quickly.
            self._register(count - len(self.engine.registry.entries()), ([layers // 2], 1, "l1"))
            cases = {
                TASKS: self._answer(names, AT_ONCE),
                BASE: self._answer([None], AT_ONCE),
                ALONE: self._first_token(names),
            }
            taken = self._measure("registered", cases, {"registered": count})
            rates = {label: AT_ONCE * ANSWER_TOKENS / median(taken, label) for label in lines}
            first = f"{1000 * median(taken, ALONE, FIRST):.1f}"
            for label, rate in rates.items():
                lines[label].x.append(count)
                lines[label].y.append(rate)
            ratio = speed_ratio(taken, TASKS, BASE)
            rows.append((count, *map(round, rates.values()), ratio, first))
        header = ("tasks, tokens/s", "base, tokens/s", "tasks over base", "first token, ms")
        text = table(("registered", *header), rows)
        figure = draw(
            "registered interventions", "generated tokens per second", list(lines.values())
        )
        return text, figure

    def steps(self, contexts: Sequence[int], batches: Sequence[int]) -> tuple[str, Figure]:
        """Seconds of a decode step by context and batch; one round, for prompts take long."""
        rows, lines = [], []
        for batch in batches:
            cases = {str(length): self._decode(length, batch) for length in contexts}
            taken = self._measure("steps", cases, {"batch": batch}, rounds=1)
            milliseconds = [1000 * median(taken, label, STEP) for label in cases]
            rows.append((batch, *(round(value, 1) for value in milliseconds)))
            lines.append(Line(f"batch {batch}", list(contexts), milliseconds))
        text = "Milliseconds of a decode step.\n\n"
        text += table(("batch", *(f"context {length}" for length in contexts)), rows)
        return text, draw("tokens of context", "milliseconds a decode step", lines)

    def memory(self, batches: Sequence[int]) -> tuple[str, Figure]:
        """Bytes by sequences at once; from few to many, for memory once taken is kept for reuse."""

        def resident(batch: int, case: Case) -> float:  # a round of several would be shuffled
            setting = {"context": MEMORY_CONTEXT, "batch": batch}
            return median(
                self._measure("memory", {MEMORY: case}, setting, rounds=1), MEMORY, MEMORY
            )

        idle = resident(0, lambda _: {SECONDS: 0.0, MEMORY: _resident()})
        used = [
            (resident(batch, self._decode(MEMORY_CONTEXT, batch)) - idle) / 2**20
            for batch in batches
        ]
        rows = [(batch, round(value)) for batch, value in zip(batches, used, strict=True)]
        text = f"MiB beyond the idle engine, {MEMORY_CONTEXT} tokens of context.\n\n"
        text += table(("sequences at once", "MiB"), rows)
        line = Line(f"{MEMORY_CONTEXT} tokens of context", list(batches), used)
        return text, draw("sequences at once", "MiB beyond the idle engine", [line])

    def _measure(
        self, section: str, cases: dict[str, Case], setting: dict[str, int], rounds: int = 0
    ) -> list[Round]:
        info = self.engine.info
        known = {"benchmark": f"scaling, {section}", "model": info.model, "dtype": info.dtype}
        return measure(cases, rounds or self.rounds, {**known, **setting}, self.out)

    def _register(self, count: int, setting: tuple[list[int], int, str]) -> list[str]:
        """Add interventions of random weights to the folder that the engine serves."""
        names = [f"task-{number}" for number in range(self._made, self._made + count)]
        self._made += len(names)
        for name in names:
            data = random_intervention(self.engine.registry.base, *setting)
            (self.folder / f"{name}.safetensors").write_bytes(data)
        self.engine.registry.scan()
        return names

    def _prompt(self, rng: random.Random, length: int) -> list[int]:
        return random_tokens(rng, self.engine.info.vocab_size, length)

    def _answer(self, names: Sequence[str | None], requests: int) -> Case:
        """A case of so many requests, which take these interventions in turn."""
        engine = self.engine
        sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)

        def run(number: int) -> None:
            rng = random.Random(f"{len(names)} {number}")  # new to every prefix cache
            asked = requests if number else AT_ONCE
            prompts = [self._prompt(rng, PROMPT_TOKENS) for _ in range(asked)]
            applied: list[Uses] = [names[i % len(names)] for i in range(asked)]
            answers = engine.generate(prompts, sampling, intervention=applied, progress=False)
            assert all(len(answer.tokens) == ANSWER_TOKENS for answer in answers)

        return timed(run)

    def _first_token(self, names: Sequence[str]) -> Case:
        """A case of one request for one token from each of these, one after another."""

        def run(number: int) -> Figures:
            rng = random.Random(f"first {number} {self._made}")
            sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
            seconds = []
            for name in names:
                prompt = self._prompt(rng, PROMPT_TOKENS)
                begin = time.perf_counter()
                self.engine.generate([prompt], sampling, intervention=name, progress=False)
                seconds.append(time.perf_counter() - begin)
            return {SECONDS: sum(seconds), FIRST: statistics.median(seconds)}

        return run

    def _decode(self, context: int, batch: int) -> Case:
        """A case of one request of `batch` choices, whose decode steps end at `context` tokens."""

        async def run(number: int) -> Figures:
            rng = random.Random(f"{context} {number}")
            prompt = self._prompt(rng, context - STEP_TOKENS)
            sampling = SamplingParams(max_tokens=STEP_TOKENS, n=batch, ignore_eos=True)
            begin = time.perf_counter()
            made, last, most, gaps = 0, begin, 0.0, list[float]()
            async for deltas in await self.engine.open(prompt, sampling):
                made += sum(len(delta.tokens) for delta in deltas)
                steps = made // batch - len(gaps)  # all choices have the tokens of so many more
                if steps:
                    now = time.perf_counter()
                    gaps += [(now - last) / steps] * steps
                    last = now
                    most = max(most, _resident())
            return {SECONDS: last - begin, STEP: statistics.median(gaps[1:]), MEMORY: most}

        # There is nothing to warm up, and what a first run has taken would be there already.
        return lambda number: asyncio.run(run(number)) if number else {SECONDS: 0.0}


def change_of_speed(taken: Sequence[Round], counts: Sequence[int]) -> Ratio:
    """The percent by which speed changes from the first to the last count.

    In each round it is read off the least-squares line of log speed over log count.
    """
    x = [math.log2(count) for count in counts]
    changes = []
    for found in taken:
        speed = [-math.log(found[str(count)][SECONDS]) for count in counts]
        slope = statistics.linear_regression(x, speed).slope
        changes.append(100 * math.expm1(slope * (x[-1] - x[0])))
    return interval(changes)


def _resident() -> float:
    return float(psutil.Process().memory_info().rss)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    dtype: Annotated[str, typer.Option(help="Dtype of the model.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="As for `reft serve`.")] = "cpu",
    in_flight: Annotated[
        str, typer.Option(help="Numbers of different interventions, comma-separated.")
    ] = "1,16,64,256",
    requests: Annotated[int, typer.Option(min=1, help="Number of requests that take them.")] = 256,
    registered: Annotated[
        str, typer.Option(help="Numbers of interventions, comma-separated.")
    ] = "10,100,1000,10000",
    contexts: Annotated[
        str, typer.Option(help="Lengths in tokens, comma-separated.")
    ] = "128,512,1024,2048,4096",
    batches: Annotated[str, typer.Option(help="Numbers of sequences, comma-separated.")] = "1,8,32",
    sections: Annotated[str, typer.Option(help="Sections, comma-separated.")] = ",".join(SECTIONS),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Folder of plots, tables and raw figures.")] = Path(
        "build/scaling"
    ),
) -> None:
    """Print the tables, and write them with plots and raw figures to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    longest, most = max(_numbers(contexts)), max(_numbers(batches))
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(
            model,
            dtype=dtype,
            device=device,
            interventions=folder,
            max_running=AT_ONCE,
            max_model_len=longest + 1,
            kv_tokens=max(most * (longest + 32), AT_ONCE * (MEMORY_CONTEXT + 32)),
        ) as engine,
    ):
        scaling = Scaling(engine, Path(folder), rounds, out / "scaling.json")
        run = {
            "memory": lambda: scaling.memory([1, *range(16, AT_ONCE + 1, 16)]),
            "steps": lambda: scaling.steps(_numbers(contexts), _numbers(batches)),
            "in-flight": lambda: scaling.in_flight(_numbers(in_flight), requests),
            "registered": lambda: scaling.registered(_numbers(registered)),
        }
        done = {name: run[name]() for name in sections.split(",")}
    texts = [f"{engine.info.model}, {dtype}, {torch.get_num_threads()} threads, {rounds} rounds."]
    for name, (text, figure) in done.items():
        texts.append(text)
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
    (out / "scaling.md").write_text("\n\n".join(texts) + "\n")
    print("\n\n".join(texts))


if __name__ == "__main__":
    typer.run(main)

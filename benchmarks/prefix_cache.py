"""What the prefix cache saves: prompt tokens computed, and time to first token, with and without.

Requests arrive all at once at a cold cache, over a system prompt that differs from round to round:

- 32 tasks that edit the last token (l1), 1,000 shared tokens and 30 of their own each;
- 4 tasks that edit first and last token (f1+l1), 8 such requests each: they share within the task;
- a chat of five turns, 200 tokens a turn and 50 an answer, whose turns edit their own last token
  (l1), their first (f1), or nothing.

Both engines run the same model in one process, in alternating rounds (`measuring`).

    python -m benchmarks.prefix_cache --dtype float32 --rounds 7
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measuring import SECONDS, Case, Figures, measure, median, speed_ratio, table
from benchmarks.workload import random_intervention
from reft_runtime import Engine, SamplingParams
from reft_runtime.use import Use

SHARED_TOKENS = 1000
OWN_TOKENS = 30
REQUESTS = 32
ANSWER_TOKENS = 8
TURNS, TURN_TOKENS, REPLY_TOKENS = 5, 200, 50
BLOCK_TOKENS = 16

FIRST_TOKEN, COMPUTED = "first_token", "computed"

Asked = Sequence[tuple[list[int], str | None]]
"""Prompts, each with the name of its intervention."""


def random_tokens(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    """Tokens that no cache has seen."""
    return [rng.randrange(vocabulary) for _ in range(count)]


def over_one_prompt(names: Sequence[str], number: int, vocabulary: int) -> Asked:
    """One request for each of `names`, over one system prompt; the same for the same `number`."""
    rng = random.Random(number)
    shared = random_tokens(rng, SHARED_TOKENS, vocabulary)
    return [([*shared, *random_tokens(rng, OWN_TOKENS, vocabulary)], name) for name in names]


class Side:
    """One engine, and the answers it gave in each round of each case."""

    def __init__(self, model: str, dtype: str, *, prefix_cache: bool) -> None:
        self.engine = Engine(model, dtype=dtype, max_running=REQUESTS, prefix_cache=prefix_cache)
        self.answers: dict[tuple[str, int], list[list[int]]] = {}
        torch.manual_seed(0)
        base = self.engine.registry.base
        layers = [base.num_layers * i // 5 for i in range(1, 5)]
        for positions, count in (("l1", REQUESTS), ("f1+l1", 4), ("f1", 1)):
            for i in range(count):
                data = random_intervention(base, layers, 4, positions)
                self.engine.registry.put(f"{positions.replace('+', '-')}-{i}", data)

    def at_once(self, label: str, names: Sequence[str]) -> Case:
        """A case: requests of these interventions over one prompt, all at once."""

        def run(number: int) -> Figures:
            asked = over_one_prompt(names, number, self.engine.info.vocab_size)
            return asyncio.run(self._run(label, number, asked))

        return run

    def chat(self, label: str, name: str | None) -> Case:
        """A case: the turns of a chat, one after another."""

        def run(number: int) -> Figures:
            rng = random.Random(1000 + number)
            text: list[int] = []
            total = {SECONDS: 0.0, FIRST_TOKEN: 0.0, COMPUTED: 0.0}
            for _ in range(TURNS):
                text += random_tokens(rng, TURN_TOKENS, self.engine.info.vocab_size)
                figures = asyncio.run(self._run(label, number, [(text, name)], REPLY_TOKENS))
                text += self.answers[label, number][-1]
                total = {key: total[key] + value for key, value in figures.items()}
            return total

        return run

    async def _run(
        self, label: str, number: int, asked: Asked, max_tokens: int = ANSWER_TOKENS
    ) -> Figures:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        before = self.engine.stats().prompt_tokens
        start = time.perf_counter()

        async def one(prompt: list[int], name: str | None) -> tuple[float, list[int]]:
            first, tokens = 0.0, []
            uses = [] if name is None else [Use(name)]
            async for deltas in await self.engine.open(prompt, sampling, uses):
                first = first or time.perf_counter() - start
                tokens += [token for delta in deltas for token in delta.tokens]
            return first, tokens

        done = await asyncio.gather(*(one(prompt, name) for prompt, name in asked))
        self.answers.setdefault((label, number), []).extend(tokens for _, tokens in done)
        return {
            SECONDS: time.perf_counter() - start,
            FIRST_TOKEN: statistics.median(first for first, _ in done),
            COMPUTED: self.engine.stats().prompt_tokens - before,
        }


def main(
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    dtype: Annotated[str, typer.Option(help="Number format.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures here.")] = None,
) -> None:
    """Print, for every case, what was computed and how long the first token took."""
    sides = {
        cached: Side(model, dtype, prefix_cache=cached == "cached")
        for cached in ("cached", "plain")
    }
    l1 = [f"l1-{i}" for i in range(REQUESTS)]
    within = [f"f1-l1-{i % 4}" for i in range(REQUESTS)]
    workloads = {
        "32 tasks, l1": {side: s.at_once("32 tasks, l1", l1) for side, s in sides.items()},
        "4 tasks, f1+l1, 8 each": {
            side: s.at_once("4 tasks, f1+l1, 8 each", within) for side, s in sides.items()
        },
        "chat, base": {side: s.chat("chat, base", None) for side, s in sides.items()},
        "chat, l1": {side: s.chat("chat, l1", "l1-0") for side, s in sides.items()},
        "chat, f1": {side: s.chat("chat, f1", "f1-0") for side, s in sides.items()},
    }
    rows = []
    for label, cases in workloads.items():
        setting: dict[str, str | int] = {"workload": label, "dtype": dtype, "model": model}
        found = measure(cases, rounds, setting, out)
        differ = sum(
            own != other
            for key, answers in sides["cached"].answers.items()
            if key[0] == label
            for own, other in zip(answers, sides["plain"].answers[key], strict=True)
        )
        rows.append(
            [
                label,
                round(median(found, "plain", COMPUTED)),
                round(median(found, "cached", COMPUTED)),
                round(1000 * median(found, "plain", FIRST_TOKEN)),
                round(1000 * median(found, "cached", FIRST_TOKEN)),
                speed_ratio(found, "cached", "plain", FIRST_TOKEN),
                speed_ratio(found, "cached", "plain"),
                differ,
            ]
        )
        print(f"{label}: done", flush=True)
    bound = SHARED_TOKENS + REQUESTS * (OWN_TOKENS + BLOCK_TOKENS)
    print(
        f"\n{dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds"
    )
    print(f"At most {bound} tokens are to be computed for 32 tasks, l1.\n")
    header = [
        "workload",
        "prompt tokens",
        "computed",
        "first token, ms",
        "with cache, ms",
        "first token, times as fast",
        "whole run, times as fast",
        "answers that differ",
    ]
    print(table(header, rows))
    for side in sides.values():
        side.engine.close()


if __name__ == "__main__":
    typer.run(main)

"""What the prefix cache saves: prompt tokens computed, and time to first token, with and without.

Prompts are random tokens, new in each round, so every round begins cold:

- `tasks`: 32 tasks that edit the last token (l1), all at once, over one system prompt of 1,000
  tokens, with endings of 30 tokens of their own; beside it, with `--vllm`, vLLM with 32 LoRAs;
- `within`: 4 tasks that edit the first and the last token (f1+l1), 8 such requests each, all at
  once: they share within the task;
- `chat base`, `chat l1`, `chat f1`: five turns of 200 tokens, answered by 50 each, by the base,
  by a task that edits the last token of every turn, and by one that edits the first.

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
from benchmarks.peers.client import Peer
from benchmarks.peers.worker import Job
from benchmarks.reft_runs import stream
from benchmarks.testbed import Testbed
from benchmarks.workload import figures, random_intervention, random_tokens
from reft_runtime import Engine, Use
from reft_runtime.base.demo import demo_model
from reft_runtime.schedule.blocks import BLOCK_TOKENS

SHARED_TOKENS, OWN_TOKENS, REQUESTS, ANSWER_TOKENS = 1000, 30, 32, 8
TURNS, TURN_TOKENS, REPLY_TOKENS = 5, 200, 50
KV_TOKENS = 65_536
"""Room for the tokens of all 32 requests at once, and for what the cache keeps."""

FIRST_TOKEN, COMPUTED = "ttft_median", "computed"
CACHED, PLAIN, VLLM = "with the cache", "without", "vLLM, 32 LoRAs"

WORKLOADS: dict[str, list[str]] = {
    "tasks": [f"l1-{i}" for i in range(REQUESTS)],
    "within": [f"f1-l1-{i % 4}" for i in range(REQUESTS)],
    "chat base": [],
    "chat l1": ["l1-0"],
    "chat f1": ["f1-0"],
}
"""The interventions of each workload: one for each request, or that of the one chat."""


def over_one_prompt(vocabulary: int, number: int) -> Job:
    """The requests of round `number`; the warm-up (0) has two."""
    rng = random.Random(number)
    shared, count = random_tokens(rng, vocabulary, SHARED_TOKENS), REQUESTS if number else 2
    prompts = [[*shared, *random_tokens(rng, vocabulary, OWN_TOKENS)] for _ in range(count)]
    return {"prompts": prompts, "answers": [ANSWER_TOKENS] * count}


class Side:
    """One engine with all interventions, and the answers it gave in each round."""

    def __init__(self, model: str, dtype: str, *, prefix_cache: bool) -> None:
        self.engine = Engine(model, dtype=dtype, kv_tokens=KV_TOKENS, prefix_cache=prefix_cache)
        self.answers: dict[tuple[str, int], list[list[int]]] = {}
        torch.manual_seed(0)
        base = self.engine.registry.base
        layers = [base.num_layers * i // 5 for i in range(1, 5)]
        for name in sorted({name for names in WORKLOADS.values() for name in names}):
            positions = name.rpartition("-")[0].replace("-", "+")
            file = random_intervention(base, layers, 4, positions)
            self.engine.registry.put(name, file)

    def case(self, workload: str) -> Case:
        """A case that runs one workload on this side."""
        run = self._chat if workload.startswith("chat") else self._at_once
        return lambda number: run(workload, number)

    def _at_once(self, workload: str, number: int) -> Figures:
        job = over_one_prompt(self.engine.info.vocab_size, number)
        names = WORKLOADS[workload][: len(job["prompts"])]
        return asyncio.run(self._run((workload, number), job, names))

    def _chat(self, workload: str, number: int) -> Figures:
        rng = random.Random(number)
        text: list[int] = []
        turns: list[Figures] = []
        for _ in range(TURNS if number else 1):
            text += random_tokens(rng, self.engine.info.vocab_size, TURN_TOKENS)
            job: Job = {"prompts": [text], "answers": [REPLY_TOKENS]}
            turns.append(asyncio.run(self._run((workload, number), job, WORKLOADS[workload])))
            text = [*text, *self.answers[workload, number][-1]]
        return {
            SECONDS: sum(turn[SECONDS] for turn in turns),
            COMPUTED: sum(turn[COMPUTED] for turn in turns),
            FIRST_TOKEN: statistics.median(turn[FIRST_TOKEN] for turn in turns),
        }

    async def _run(self, key: tuple[str, int], job: Job, names: Sequence[str]) -> Figures:
        before, begin = self.engine.stats().prompt_tokens, time.perf_counter()

        asked = enumerate(zip(job["prompts"], job["answers"], strict=True))
        done = await asyncio.gather(
            *(
                stream(self.engine, prompt, answer, (Use(names[i]),) if names else (), begin)
                for i, (prompt, answer) in asked
            )
        )
        self.answers.setdefault(key, []).extend(tokens for tokens, _ in done)
        seconds, stamps = time.perf_counter() - begin, [stamps for _, stamps in done]
        measured = figures({"seconds": seconds, "tokens": done[0][0], "stamps": stamps})
        return {**measured, COMPUTED: self.engine.stats().prompt_tokens - before}


def beside(peer: Peer, vocabulary: int) -> Case:
    """A case that sends the requests of `tasks` through a peer, request i by its adapter i."""
    return lambda number: figures(peer.run(over_one_prompt(vocabulary, number)))


def differing(sides: dict[str, Side], workload: str) -> int:
    """How many answers of the measured rounds are not the same on both sides."""
    return sum(
        own != other
        for key, answers in sides[CACHED].answers.items()
        if key[0] == workload
        for own, other in zip(answers, sides[PLAIN].answers[key], strict=True)
    )


def main(
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    dtype: Annotated[str, typer.Option(help="Number format.")] = "float32",
    workloads: Annotated[str, typer.Option(help="Workloads, comma-separated.")] = ",".join(
        WORKLOADS
    ),
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    vllm: Annotated[Path | None, typer.Option(help="Python of an environment with vLLM.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures here.")] = None,
) -> None:
    """Print, for every workload, what was computed and how long the first token took."""
    path = str(demo_model()) if model == "demo" else model
    sides = {label: Side(path, dtype, prefix_cache=label == CACHED) for label in (CACHED, PLAIN)}
    rows = []
    with Testbed(path, dtype, {None: None, "vllm": vllm, "peers": None}) as testbed:
        for workload in workloads.split(","):
            cases = {label: side.case(workload) for label, side in sides.items()}
            if vllm is not None and workload == "tasks":
                vocabulary = sides[PLAIN].engine.info.vocab_size
                cases[VLLM] = beside(testbed.peer("vllm_cpu", REQUESTS), vocabulary)
            setting = {"workload": workload, "dtype": dtype, "model": model}
            found = measure(cases, rounds, setting, out)
            for label in cases:
                ours = label in sides
                rows.append(
                    [
                        workload,
                        label,
                        round(median(found, label, COMPUTED)) if ours else "",
                        round(1000 * median(found, label, FIRST_TOKEN)),
                        round(1000 * median(found, label)),
                        speed_ratio(found, label, PLAIN, FIRST_TOKEN),
                        speed_ratio(found, label, PLAIN),
                    ]
                )
            print(f"{workload}: {differing(sides, workload)} answers differ", flush=True)
    for side in sides.values():
        side.engine.close()
    bound = SHARED_TOKENS + REQUESTS * (OWN_TOKENS + BLOCK_TOKENS)
    print(
        f"\n{dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds"
    )
    print(f"Of `tasks` at most {bound} tokens are to be computed.\n")
    header = ["workload", "", "prompt tokens computed", "first token, ms", "all, ms"]
    print(table([*header, "first token, times as fast", "all, times as fast"], rows))


if __name__ == "__main__":
    typer.run(main)

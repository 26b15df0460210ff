"""The same requests through transformers on the same device: `generate`, and its batching.

    python -m benchmarks.device_peers --shape llama-3-8b --out docs/measurements/device.json

Both with its defaults, on a model of the same shape, in the rounds of the engine's own cases.
`generate` gets all requests as one batch of equal lengths, which flatters it; continuous batching
keeps its manager, and so its graphs, from run to run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import GenerationConfig

from benchmarks.device import (
    ANSWER_TOKENS,
    BASE,
    SHAPES,
    Bench,
    build,
    cases_of,
    name_of,
    random_model,
)
from benchmarks.measuring import SECONDS, Figures, measure, median, speed_ratio, table
from benchmarks.workload import L1, PROMPT_TOKENS, random_tokens
from reft_runtime.loading.loader import choose_device, choose_dtype

GENERATE = "transformers: generate"
CONTINUOUS = "transformers: continuous batching"


class Transformers:
    """A model of random weights, as transformers runs it."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype) -> None:
        self._model = random_model(shape, device, dtype).eval()
        self._vocabulary: int = self._model.config.vocab_size

    def case(
        self, label: str, n: int, prompt_tokens: int, answer_tokens: int
    ) -> Callable[[int], Figures]:
        """A case of n requests at once, answered greedily."""
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=answer_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        ask = self._generate if label == GENERATE else self._batch

        def run(number: int) -> Figures:
            rng = random.Random(f"{label} {n} {number}")
            prompts = [random_tokens(rng, self._vocabulary, prompt_tokens) for _ in range(n)]
            begin = time.perf_counter()
            made = ask(prompts, settings)
            seconds = time.perf_counter() - begin
            assert made == n * answer_tokens, f"{label} gave {made} tokens"
            return {SECONDS: seconds}

        return run

    def _generate(self, prompts: list[list[int]], settings: GenerationConfig) -> int:
        self._model.set_attn_implementation("sdpa")
        ids = torch.tensor(prompts, device=self._model.device)
        mask = torch.ones_like(ids)
        found = self._model.generate(ids, attention_mask=mask, generation_config=settings)
        made: int = found[:, ids.shape[1] :].cpu().numel()
        return made

    def _batch(self, prompts: list[list[int]], settings: GenerationConfig) -> int:
        # A request of this manager always has an end; random tokens do not meet this one.
        settings.eos_token_id = self._vocabulary
        found = self._model.generate_batch(
            inputs=prompts, generation_config=settings, persistent_manager=True
        )
        return sum(len(each.generated_tokens) for each in found.values())


def main(
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}.")] = "llama-3-8b",
    device: Annotated[str, typer.Option(help="As for `reft serve`.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="As for `reft serve`.")] = "auto",
    concurrency: Annotated[
        str, typer.Option(help="Numbers of requests at once, comma-separated.")
    ] = "1,32,256",
    peers: Annotated[
        str, typer.Option(help="Ways to ask it, comma-separated.")
    ] = f"{GENERATE},{CONTINUOUS}",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures here.")] = None,
) -> None:
    """Print generated tokens a second, whole runs with prompts, and ratios to the base."""
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    counts = [int(n) for n in concurrency.split(",")]
    loaded = build(shape, place, kind)
    bench = Bench(loaded, max(counts))
    theirs = Transformers(shape, place, kind)
    key: dict[str, str | int] = {"benchmark": "device peers", "shape": shape}
    key |= {"device": name_of(place), "dtype": str(kind).removeprefix("torch.")}
    rows: list[tuple[object, ...]] = []
    for n in counts:
        own = bench.interventions(n, *cases_of(len(loaded.layers))[L1])
        cases = {BASE: bench.case(n, [()]), L1: bench.case(n, own)}
        for label in peers.split(","):
            cases[label] = theirs.case(label, n, PROMPT_TOKENS, ANSWER_TOKENS)
        taken = measure(cases, rounds, {**key, "n": n}, out)
        for label in cases:
            rate = round(n * ANSWER_TOKENS / median(taken, label))
            ratio = "" if label == BASE else speed_ratio(taken, label, BASE)
            rows.append((n, label, rate, ratio))
    print(table(("n", "case", "tokens/s", "over base"), rows))


if __name__ == "__main__":
    typer.run(main)

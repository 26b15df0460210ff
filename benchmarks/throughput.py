"""Whole-run throughput of the engine: base, many tasks, `model.generate`, and the floor.

Everything is measured in one process, in alternating rounds, because a machine's speed drifts:
compare the ratios, not the absolute figures. A round is n prompts of 64 random tokens, each
answered by 64 tokens (prefill included). The floor is the model's linear layers alone, with
prepacked weights, over the same tokens.

    python -m benchmarks.throughput --dtypes float32,bfloat16 --concurrency 1,8,32 --rounds 5
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import AutoModelForCausalLM

from reft_runtime import Engine, SamplingParams
from reft_runtime.demo import demo_model
from reft_runtime.engine.linears import prepack
from reft_runtime.interventions import BaseShape, Edit, Intervention, serialise
from reft_runtime.outputs import Generation

PROMPT_TOKENS = 64
ANSWER_TOKENS = 64

Case = Callable[[], None]


def random_intervention(base: BaseShape, layers: list[int], rank: int, positions: str) -> bytes:
    """A valid LoReFT file with random weights."""
    d = base.hidden_size
    edits = [
        Edit(
            layer,
            positions,
            {
                "W": torch.randn(rank, d) * 0.02,
                "R": torch.linalg.qr(torch.randn(d, rank)).Q,
                "b": torch.randn(rank) * 0.02,
            },
        )
        for layer in layers
    ]
    return serialise(Intervention.build(base, edits))


def settings(layers: int) -> dict[str, tuple[list[int], int, str]]:
    """Intervention settings by label: layers, rank, positions. The last is the paper's."""
    four = [layers * i // 5 for i in range(1, 5)]
    return {
        "n tasks: 4 layers, r=4, l1": (four, 4, "l1"),
        "n tasks: 4 layers, r=4, f3+l3": (four, 4, "f3+l3"),
        "n tasks: all layers, r=8, f7+l7": (list(range(layers)), 8, "f7+l7"),
    }


def linear_floor(model: nn.Module, n: int) -> Case:
    """The linear layers alone: one pass over all prompts, then one for each further token."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    dtype = head.weight.dtype
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {
        (rows, module.in_features): torch.randn(rows, module.in_features).to(dtype)
        for module in linears
        for rows in (n, n * PROMPT_TOKENS)
    }
    prepack(model)

    @torch.inference_mode()
    def run() -> None:
        for step in range(ANSWER_TOKENS):
            rows = n * PROMPT_TOKENS if step == 0 else n
            for module in linears:
                module(inputs[n if module is head else rows, module.in_features])

    return run


def cases(model: str, dtype: str, n: int) -> tuple[dict[str, Case], Callable[[], None]]:
    """What is measured, by label, and how to clean up."""
    path = str(demo_model()) if model == "demo" else model
    engine = Engine(path, dtype=dtype, max_running=max(n, 1))
    base = engine.registry.base
    rng = random.Random(0)
    vocabulary = engine.info.vocab_size
    prompts = [[rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(n)]
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, engine.info.dtype))
    ids = torch.tensor(prompts)

    def ours(names: list[str] | None) -> Case:
        return lambda: _check(
            engine.generate(prompts, sampling, intervention=names, progress=False)
        )

    def generate() -> None:
        reference.generate(  # type: ignore[misc]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=ANSWER_TOKENS,
            max_new_tokens=ANSWER_TOKENS,
        )

    found: dict[str, Case] = {"base": ours(None)}
    for number, (label, setting) in enumerate(settings(base.num_layers).items()):
        names = [f"bench-{number}-{i}" for i in range(n)]
        for name in names:
            engine.registry.put(name, random_intervention(base, *setting))
        found[label] = ours(names)
    found["model.generate, static batch"] = generate
    found["floor: linear layers alone"] = linear_floor(reference, n)
    return found, engine.close


def _check(answers: list[Generation]) -> None:
    assert all(len(answer.tokens) == ANSWER_TOKENS for answer in answers)


def measure(found: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Seconds of every case in every round; the order turns from round to round."""
    seconds: dict[str, list[float]] = {label: [] for label in found}
    for run in found.values():
        run()
    labels = list(found)
    for number in range(rounds):
        turn = number % len(labels)
        for label in labels[turn:] + labels[:turn]:
            start = time.perf_counter()
            found[label]()
            seconds[label].append(time.perf_counter() - start)
    return seconds


def main(
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    dtypes: Annotated[str, typer.Option(help="Comma-separated.")] = "float32,bfloat16",
    concurrency: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the raw figures as JSON.")] = None,
) -> None:
    """Print medians in generated tokens per second, and ratios to the base of the same round."""
    results = []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds")
    print(f"| {'case':33} | dtype | n | tokens/s | over base |")
    print("|---|---|---:|---:|---:|")
    for dtype in dtypes.split(","):
        for n in map(int, concurrency.split(",")):
            found, close = cases(model, dtype, n)
            try:
                seconds = measure(found, rounds)
            finally:
                close()
            for label, taken in seconds.items():
                rate = n * ANSWER_TOKENS / statistics.median(taken)
                ratio = statistics.median(
                    base / own for base, own in zip(seconds["base"], taken, strict=True)
                )
                print(f"| {label:33} | {dtype} | {n} | {rate:.0f} | {ratio:.2f} |", flush=True)
                results.append({"case": label, "dtype": dtype, "n": n, "seconds": taken})
    if out is not None:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    typer.run(main)

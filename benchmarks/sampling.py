"""What the settings of the sampler cost on a CPU: requests of each kind beside greedy ones.

    python -m benchmarks.sampling --out docs/measurements/sampling.json
    python -m benchmarks.sampling --model qwen2.5-0.5b --dtypes bfloat16 --answer 16 --rounds 2

A round runs every case once through `Engine.generate`, with prefill, and takes about a minute with
the demo model. The shape of Qwen2.5-0.5B has a vocabulary of 152,000 and random weights: its
distributions are flat, so that top_p keeps tens of thousands of tokens.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measuring import SECONDS, Case, Figures, measure, median, speed_ratio, table
from benchmarks.shapes import checkpoint
from benchmarks.workload import random_tokens
from reft_runtime import Engine, SamplingParams

PROMPT_TOKENS = 32
MAX_MODEL_LEN = 512

GREEDY = "greedy"
CASES: dict[str, list[dict[str, Any]]] = {
    GREEDY: [{"temperature": 0}],
    "temperature 0.7, top_p 0.9": [{"temperature": 0.7, "top_p": 0.9}],
    "top_k 50": [{"top_k": 50}],
    "repetition_penalty 1.1": [{"temperature": 0, "repetition_penalty": 1.1}],
    "logprobs 5": [{"temperature": 0, "logprobs": 5}],
    "all of them": [
        {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "logprobs": 5}
    ],
    "temperature 1.3, top_p 0.99": [{"temperature": 1.3, "top_p": 0.99}],
}
CASES["each row its own"] = [settings for (settings,) in CASES.values()]


def case(engine: Engine, label: str, n: int, answer: int) -> Case:
    """n requests at once; request i takes the settings i of the case, the first again at the end.

    Prompts are new in each round, so that no prefix cache knows them.
    """
    kinds = CASES[label]
    sampling = [
        SamplingParams(max_tokens=answer, ignore_eos=True, seed=i, **kinds[i % len(kinds)])
        for i in range(n)
    ]

    def run(number: int) -> Figures:
        rng = random.Random(f"{label} {number}")
        vocabulary = engine.info.vocab_size
        prompts: list[Any] = [random_tokens(rng, vocabulary, PROMPT_TOKENS) for _ in range(n)]
        start = time.perf_counter()
        answers = engine.generate(prompts, sampling, progress=False)
        seconds = time.perf_counter() - start
        assert all(len(one.tokens) == answer for one in answers)
        return {SECONDS: seconds}

    return run


def main(
    model: Annotated[str, typer.Option(help="demo, a shape by its name, or a folder.")] = "demo",
    dtypes: Annotated[str, typer.Option(help="Number formats, comma-separated.")] = "float32",
    n: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 32,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures here.")] = None,
) -> None:
    """Print generated tokens per second by case, and ratios to greedy of the same round."""
    lines: list[tuple[object, ...]] = []
    folder = str(checkpoint(model))
    for dtype in dtypes.split(","):
        with Engine(
            folder,
            dtype=dtype,
            max_running=n,
            max_model_len=MAX_MODEL_LEN,
            kv_tokens=n * MAX_MODEL_LEN,
        ) as engine:
            cases = {label: case(engine, label, n, answer) for label in CASES}
            setting: dict[str, str | int] = {"benchmark": "sampling", "model": model}
            setting |= {"dtype": dtype, "n": n, "answer": answer}
            taken = measure(cases, rounds, setting, out)
        for label in CASES:
            rate = round(n * answer / median(taken, label))
            ratio: object = "" if label == GREEDY else speed_ratio(taken, label, GREEDY)
            lines.append((dtype, label, rate, ratio))
    print(f"{model}, {n} requests of {PROMPT_TOKENS} + {answer} tokens, {rounds} rounds")
    print(table(("dtype", "case", "tokens/s", "over greedy"), lines))


if __name__ == "__main__":
    typer.run(main)

"""llama.cpp beside the engine, as a reference: `llama-batched-bench` with bf16 and Q8 files.

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF && cmake --build build \
        --target llama-batched-bench         # in a checkout of llama.cpp
    python -m benchmarks.llama_cpp --source llama.cpp --models demo,llama-3.2-1b

Prompts of 64 tokens, n at once, each answered by 64: the time of prompts and answers. The converter
wants the package sentencepiece, and takes no Qwen with the tokenizer of our shapes.
llama-batched-bench takes random tokens where the engine takes the most probable one, and has no
scheduler; Q8 reads half the bytes of bfloat16, and rounds the weights to 8 bits.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measuring import SECONDS, Case, Figures, measure, median, speed_ratio, table, timed
from benchmarks.shapes import checkpoint
from benchmarks.workload import random_tokens
from reft_runtime import Engine, SamplingParams
from reft_runtime.machine.cache import cache_folder
from reft_runtime.machine.cores import usable_cores

PROMPT_TOKENS = ANSWER_TOKENS = 64
MAX_MODEL_LEN = 512
OURS = "base, bfloat16"
FILES = {"llama.cpp, bf16": "bf16", "llama.cpp, Q8_0": "q8_0"}
"""Output types of llama.cpp's converter, by the label of the case."""


def converted(source: Path, model: str, kind: str) -> Path:
    """The model as a GGUF file, which llama.cpp's converter writes into the cache once."""
    folder = checkpoint(model)
    path = cache_folder() / "gguf" / f"{folder.name}-{kind}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        converter = source / "convert_hf_to_gguf.py"
        options = [str(folder), "--outtype", kind, "--outfile", str(partial)]
        subprocess.run([sys.executable, str(converter), *options], check=True)
        partial.replace(path)
    return path


def llama_cpp(source: Path, model: Path, n: int) -> Case:
    """A case by llama-batched-bench, which loads the model each time; that is not counted."""
    tokens = n * (PROMPT_TOKENS + ANSWER_TOKENS)
    command = [str(source / "build" / "bin" / "llama-batched-bench"), "-m", str(model)]
    command += f"-c {tokens} -b 2048 -t {usable_cores()} --output-format jsonl".split()
    command += f"-npp {PROMPT_TOKENS} -ntg {ANSWER_TOKENS} -npl {n}".split()

    def run(number: int) -> Figures:
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return {SECONDS: json.loads(line)["t"]}

    return run


def ours(engine: Engine, n: int) -> Case:
    """The same lengths through `Engine.generate`."""
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)

    def run(number: int) -> None:
        rng = random.Random(f"{n} {number}")
        vocabulary = engine.info.vocab_size
        prompts = [random_tokens(rng, vocabulary, PROMPT_TOKENS) for _ in range(n)]
        engine.generate(prompts, sampling, progress=False)

    return timed(run)


def main(
    source: Annotated[Path, typer.Option(help="A checkout of llama.cpp, built in its `build`.")],
    models: Annotated[str, typer.Option(help="demo, or shapes by name, comma-separated.")] = "demo",
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures in this file.")] = None,
) -> None:
    """Print generated tokens per second, and ratios of times to the engine's in the same round."""
    lines: list[tuple[object, ...]] = []
    sizes = [int(n) for n in concurrency.split(",")]
    for model in models.split(","):
        files = {label: converted(source, model, kind) for label, kind in FILES.items()}
        with Engine(
            str(checkpoint(model)),
            dtype="bfloat16",
            max_running=max(sizes),
            max_model_len=MAX_MODEL_LEN,
            kv_tokens=max(sizes) * MAX_MODEL_LEN,
        ) as engine:
            for n in sizes:
                cases = {OURS: ours(engine, n)}
                cases |= {label: llama_cpp(source, file, n) for label, file in files.items()}
                setting: dict[str, str | int] = {"benchmark": "llama.cpp", "model": model, "n": n}
                taken = measure(cases, rounds, setting, out)
                for label in cases:
                    rate = round(n * ANSWER_TOKENS / median(taken, label))
                    ratio: object = "" if label == OURS else speed_ratio(taken, OURS, label)
                    lines.append((model, n, label, rate, ratio))
    print(f"{usable_cores()} cores, {rounds} rounds")
    print(table(("model", "n", "case", "tokens/s", "ours over it"), lines))


if __name__ == "__main__":
    typer.run(main)

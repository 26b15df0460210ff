"""Quality: the base, LoReFT (ours, and pyreft's modules) and PEFT's LoRA from the same rows.

For each task (a folder with train.jsonl and dev.jsonl or test.jsonl) and method, the learning rate
is chosen from a grid on fewer rows with one seed; then every seed is trained on all rows.
Every finished run is a line of `--out`, and a run that is there is not done again: the script may
be stopped at any time.

    pip install -e '.[quality]'
    python -m benchmarks.quality --data DIR --tasks sst2,trec --out quality.jsonl
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.finished_runs import FinishedRuns
from benchmarks.peer_training import Tuned, accuracy, fit, with_lora, with_pyreft
from reft_runtime.base.demo import locate
from reft_runtime.loading.loader import choose_dtype
from reft_runtime.text import Tokenizer
from reft_runtime.training import TrainSettings, evaluate, train
from reft_runtime.training.layout import Layout
from reft_runtime.training.prompts import Example, Formatter
from reft_runtime.training.rows import Rows, read_rows


@dataclass(frozen=True, slots=True)
class Method:
    """How to train, and the learning rates to choose from."""

    train: Callable[[Run, Task, str], Outcome]
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """What identifies one training."""

    task: str
    method: str
    rows: int
    seed: int
    lr: float
    epochs: float
    batch_size: int
    rank: int
    dtype: str
    eval_rows: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training gave. `accuracy` is a share of the rows; `seconds` include the loading.

    They are CPU seconds, which other work on the machine does not change.
    """

    accuracy: float
    parameters: int
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Task:
    """Rows to train on, and to be tested on."""

    name: str
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, eval_rows: int | None) -> Task:
        """The task of a folder, tested on dev.jsonl where there is one, else on test.jsonl."""
        held_out = folder / "dev.jsonl"
        test = _fields(read_rows(held_out if held_out.exists() else folder / "test.jsonl"))
        return cls(folder.name, _fields(read_rows(folder / "train.jsonl")), test[:eval_rows])

    def sample(self, rows: int, seed: int) -> list[dict[str, Any]]:
        """A sample of the training rows, which is the same for every method."""
        return random.Random(seed).sample(self.train, min(rows, len(self.train)))


def _fields(rows: Rows) -> list[dict[str, Any]]:
    return [dict(row.fields) for row in rows.rows]


def loreft(positions: str, run: Run, task: Task, model: str) -> Outcome:
    """Train by `reft_runtime.training`, and ask the engine with the file that it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "it.safetensors"
        settings = TrainSettings(
            positions=positions,
            rank=run.rank,
            lr=run.lr,
            epochs=run.epochs,
            batch_size=run.batch_size,
            seed=run.seed,
            dtype=run.dtype,
            hold_out=0,
        )
        begun = time.process_time()
        trained = train(task.sample(run.rows, run.seed), out, model=model, settings=settings)
        seconds = time.process_time() - begun
        report = evaluate([task.test], [str(out)], model=model, dtype=run.dtype, base=False)
        parameters = sum(tensor.numel() for tensor in trained.intervention.tensors.values())
        accuracy = report.value("it", "rows")
        return Outcome(accuracy, parameters, out.stat().st_size, round(seconds, 1))


def plain(run: Run, task: Task, model: str, tune: Callable[[Any], Tuned]) -> Outcome:
    """Train a peer's modules in a plain loop, by the same schedule."""
    begun = time.process_time()
    path, _ = locate(model)
    torch.manual_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    base = AutoModelForCausalLM.from_pretrained(
        path, dtype=choose_dtype(run.dtype, torch.device("cpu")), trust_remote_code=False
    )
    words = Tokenizer(tokenizer, base.config.max_position_embeddings)
    tuned = tune(base)
    fit(
        tuned,
        _examples(task.sample(run.rows, run.seed), words),
        lr=run.lr,
        epochs=run.epochs,
        batch_size=run.batch_size,
        seed=run.seed,
    )
    seconds = time.process_time() - begun
    return Outcome(
        accuracy(tuned, _examples(task.test, words)),
        sum(parameter.numel() for parameter in tuned.parameters),
        tuned.size_bytes,
        round(seconds, 1),
    )


def pyreft(run: Run, task: Task, model: str) -> Outcome:
    """Train pyreft's LoReFT modules."""
    return plain(run, task, model, lambda base: with_pyreft(base, run.rank))


def lora(run: Run, task: Task, model: str) -> Outcome:
    """Train PEFT's LoRA."""
    return plain(run, task, model, with_lora)


def _examples(rows: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[Example]:
    found = read_rows(rows)
    formatter = Formatter(Layout(None, found.rows[0]), tokenizer, tokenizer.eos_ids)
    return [formatter.example(row) for row in found.rows]


REFT_RATES = (2e-3, 4e-3, 8e-3)

METHODS = {
    "LoReFT l1": Method(partial(loreft, "l1"), REFT_RATES),
    "LoReFT f1+l1": Method(partial(loreft, "f1+l1"), REFT_RATES),
    "pyreft l1": Method(pyreft, REFT_RATES),
    "LoRA r=8": Method(lora, (5e-4, 1e-3, 2e-3)),
}


def row(label: str, outcomes: Sequence[Outcome], task: str, lr: float | None) -> str:
    """A line of the table: means over seeds, and the spread of the accuracy."""
    accuracies = [100 * outcome.accuracy for outcome in outcomes]
    spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    last = outcomes[-1]
    cells = [
        task,
        label,
        "-" if lr is None else f"{lr:g}",
        f"{statistics.mean(accuracies):.1f}{spread}",
        f"{last.parameters:,}",
        f"{last.size_bytes / 1000:,.0f}",
        f"{statistics.mean(outcome.seconds for outcome in outcomes):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(
    data: Annotated[Path, typer.Option(help="Folder with a folder for each task.")],
    out: Annotated[Path, typer.Option(help="Finished runs; the script goes on from them.")],
    tasks: Annotated[str, typer.Option(help="Folders of tasks, comma-separated.")] = "sst2,trec",
    methods: Annotated[str, typer.Option(help="Names of methods, comma-separated.")] = ",".join(
        METHODS
    ),
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    rows: Annotated[int, typer.Option(min=1, help="Rows of a training.")] = 2000,
    grid_rows: Annotated[
        int,
        typer.Option(min=0, help="Rows to choose the learning rate on; 0 takes the middle one."),
    ] = 1000,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    epochs: Annotated[float, typer.Option(help="Passes over the rows in every training.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoReFT, which edits all layers.")] = 4,
    eval_rows: Annotated[int | None, typer.Option(min=1, help="Fewer rows to test on.")] = None,
    dtype: Annotated[str, typer.Option(help="Number format of the base's weights.")] = "float32",
) -> None:
    """Train what is not done yet, and print the table."""
    results = FinishedRuns(out, Run, Outcome)
    lines = []
    for name in tasks.split(","):
        task = Task.read(data / name, eval_rows)

        def outcome(method: str, size: int, seed: int, lr: float, task: Task = task) -> Outcome:
            run = Run(task.name, method, size, seed, lr, epochs, batch_size, rank, dtype, eval_rows)
            return results.outcome(run, lambda: METHODS[method].train(run, task, model))

        def base(task: Task = task) -> Outcome:
            report = evaluate([task.test], model=model, dtype=dtype)
            return Outcome(report.value("base", "rows"), 0, 0, 0)

        untrained = Run(task.name, "base", 0, 0, 0, 0, 0, 0, dtype, eval_rows)
        lines.append(row("base", [results.outcome(untrained, base)], name, None))
        for method in methods.split(","):
            rates = METHODS[method].rates
            lr = rates[1]
            if grid_rows:
                lr = max(rates, key=lambda rate: outcome(method, grid_rows, 0, rate).accuracy)
            found = [outcome(method, rows, seed, lr) for seed in range(seeds)]
            lines.append(row(method, found, name, lr))
    print("| task | method | learning rate | accuracy, % | parameters | file, kB | CPU s |")
    print("|---|---|---:|---:|---:|---:|---:|")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)

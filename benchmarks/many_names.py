"""What a server pays for every name that it knows: the start, memory, scans, pages, metrics.

    python -m benchmarks.many_names FOLDER --out docs/measurements/many_names.json

FOLDER gets small files (one layer, rank 1, 6 KB each), as many as the largest count; delete it
afterwards. Only the registry is made, without a model, by a process for each number of names.
Printed is a line for each; times are those of the third of three calls. Three minutes for 100,000.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.measuring import machine, table
from benchmarks.ten_thousand import resident
from reft_runtime.interventions import BaseShape, Edit, Intervention, Registry, serialise

BASE = BaseShape(
    model="SmolLM2-135M-Instruct",
    architecture="LlamaForCausalLM",
    hidden_size=576,
    num_layers=30,
    vocab_size=49152,
)
CALLS = 3


def write_files(folder: Path, count: int) -> None:
    """Write files until there are `count`, which differ in their biases."""
    folder.mkdir(parents=True, exist_ok=True)
    d = BASE.hidden_size
    tensors = {
        "W": torch.randn(1, d) * 0.02,
        "R": torch.linalg.qr(torch.randn(d, 1)).Q.contiguous(),
    }
    for number in range(len(list(folder.iterdir())), count):
        edit = Edit(BASE.num_layers // 2, "l1", {**tensors, "b": torch.tensor([number / 1e6])})
        data = serialise(Intervention.build(BASE, [edit]))
        (folder / f"task-{number}.safetensors").write_bytes(data)


def seconds(call: Callable[[], object]) -> float:
    """The time of the last of some calls, which finds the disk's cache warm."""
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        took = time.perf_counter() - began
    return took


def measured(folder: Path, count: int) -> dict[str, Any]:
    """One line: what `count` names cost."""
    before, began = resident(), time.perf_counter()
    registry = Registry(BASE, [folder])
    start = time.perf_counter() - began
    size = resident() - before
    some = f"task-{count // 2}"
    try:
        return {
            "names": count,
            "start, s": start,
            "memory, KB a name": size * 1024 / count,
            "scan, nothing changed, s": seconds(registry.scan),
            "page by name, ms": 1e3 * seconds(registry.page),
            "search, ms": 1e3 * seconds(lambda: registry.page(q=some)),
            "page by use, ms": 1e3 * seconds(lambda: registry.page(sort="-last_used")),
            "count by tier, ms": 1e3 * seconds(registry.tiers),
            "look up a name, us": 1e6 * seconds(lambda: registry.resolve(some)),
        }
    finally:
        registry.close()


def lines(folder: Path, counts: Sequence[int]) -> list[dict[str, Any]]:
    """A line for each count, the smallest first, each by a process of its own."""
    found = []
    for count in sorted(counts):
        write_files(folder, count)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found.append(process.submit(measured, folder, count).result())
    return found


def main(
    folder: Annotated[Path, typer.Argument(help="Where the files lie, or are made.")],
    counts: Annotated[str, typer.Option(help="Numbers of names.")] = "1000,10000,100000",
    out: Annotated[Path | None, typer.Option(help="Keep the figures here.")] = None,
) -> None:
    """Measure, and print a table."""
    found = lines(folder, [int(count) for count in counts.split(",")])
    rows = [[f"{v:.3g}" if isinstance(v, float) else v for v in line.values()] for line in found]
    print(table([*found[0]], rows))
    if out is not None:
        out.write_text(json.dumps({**machine(), "lines": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

"""Alternating rounds: what every measurement here is made with.

A machine's speed drifts, so a round runs every case once, in an order that changes from round to
round, and cases are compared within their round. Reported are medians, and the median of the
ratios to a reference case with its 90 % bootstrap interval.

The raw figures are saved after every round. A run that was interrupted continues where it
stopped, if machine, torch version and setting are the same.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

from reft_runtime.machine.cores import release_workers

SECONDS = "seconds"

Figures = Mapping[str, float]
"""What one run of a case gave, by name: at least `seconds`, perhaps times to first token."""

Case = Callable[[int], Figures]
"""Runs once, and is given the number of its round: 1 and up, or 0 for the warm-up.

The number is the seed of what must differ between rounds, such as prompts that no prefix cache has
seen."""

Round = dict[str, Figures]
"""The figures of every case, by its label."""

Setting = Mapping[str, str | int]
"""What is equal for all cases of a table, such as the dtype and the number of requests."""


class Group(TypedDict):
    """What a file holds for one setting: the setting with the machine's keys, and the rounds."""

    setting: dict[str, str | int]
    rounds: list[Round]


class Ratio(NamedTuple):
    """A median ratio and the bounds of its 90 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def timed(run: Callable[[int], object]) -> Case:
    """A case whose only figure is the wall-clock time of `run(round_number)`."""

    def case(number: int) -> Figures:
        start = time.perf_counter()
        run(number)
        return {SECONDS: time.perf_counter() - start}

    return case


def machine() -> dict[str, str | int]:
    """What figures depend on beside the case: processor, cores, torch version."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next(
            (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), name
        )
    return {"processor": name, "cores": os.cpu_count() or 1, "torch": torch.__version__}


def measure(
    cases: Mapping[str, Case], rounds: int, setting: Setting, path: Path | None = None
) -> list[Round]:
    """Run all cases for the rounds that are missing in the file `path`; returns all `rounds`.

    Every case runs once unmeasured first, and what one computes in this thread costs the next
    nothing. The file is rewritten after every round.
    """
    done = recorded(path, setting, list(cases))[:rounds]
    labels = list(cases)
    if len(done) < rounds:
        for case in cases.values():
            case(0)
            release_workers()
    for number in range(len(done) + 1, rounds + 1):
        # Shuffled, because what a case leaves behind would always meet the same next one.
        taken = {}
        for label in random.Random(number).sample(labels, len(labels)):
            taken[label] = cases[label](number)
            release_workers()
        done.append({label: taken[label] for label in labels})
        if path is not None:
            _save(path, setting, done)
    return done


def recorded(path: Path | None, setting: Setting, labels: Sequence[str]) -> list[Round]:
    """The rounds in the file that were measured here, in this setting, with all these cases."""
    key = {**machine(), **setting}
    return [
        found
        for group in load(path)
        if group["setting"] == key
        for found in group["rounds"]
        if all(label in found for label in labels)
    ]


def median(rounds: Sequence[Round], label: str, figure: str = SECONDS) -> float:
    """The median of a case's figure over all rounds."""
    return statistics.median(found[label][figure] for found in rounds)


def speed_ratio(
    rounds: Sequence[Round], label: str, reference: str, figure: str = SECONDS
) -> Ratio:
    """How many times as fast as the reference a case is: its time over the case's, by round."""
    return interval([found[reference][figure] / found[label][figure] for found in rounds])


def interval(values: Sequence[float], resamples: int = 2000) -> Ratio:
    """The median of values and its 90 % bootstrap interval; equal values give an equal result."""
    rng = random.Random(0)
    medians = sorted(
        statistics.median(rng.choices(values, k=len(values))) for _ in range(resamples)
    )
    cut = resamples // 20
    return Ratio(statistics.median(values), medians[cut], medians[-cut - 1])


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown with padded columns; columns of numbers or blanks are right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    numeric = [
        all(row[column] == "" or isinstance(row[column], int | float | Ratio) for row in rows)
        for column in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width - 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    ]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def load(path: Path | None) -> list[Group]:
    """All that a file of raw figures holds; nothing where there is no file."""
    if path is None or not path.exists():
        return []
    groups: list[Group] = json.loads(path.read_text())
    return groups


def _save(path: Path, setting: Setting, rounds: list[Round]) -> None:
    key = {**machine(), **setting}
    others = [group for group in load(path) if group["setting"] != key]
    text = json.dumps([*others, {"setting": key, "rounds": rounds}], indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(text + "\n")
    partial.replace(path)

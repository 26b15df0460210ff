"""Trainings that are finished, one JSON line each: a script that was stopped does none again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Run = TypeVar("Run", bound="DataclassInstance")
Outcome = TypeVar("Outcome", bound="DataclassInstance")


class FinishedRuns(Generic[Run, Outcome]):
    """The runs in a file; `run` and `outcome` are frozen dataclasses of plain values.

    A run is what identifies a training, an outcome what the training gave.
    """

    def __init__(self, path: Path, run: type[Run], outcome: type[Outcome]) -> None:
        self._path = path
        self.outcomes: dict[Run, Outcome] = {}
        # A line that a stop cut off has no end.
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        for entry in map(json.loads, lines):
            self.outcomes[run(**entry["run"])] = outcome(**entry["outcome"])

    def outcome(self, run: Run, do: Callable[[], Outcome]) -> Outcome:
        """The outcome of a run. Where the file has none, `do` makes it and it is added."""
        if run not in self.outcomes:
            self.outcomes[run] = made = do()
            entry = json.dumps({"run": asdict(run), "outcome": asdict(made)})
            with self._path.open("a") as file:
                file.write(f"{entry}\n")
            print(entry, flush=True)
        return self.outcomes[run]

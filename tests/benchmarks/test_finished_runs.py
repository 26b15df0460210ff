from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.finished_runs import FinishedRuns


@dataclass(frozen=True)
class Run:
    name: str
    epochs: float


@dataclass(frozen=True)
class Outcome:
    right: int


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    done: list[str] = []

    def ask(name: str) -> Outcome:
        def do() -> Outcome:
            done.append(name)
            return Outcome(len(done))

        return FinishedRuns(path, Run, Outcome).outcome(Run(name, 2), do)

    assert [ask(name).right for name in ("a", "b", "a")] == [1, 2, 1]
    assert done == ["a", "b"]
    path.write_text(path.read_text() + '{"run": {"na')  # stopped while it was written
    assert ask("b") == Outcome(2)

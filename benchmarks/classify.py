"""Classification beside greedy answers: how many rows are right, and rows a second.

SST-2 (`sentiment`) and TREC (`question-type`), each with the intervention that ships and with the
base model alone; all rows are asked at once. Beside both runs the computation of the prompts alone:
no way to read an answer from this model is faster. The prefix cache is off, for no row comes twice.
All run in one process, in alternating rounds (`measuring`).

    python -m benchmarks.classify --data DIR

The data sets are those of `benchmarks.recipes`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measuring import SECONDS, Case, Figures, measure, median, speed_ratio, table
from benchmarks.recipes import RECIPES
from reft_runtime import Engine, SamplingParams
from reft_runtime.training.rows import Rows, read_rows
from reft_runtime.training.scoring import given_label

TASKS = ("sentiment", "question-type")
RIGHT = "right"
CLASSIFY, GREEDY, PROMPTS = "classify", "greedy answers", "the prompts alone"
GREEDY_TOKENS = 16
"""Most tokens of a greedy answer, as where nobody says otherwise."""

_WARM_UP = 64
"""So many rows are asked in the round that is not measured."""


def case(engine: Engine, rows: Rows, labels: Sequence[str], use: str | None, what: str) -> Case:
    """One way to label all rows; its figures are the seconds and the share that is right."""
    prompts = [row.text("prompt") for row in rows.rows]
    wanted = [(row.label or "").strip() for row in rows.rows]

    def found(asked: Sequence[str]) -> list[str | None]:
        if what == CLASSIFY:
            scored = engine.classify(asked, labels, intervention=use, progress=False)
            return [one.label for one in scored]
        sampling = SamplingParams(temperature=0, max_tokens=GREEDY_TOKENS if what == GREEDY else 0)
        answers = engine.generate(asked, sampling, intervention=use, progress=False)
        return [given_label(answer.text, labels) for answer in answers]

    def run(number: int) -> Figures:
        asked = prompts if number else prompts[:_WARM_UP]
        begin = time.perf_counter()
        answers = found(asked)
        seconds = time.perf_counter() - begin
        right = sum(a == b for a, b in zip(answers, wanted, strict=False))
        return {SECONDS: seconds, RIGHT: right / len(asked)}

    return run


def main(
    data: Annotated[Path, typer.Option(help="Folder of the public data sets.")],
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    interventions: Annotated[Path, typer.Option(help="Folder of the interventions.")] = Path(
        "interventions"
    ),
    rows: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures here.")] = None,
) -> None:
    """Print accuracy and rows a second of both ways."""
    written: list[Sequence[object]] = []
    with Engine(model, interventions=interventions, prefix_cache=False) as engine:
        for task in TASKS:
            _, test = RECIPES[task].files(task, data)
            whole = read_rows(str(test))
            asked = Rows(whole.name, whole.rows[:rows], whole.sha256)
            labels = engine.registry.resolve(task).labels or ()
            for use in (task, None):
                cases = {
                    what: case(engine, asked, labels, use, what)
                    for what in (CLASSIFY, GREEDY, PROMPTS)
                }
                setting: dict[str, str | int] = {
                    "dtype": engine.info.dtype,
                    "task": task,
                    "model": use or "base",
                    "rows": len(asked.rows),
                }
                measured = measure(cases, rounds, setting, out)
                for what in cases:
                    seconds = median(measured, what)
                    written.append(
                        (
                            f"{asked.name}, {use or 'base'}: {what}",
                            f"{median(measured, what, RIGHT):.1%}" if what != PROMPTS else "",
                            round(len(asked.rows) / seconds, 1),
                            speed_ratio(measured, what, GREEDY) if what != GREEDY else "",
                        )
                    )
    print(table(("", "right", "rows/s", "over greedy answers"), written))


if __name__ == "__main__":
    typer.run(main)

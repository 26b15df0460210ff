"""Classification beside greedy answers: how many rows are right, and rows a second.

SST-2 (`sentiment`) and TREC (`question-type`), each with the intervention that ships and with the
base model alone. Beside both runs the computation of the prompts alone: no way to read an answer
from this model is faster. All run in one process, in alternating rounds (`measuring`). Each round
has its own part of the rows, asked at once, so that all rounds together ask every row once. The
prefix cache is off.

    python -m benchmarks.classify --data DIR

The data sets are those of `benchmarks.recipes`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measuring import SECONDS, Case, Figures, measure, median, speed_ratio, table
from benchmarks.recipes import RECIPES
from reft_runtime import Engine, SamplingParams
from reft_runtime.training.rows import Rows, read_rows
from reft_runtime.training.scoring import given_label

TASKS = ("sentiment", "question-type")
RIGHT, ASKED = "right", "rows"
CLASSIFY, GREEDY, PROMPTS = "classify", "greedy answers", "the prompts alone"
GREEDY_TOKENS = 16
"""Most tokens of a greedy answer, as where nobody says otherwise."""

_WARM_UP = 64
"""So many rows are asked in the round that is not measured."""


def case(
    engine: Engine, rows: Rows, labels: Sequence[str], use: str | None, what: str, rounds: int
) -> Case:
    """One way to label rows; its figures are the seconds a row, the rows, and how many are right.

    Round k of all `rounds` has every row number k, k + rounds and so on.
    """
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
        part = slice(number - 1, None, rounds) if number else slice(_WARM_UP)
        asked = prompts[part]
        begin = time.perf_counter()
        answers = found(asked)
        seconds = time.perf_counter() - begin
        right = sum(a == b for a, b in zip(answers, wanted[part], strict=True))
        return {SECONDS: seconds / len(asked), ASKED: len(asked), RIGHT: right}

    return run


def main(
    data: Annotated[Path, typer.Option(help="Folder of the public data sets.")],
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    interventions: Annotated[Path, typer.Option(help="Folder of the interventions.")] = Path(
        "interventions"
    ),
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; 1 where others use the machine, too.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures here.")] = None,
) -> None:
    """Print accuracy and rows a second of both ways."""
    written: list[Sequence[object]] = []
    settings: dict[str, Any] = {"interventions": interventions, "threads": threads}
    with Engine(model, prefix_cache=False, **settings) as engine:
        for task in TASKS:
            _, test = RECIPES[task].files(task, data)
            rows = read_rows(str(test))
            labels = engine.registry.resolve(task).labels or ()
            for use in (task, None):
                cases = {
                    what: case(engine, rows, labels, use, what, rounds)
                    for what in (CLASSIFY, GREEDY, PROMPTS)
                }
                setting: dict[str, str | int] = {
                    "dtype": engine.info.dtype,
                    "task": task,
                    "model": use or "base",
                    "rows": len(rows.rows),
                    "rounds": rounds,
                    "threads": engine.info.threads,
                }
                measured = measure(cases, rounds, setting, out)
                for what in cases:
                    right, asked = (
                        sum(found[what][figure] for found in measured) for figure in (RIGHT, ASKED)
                    )
                    written.append(
                        (
                            f"{rows.name}, {use or 'base'}: {what}",
                            f"{right / asked:.1%}" if what != PROMPTS else "",
                            round(1 / median(measured, what), 1),
                            speed_ratio(measured, what, GREEDY) if what != GREEDY else "",
                        )
                    )
    print(table(("", "right", "rows/s", "over greedy answers"), written))


if __name__ == "__main__":
    typer.run(main)

"""The same rows in six layouts: does it matter how a table is written down?

The tickets that ship are trained as a CSV, as prompts and completions with and without a leading
blank, under a template that is a text, as chats by a template, and as messages. Each training is
judged on the tickets held out, in the same layout, by what the engine answers with the written
file: an answer is right where it is the label and nothing else. Layouts that give the same tokens
are trained once. Every finished layout is a line of `--out`, and one that is there is not done
again: the script may be stopped at any time.

    python -m benchmarks.layouts --out layouts.jsonl
"""

from __future__ import annotations

import csv
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.finished_runs import FinishedRuns
from reft_runtime.loading.base import read_words
from reft_runtime.training import TrainSettings, evaluate, train
from reft_runtime.training.join import choose_prefix
from reft_runtime.training.layout import Layout, choose_template
from reft_runtime.training.prompts import Formatter
from reft_runtime.training.rows import read_rows

DATA = Path(__file__).parents[1] / "interventions/data"

Record = dict[str, Any]


def _pair(blank: str) -> Callable[[Record], Record]:
    return lambda row: {"prompt": row["text"], "completion": blank + row["label"]}


def _text(row: Record) -> Record:
    return {"text": row["text"], "completion": row["label"]}


def _messages(row: Record) -> Record:
    user = {"role": "user", "content": row["text"]}
    return {"messages": [user, {"role": "assistant", "content": row["label"]}]}


@dataclass(frozen=True, slots=True)
class Written:
    """A way to write a row of the table down, and the template that belongs to it.

    `record` None is the CSV file as it ships.
    """

    record: Callable[[Record], Record] | None
    template: str | None = None

    def file(self, source: Path, folder: Path) -> Path:
        """The rows of a CSV file in this layout, in a file of the same stem."""
        if self.record is None:
            return source
        written = folder / f"{source.stem}.jsonl"
        with source.open(newline="", encoding="utf-8") as rows:
            lines = [json.dumps(self.record(row)) for row in csv.DictReader(rows)]
        written.write_text("".join(f"{line}\n" for line in lines))
        return written


LAYOUTS = {
    "CSV, text and label": Written(None),
    "prompt, completion with a leading blank": Written(_pair(" ")),
    "prompt, completion without": Written(_pair("")),
    "template `Ticket: {text}\\nLabel:`": Written(_text, "Ticket: {text}\nLabel:"),
    "template `chat`": Written(_pair(""), "chat"),
    "messages": Written(_messages),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What identifies one training."""

    layout: str
    seed: int
    epochs: float | None
    dtype: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training gave: `right` of `rows` answers are the label, and it took `seconds`."""

    right: int
    rows: int
    seconds: float


@dataclass(slots=True)
class Trainings:
    """Files that were trained, in a folder, by seed and by the tokens that they were trained on."""

    folder: Path
    model: str
    done: dict[tuple[int, str], tuple[Path, float]] = field(default_factory=dict)

    def file(self, run: Run) -> tuple[Path, float]:
        """A trained file, and the seconds that its training took."""
        layout = LAYOUTS[run.layout]
        source = layout.file(DATA / "tickets.csv", self.folder)
        key = (run.seed, tokens_of(source, layout.template, self.model))
        if key not in self.done:
            out = self.folder / f"it-{len(self.done)}.safetensors"
            settings = TrainSettings(
                template=layout.template,
                epochs=run.epochs,
                seed=run.seed,
                dtype=run.dtype,
                hold_out=0,
            )
            begun = time.monotonic()
            train(source, out, model=self.model, settings=settings)
            self.done[key] = out, time.monotonic() - begun
        return self.done[key]


def tokens_of(source: Path, template: str | None, model: str) -> str:
    """A digest of all that a training on rows sees: tokens, and where prompts end in them."""
    rows, words = read_rows(source), read_words(model)
    template = template or choose_template(rows, chats=words.knows_chats)
    layout = Layout(template, rows.rows[0])
    prefix = choose_prefix(rows.rows, layout, words)
    formatter = Formatter(layout, words, words.eos_ids, completion_prefix=prefix)
    examples = [formatter.example(row) for row in rows.rows]
    written = json.dumps([(example.tokens, example.prompt_length) for example in examples])
    return hashlib.sha256(written.encode()).hexdigest()


def measure(run: Run, trainings: Trainings) -> Outcome:
    """Train one layout, and ask the engine for the rows held out."""
    layout = LAYOUTS[run.layout]
    out, seconds = trainings.file(run)
    report = evaluate(
        [layout.file(DATA / "tickets-test.csv", trainings.folder)],
        [str(out)],
        model=trainings.model,
        template=layout.template,
        dtype=run.dtype,
        metric="exact",
        base=False,
    )
    [score] = report.scores
    return Outcome(sum(score.right), score.rows, round(seconds, 1))


def finished(path: Path) -> FinishedRuns[Run, Outcome]:
    """The trainings in a file."""
    return FinishedRuns(path, Run, Outcome)


def table(done: dict[Run, Outcome]) -> str:
    """Accuracy by layout in per cent, each seed and their mean, and how far the means differ.

    A layout that not all seeds have been trained in has no mean.
    """
    seeds = sorted({run.seed for run in done})
    lines = [
        f"| layout | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        f"|---|{'---:|' * (len(seeds) + 1)}",
    ]
    means = []
    for layout in LAYOUTS:
        found = {
            run.seed: 100 * outcome.right / outcome.rows
            for run, outcome in done.items()
            if run.layout == layout
        }
        if not found:
            continue
        cells = [f"{found[seed]:.1f}" if seed in found else "" for seed in seeds]
        whole = len(found) == len(seeds)
        if whole:
            means.append(statistics.mean(found.values()))
        lines.append(f"| {layout} | {' | '.join(cells)} | {f'{means[-1]:.1f}' if whole else ''} |")
    if means:
        lines += ["", f"The means are {max(means) - min(means):.1f} points apart."]
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Finished trainings; the script goes on from them.")],
    seeds: Annotated[int, typer.Option(min=1)] = 2,
    epochs: Annotated[
        float | None, typer.Option(help="Passes; by default as many as `reft train` takes.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Number format of the base's weights.")] = "auto",
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
) -> None:
    """Train what is not done yet, and print the table."""
    runs = finished(out)
    wanted = [Run(layout, seed, epochs, dtype) for seed in range(seeds) for layout in LAYOUTS]
    with tempfile.TemporaryDirectory() as folder:
        trainings = Trainings(Path(folder), model)
        done = {run: runs.outcome(run, partial(measure, run, trainings)) for run in wanted}
    print(table(done))


if __name__ == "__main__":
    typer.run(main)

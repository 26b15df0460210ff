"""Commands that put answers of one prompt beside each other: compare, sweep."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_runtime.base.stages import stage
from reft_runtime.display.plots import check_plot
from reft_runtime.errors import ConfigError
from reft_runtime.machine.places import STANDARD_OUTPUT
from reft_runtime.sampling import SamplingParams
from reft_runtime.use import Use
from server.cli.backend import BASE, Applied, Ask, Backend, open_backend
from server.cli.columns import alone, answer_columns, conversation, show_columns
from server.cli.console import console, print_json
from server.cli.local_files import check_there
from server.cli.options import (
    LOCAL_SETTINGS,
    ApiKey,
    AsJson,
    MaxTokens,
    MaybeUrl,
    Prompt,
    Seed,
    System,
    Temperature,
    with_settings,
)
from server.cli.sweep import Point, draw, read_strengths, show_points
from server.cli.terminal import stages_told

if TYPE_CHECKING:
    from reft_runtime.training import Score
    from reft_runtime.training.rows import Rows

app = typer.Typer()


@app.command()
@with_settings(*LOCAL_SETTINGS)
def compare(
    prompt: Prompt,
    intervention: Annotated[
        list[str] | None,
        typer.Option(
            "--intervention",
            "-i",
            metavar="NAME[=STRENGTH][+...]",
            help="What one of the answers is made with: an intervention, or several with a plus "
            "between them, such as pirate+emoji=0.5; may be given several times. Without a "
            "server a file may be named, too.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Let the base model answer first.")
    ] = True,
    system: System = None,
    url: MaybeUrl = None,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Answer one prompt with several interventions.

    All answers are made in one batch, and shown below each other. A running server is asked (--url,
    or the one of this machine), else a model in this process.
    """
    wanted = intervention or []
    if not base and not wanted:
        raise ConfigError("intervention: name one with -i, or leave out --no-base.")
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    columns_of = [column.split("+") for column in wanted]
    backend = open_backend(url, api_key, options, list(chain.from_iterable(columns_of)))
    try:
        applied = [BASE] * base + [backend.resolve(names) for names in columns_of]
        columns = answer_columns(
            backend, [_ask(prompt, system, column, sampling) for column in applied]
        )
    finally:
        backend.close()
    if as_json:
        print_json([column.as_json() for column in columns])
    else:
        show_columns(console(), columns)


@app.command()
@with_settings(*LOCAL_SETTINGS)
def sweep(
    prompt: Prompt,
    intervention: Annotated[
        str,
        typer.Option(
            "--intervention",
            "-i",
            metavar="NAME",
            help="The intervention; without a server a file may be named, too.",
        ),
    ],
    strengths: Annotated[
        str,
        typer.Option(
            metavar="FROM:TO:STEP",
            help="Strengths to try, both ends included; or numbers with commas between them.",
        ),
    ] = "-1:2:0.5",
    system: System = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="DATA",
            help="Rows as for `reft eval`, to show the score at each strength, too.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw divergence, length and score as a picture, such as sweep.png; - is standard "
            "output.",
            show_default=False,
        ),
    ] = None,
    url: MaybeUrl = None,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Answer one prompt at several strengths of an intervention.

    All answers are made in one batch. A running server is asked (--url, or the one of this
    machine), else a model in this process.
    """
    grid = read_strengths(strengths)
    name = Use.parse(intervention).label
    if name != intervention or "+" in intervention:
        raise ConfigError(
            f"intervention: one name, without a strength, not {intervention!r}; --strengths says"
            " at which it is applied."
        )
    picture = None if plot is None else check_plot(plot)
    piped = picture == STANDARD_OUTPUT
    if piped and as_json:
        raise ConfigError("json: standard output has the picture itself; leave out --json.")
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    rows = None if evaluation is None else _read(evaluation)
    scores: list[Score | None] = [None] * len(grid)
    backend = open_backend(url, api_key, options, [name])
    try:
        applied = _at(backend, name, grid)
        if rows is not None:
            with stages_told():
                scores = list(backend.evaluate(rows, [f"{name}={strength!r}" for strength in grid]))
        columns = answer_columns(backend, [_ask(prompt, system, one, sampling) for one in applied])
    finally:
        backend.close()
    points = [Point(*of_one) for of_one in zip(grid, columns, scores, strict=True)]
    if picture is not None:
        draw(picture, name, points)
    if as_json:
        print_json([point.as_json() for point in points])
    else:
        show_points(console(err=piped), points)


def _at(backend: Backend, name: str, grid: list[float]) -> list[Applied]:
    """One intervention at several strengths; it is looked up once."""
    found = backend.resolve([name])
    [use] = found.uses
    return [
        Applied(f"{name}={strength:g}", (Use(use.intervention, strength),), found.one_turn)
        for strength in grid
    ]


def _ask(prompt: str, system: str | None, applied: Applied, sampling: SamplingParams) -> Ask:
    messages = conversation(system, [{"role": "user", "content": prompt}])
    return Ask(alone(messages, applied), applied, sampling, trace=True)


@stages_told()
def _read(data: str) -> Rows:
    """Read the rows to score, before a model is loaded."""
    check_there(data)
    with stage("Starting Python's libraries"):
        from reft_runtime.training.rows import read_rows
    return read_rows(data)

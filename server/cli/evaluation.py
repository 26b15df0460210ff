"""The command `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from reft_runtime.base.stages import stage
from server.cli.console import print_json
from server.cli.local_files import check_model, check_there
from server.cli.options import ApiKey, Dtype, Label, Model, Template, Text, Threads
from server.cli.terminal import stages_told

if TYPE_CHECKING:
    from reft_runtime.training.scoring import Metric

app = typer.Typer()


@app.command("eval")
@stages_told()
def eval_(
    data: Annotated[list[str], typer.Argument(help="Files of rows, as for training.")],
    intervention: Annotated[
        list[str],
        typer.Option(
            "--intervention",
            "-i",
            help="A file, a name in --interventions (or of the server), or a pattern like 's*'; "
            "NAME=0.5 applies it at that strength. May be repeated.",
        ),
    ] = [],  # noqa: B006 - typer's way to say: may be repeated
    model: Model = "demo",
    interventions: Annotated[Path, typer.Option(help="Folder where names are looked up.")] = Path(
        "interventions"
    ),
    metric: Annotated[
        str | None,
        typer.Option(
            help="accuracy (the answer begins with the label), exact or perplexity; by default "
            "accuracy where rows have labels, else perplexity."
        ),
    ] = None,
    prefixes: Annotated[
        bool, typer.Option("--prefixes", help="A label may end inside a word: 1 stands for 10.")
    ] = False,
    text: Text = None,
    label: Label = None,
    template: Template = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    url: Annotated[
        str | None, typer.Option(help="A running server, such as http://127.0.0.1:8000.")
    ] = None,
    api_key: ApiKey = None,
    details: Annotated[
        bool,
        typer.Option(
            "--details",
            help="Figures by label, confusions, wrong rows and what to try next, of several "
            "interventions too; of one they are shown anyway.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with every row's outcome.")
    ] = False,
) -> None:
    """Measure interventions on data sets, beside the base model.

    All prompts run in one batch.
    """
    check_there(*data)
    if url is None:
        check_model(model)
    with stage("Starting Python's libraries"):
        from reft_runtime.training import evaluate

    report = evaluate(
        data,
        intervention,
        url=url,
        api_key=api_key,
        model=model,
        folder=interventions,
        metric=cast("Metric | None", metric),
        prefixes=prefixes,
        text=text,
        label=label,
        template=template,
        dtype=dtype,
        threads=threads,
    )
    if as_json:
        print_json(report.as_json())
        return
    typer.echo(report.table())
    if (details or len(report.interventions) == 1) and (found := report.details()):
        typer.echo(f"\n{found}")

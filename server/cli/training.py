"""Commands that make interventions from rows: check, train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from reft_runtime.base.stages import stage
from reft_runtime.errors import ConfigError
from reft_runtime.machine.places import STANDARD_OUTPUT
from server.cli.local_files import check_free, check_model, check_there
from server.cli.options import (
    ApiKey,
    Description,
    Dtype,
    Force,
    Label,
    License,
    Model,
    Rows,
    Template,
    Text,
    Threads,
    layers_of,
)
from server.cli.terminal import stages_told, stoppable

if TYPE_CHECKING:
    from reft_runtime.interventions.format.manifest import SystemTurn
    from reft_runtime.training import Trained

app = typer.Typer()


@app.command()
def check(
    data: Rows,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Rows by which a training would be judged.")
    ] = None,
    text: Text = None,
    label: Label = None,
    template: Template = None,
    model: Annotated[
        str | None,
        typer.Option(help="Base model whose tokenizer measures the rows; no weights are loaded."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest row in tokens; by default the model's.", min=1)
    ] = None,
) -> None:
    """List everything that is wrong with rows.

    The status is 1 if a training could not begin.
    """
    if max_length is not None and model is None:
        raise ConfigError("--max-length needs --model, whose tokens it counts.", param="max_length")
    check_there(data, evaluation)
    check_model(model)
    from reft_runtime.training import check as run

    found = run(
        data,
        evaluation,
        text=text,
        label=label,
        template=template,
        model=model,
        max_length=max_length,
    )
    for one in found:
        typer.echo(one)
    if any(one.errors for one in found):
        raise typer.Exit(1)


@app.command()
@stages_told()
def train(
    data: Rows,
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write, NAME.safetensors; by default named as the data."),
    ] = None,
    text: Text = None,
    label: Label = None,
    model: Model = "demo",
    kind: Annotated[str, typer.Option(help="Kind of the edits.")] = "loreft",
    layers: Annotated[str, typer.Option(help="Layers to edit: all, or 8,16,24.")] = "all",
    rank: Annotated[
        int | None, typer.Option(help="Rank of the edits; by default 4.", show_default=False)
    ] = None,
    positions: Annotated[str, typer.Option(help="Tokens to edit: l1, f1+l1, ...")] = "l1",
    untied: Annotated[
        bool, typer.Option("--untied", help="Give first and last tokens weights of their own.")
    ] = False,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate; by default from the model's width.")
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Number of passes over the rows; by default 3, more if they are few."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of optimiser steps, instead of --epochs.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of rows in one step.")] = 16,
    accumulate: Annotated[
        int, typer.Option(help="Compute the rows of a step in this many parts, to save memory.")
    ] = 1,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Rows by which the best checkpoint is chosen.")
    ] = None,
    hold_out: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the rows that choose the checkpoint and measure it, instead of --eval; "
            "by default a tenth where rows have labels and are 100 or more. 0 trains on all.",
            show_default=False,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many evaluations, of five, without an improvement.",
            show_default=False,
        ),
    ] = None,
    template: Template = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="What a template that is a text does with a system turn of a chat: prepend (the "
            "default) its text to the user's, drop it, or refuse it."
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest row in tokens; by default the model's.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer rows instead of refusing them.")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Seed of the start values and of the order of rows.")
    ] = 0,
    dtype: Dtype = "auto",
    threads: Threads = None,
    description: Description = "",
    license_: License = None,
    force: Force = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a training that was cut off.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw losses and accuracy as a picture, such as loss.png; - is standard output."
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to log to for TensorBoard.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="URL", help="Put the file on this running server, too.")
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """Train edits on rows, and write a file ready to be served."""
    piped = plot == STANDARD_OUTPUT
    check_there(data, evaluation)
    check_model(model)
    with stoppable():
        with stage("Starting Python's libraries"):
            from reft_runtime.client import Server
            from reft_runtime.training import TrainSettings
            from reft_runtime.training import train as run
            from reft_runtime.training.push import check_push
            from reft_runtime.training.push import push as put
            from reft_runtime.training.sources import file_for
            from reft_runtime.training.target import check_target
        settings = TrainSettings(
            kind=kind,
            layers=layers_of(layers),
            rank=rank,
            positions=positions,
            untied=untied,
            lr=lr,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            template=template,
            max_length=max_length,
            truncate=truncate,
            seed=seed,
            dtype=dtype,
            hold_out=hold_out,
            patience=patience,
        )
        out = check_target(out or file_for(data))
        check_free(out, force=force)
        server = None if push is None else Server(push, api_key)
        if server is not None:
            check_push(server, out.stem, model, settings)
        trained = run(
            data,
            out,
            model=model,
            evaluation=evaluation,
            settings=settings,
            description=description,
            license=license_,
            system=cast("SystemTurn | None", system),
            text=text,
            label=label,
            resume=resume,
            say=lambda line: typer.echo(line, err=True),
            threads=threads,
            plot=plot,
            tensorboard=tensorboard,
        )
    figures = ", ".join(f"{name} {value:.4g}" for name, value in trained.metrics.items())
    typer.echo(
        f"{out}: {out.stat().st_size:,} bytes, trained in {trained.seconds:.0f} s"
        + (f", {figures}" if figures else ""),
        err=piped,
    )
    if server is not None:
        typer.echo(f"{push}: {out.stem} {put(server, out, out.stem)}", err=piped)
    if trained.held_out is not None:
        with stoppable(f"{out} is written; the report on its held-out rows is left out."):
            try:
                typer.echo(_judged(trained, settings.template), err=piped)
            except ConfigError as error:
                # A training may cut rows and tells labels apart by letters; this does neither.
                typer.echo(f"The report on the held-out rows is left out: {error}", err=True)


def _judged(trained: Trained, template: str | None) -> str:
    """What a file answers to the rows that were held out of its training, the base beside it."""
    from reft_runtime.training import evaluate

    assert trained.held_out is not None
    report = evaluate(
        [trained.held_out],
        [str(trained.path)],
        model=trained.model,
        tokenizer=trained.tokenizer,
        template=template,
    )
    return report.details() or report.table()

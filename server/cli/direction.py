"""The command `direction`: a steering file from contrasting texts, or the layer for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_runtime.base.stages import stage
from reft_runtime.display.text import aligned
from reft_runtime.errors import ConfigError
from server.cli.console import print_json
from server.cli.files import write_file
from server.cli.local_files import check_free, check_model, check_there
from server.cli.options import (
    Description,
    Dtype,
    Force,
    License,
    Model,
    Threads,
    layers_of,
    unescaped,
)
from server.cli.terminal import stages_told

if TYPE_CHECKING:
    from reft_runtime.training import Separation

app = typer.Typer()


@app.command()
@stages_told()
def direction(
    positive: Annotated[Path, typer.Argument(help="Texts, one a line, of what is wanted.")],
    negative: Annotated[Path, typer.Argument(help="Texts of the contrary, one a line.")],
    layer: Annotated[
        int | None, typer.Option(help="Layer whose output is steered.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write, NAME.safetensors.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Instead of a file: how well each of these layers tells the texts apart; all, or "
            "8,16,24.",
            show_default=False,
        ),
    ] = None,
    model: Model = "demo",
    template: Annotated[
        str | None,
        typer.Option(
            help="What each text is put into, and a chat when it is served: 'chat' (as a user's "
            "message), or a text with {prompt}.",
            callback=unescaped,
            show_default=False,
        ),
    ] = None,
    read: Annotated[
        str | None,
        typer.Option(
            help="Tokens of each text that are read, such as l1; by default all but the first.",
            show_default=False,
        ),
    ] = None,
    positions: Annotated[str, typer.Option(help="Tokens to steer.")] = "all",
    scale: Annotated[
        float,
        typer.Option(help="Multiply the difference by this: what a request applies at strength 1."),
    ] = 1.0,
    description: Description = "",
    license_: License = None,
    force: Force = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what --layers finds as JSON.")] = (
        False
    ),
) -> None:
    """Make a steering file from contrasting texts, or find its layer.

    Nothing is trained: the steering vector is the difference of two means. --layers writes no file:
    it shows how well each layer tells the texts apart.
    """
    check_there(positive, negative)
    check_model(model)
    with stage("Starting Python's libraries"):
        from reft_runtime.training import direction as run
        from reft_runtime.training import separations
        from reft_runtime.training.direction import read_texts
        from reft_runtime.training.target import check_target

    if layers is not None:
        of_a_file = {
            "layer": layer is not None,
            "out": out is not None,
            "positions": positions != "all",
            "scale": scale != 1,
            "force": force,
            "description": bool(description),
            "license": license_ is not None,
        }
        for option, given in of_a_file.items():
            if given:
                raise ConfigError(
                    f"{option}: --layers writes no file; leave one of them out.", param=option
                )
        chosen = layers_of(layers)
        found = separations(
            read_texts(positive),
            read_texts(negative),
            layers=chosen,
            model=model,
            template=template,
            read=read,
            dtype=dtype,
            threads=threads,
        )
        if as_json:
            print_json([asdict(each) for each in found])
        else:
            typer.echo(_table(found))
        return
    if as_json:
        raise ConfigError("json: goes with --layers; leave it out.", param="json")
    if layer is None:
        raise ConfigError(
            "layer: say which layer is steered; --layers all shows how well each tells the texts"
            " apart.",
            param="layer",
        )
    if out is None:
        raise ConfigError("out: name the file to write, NAME.safetensors.", param="out")
    check_target(out)
    check_free(out, force=force)
    made = run(
        read_texts(positive),
        read_texts(negative),
        layer=layer,
        model=model,
        template=template,
        read=read,
        positions=positions,
        scale=scale,
        description=description,
        license=license_,
        dtype=dtype,
        threads=threads,
    )
    write_file(out, made)
    typer.echo(f"{out}: {out.stat().st_size:,} bytes")


def _table(found: Sequence[Separation]) -> str:
    rows = [("layer", "auroc", "accuracy", "norm", "of a state")]
    rows += [
        (
            str(each.layer),
            f"{each.auroc:.3f}",
            f"{each.accuracy:.1%}",
            f"{each.norm:.2f}",
            f"{each.relative_norm:.3f}",
        )
        for each in found
    ]
    return "\n".join(
        [
            *aligned(rows, numbers=True),
            "auroc, accuracy: of texts left out of the means, in five folds; chance is half",
            "norm: of the vector; of a state: its norm over the mean length of a text's state",
        ]
    )

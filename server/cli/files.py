"""Commands on intervention files: import, inspect, export. No server is involved."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_runtime.display.text import aligned, printable
from reft_runtime.errors import ConfigError
from server.cli.local_files import check_free, check_model, check_there, naming, read_file
from server.cli.options import AsJson, Force

if TYPE_CHECKING:
    from reft_runtime.interventions import Intervention

app = typer.Typer()

_SUFFIXES = (".bin", ".gguf", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".svec")
"""Of other libraries' files."""


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder that pyreft, adapters (ReFT) or PEFT (IA3, BEFT, HRA, LN tuning) saved, "
            "or that of an SAE, a direction.pt, a delta_vector.pth (RED, BREP) or a model with "
            "edits of LoFiT, JoLA or steerling; a control vector in GGUF; vectors that numpy "
            "(.npy), torch (.pt) or safetensors saved; a .svec file. On the Hub: hf:OWNER/REPO or "
            "hf:OWNER/REPO/PATH."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write, or the folder to put it in.")],
    base: Annotated[
        str, typer.Option(help="The base model it was trained on: demo, a folder or a hub id.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the file in a folder; else that of the source.")
    ] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Layer of a vector alone; of several, one to take. May be repeated."),
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="Place that a vector is added to, such as mlp_output.")
    ] = None,
    feature: Annotated[
        int | None, typer.Option(help="Feature of an SAE, or row of a table with one for each.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor of a vector: strength 1 then adds so many of it.")
    ] = None,
    in_norms: Annotated[
        bool,
        typer.Option(
            "--in-norms", help="Vectors as long as the base's rows at their place, times --scale."
        ),
    ] = False,
    positions: Annotated[
        str | None, typer.Option(help="Positions of the training, such as f3+l3.")
    ] = None,
    share_weights: Annotated[
        bool | None,
        typer.Option(
            "--share-weights/--untied",
            help="Whether first and last tokens share their weights.",
        ),
    ] = None,
    act: Annotated[str | None, typer.Option(help="The act_fn of the training, or linear.")] = None,
    suffix_offset: Annotated[
        int | None,
        typer.Option(min=0, help="Last prompt tokens that the training's data set left out."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Kind, where the files fit two; of a direction.pt, steering to add it."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="chat, or a text with {prompt}: how a chat becomes a prompt.")
    ] = None,
    force: Force = False,
) -> None:
    """Make an intervention file of other libraries' edits or vectors.

    A feature of an SAE is a vector, too. What the source does not record must be given. A vector is
    added at all positions, unless --positions names others.
    """
    check_there(source)
    check_model(base, "base")
    from reft_runtime.base.shape import read_base
    from reft_runtime.base.stored import StoredModules
    from reft_runtime.interventions.foreign.formats import import_foreign
    from reft_runtime.interventions.format.words import in_words

    target = _target(out, source, name)
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(target, source):
        raise ConfigError(f"out: {target} is the source itself; give another name.", param="out")
    check_free(target, force=force)
    imported = import_foreign(
        source,
        base=read_base(base)[0],
        modules=StoredModules(base),
        layer=layer or None,
        component=component,
        feature=feature,
        scale=None if in_norms else scale,
        positions=positions,
        share_weights=share_weights,
        act=act,
        suffix_offset=suffix_offset,
        kind=kind,
        template=template,
    )
    if in_norms:
        from reft_runtime.training.norms import in_norms as measured

        imported = measured(imported, model=base, scale=1.0 if scale is None else scale)
    write_file(target, imported)
    count = len(imported.manifest.edits)
    edits = "1 edit" if count == 1 else f"{count} edits"
    typer.echo(f"{target}: {edits}, {target.stat().st_size:,} bytes")
    typer.echo(printable(in_words(imported.manifest)))
    if "assumed" in imported.manifest.training:
        typer.echo(printable(f"assumed: {imported.manifest.training['assumed']}"))
    if in_norms:
        lengths = sorted(tensor.norm().item() for tensor in imported.tensors.values())
        typer.echo(f"length of the vectors: {_range(lengths)}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An intervention file.")],
    base: Annotated[
        str | None, typer.Option(help="Base model (demo, a folder, a hub id), for the share of it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a file holds.

    It is checked first, as it is before it is served.
    """
    check_model(base, "base")
    with naming(file):
        data = read_file(file)
    from reft_runtime.interventions.format.describe import describe

    parameters = None
    if base is not None:
        from reft_runtime.base.shape import count_parameters, read_base  # takes seconds

        parameters = count_parameters(read_base(base)[1])
    with naming(file):
        found = describe(data, parameters)
    typer.echo(
        json.dumps(found, indent=2, ensure_ascii=False) if as_json else printable(_table(found))
    )


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="An intervention file.")],
    to: Annotated[
        tuple[str, Path],
        typer.Option(
            metavar="FORMAT PATH",
            help="Format, and where to write: pyreft and a folder, or gguf and a file.",
        ),
    ],
) -> None:
    """Write a file's edits for pyreft, or its vectors as GGUF.

    For pyreft that is a folder, which it loads; for GGUF one file, a control vector.
    """
    form, path = to
    if form not in ("pyreft", "gguf"):
        raise ConfigError(
            f"to: unknown format {form!r}; write --to pyreft FOLDER, or --to gguf FILE.", param="to"
        )
    with naming(file):
        data = read_file(file)
    from reft_runtime.interventions import parse
    from reft_runtime.interventions.foreign.control_vectors import export_control_vector
    from reft_runtime.interventions.pyreft import export_pyreft

    with naming(file):
        intervention = parse(data)
    try:
        (export_pyreft if form == "pyreft" else export_control_vector)(intervention, path)
    except OSError as error:
        raise ConfigError(f"to: {path} cannot be written: {error.strerror}.", param="to") from None
    typer.echo(f"{path}: written")


def _range(numbers: list[float]) -> str:
    """The numbers, sorted, by their least and largest."""
    least, largest = f"{numbers[0]:.4g}", f"{numbers[-1]:.4g}"
    return least if least == largest else f"{least} to {largest}"


def write_file(path: Path, intervention: Intervention) -> None:
    """Write an intervention file; raises `ConfigError` that names the option."""
    from reft_runtime.interventions import write

    try:
        write(path, intervention)
    except OSError as error:
        raise ConfigError(f"out: {path} cannot be written: {error.strerror}.") from None


def _target(out: Path, source: str, name: str | None) -> Path:
    from reft_runtime.interventions.registry.sources import NAME, NAME_RULE
    from reft_runtime.training.target import check_target

    if os.path.isdir(out):  # pathlib's raises where a name is too long
        stem = os.path.basename(os.path.realpath(source)).lower()
        for suffix in _SUFFIXES:
            stem = stem.removesuffix(suffix)
        stem = name or stem
        if not NAME.fullmatch(stem):
            raise ConfigError(
                f"name: {stem[:80]!r} is no name for an intervention: {NAME_RULE}; give one"
                " (--name).",
                param="name",
            )
        out = out / f"{stem}.safetensors"
    elif name is not None:
        raise ConfigError(f"name: {out} is not a folder, so it is the name already.", param="name")
    return check_target(out)


def _table(found: dict[str, Any]) -> str:
    head = "LAYER COMPONENT KIND POSITIONS RANK ACT TENSORS PARAMETERS RᵀR-I"
    rows = [tuple(head.split())]
    for edit in found["edits"]:
        error, offset = edit["orthonormality_error"], edit["suffix_offset"]
        tensors = " ".join(
            f"{name}[{','.join(map(str, tensor['shape']))}]:{tensor['dtype']}"
            for name, tensor in edit["tensors"].items()
        )
        rows.append(
            (
                str(edit["layer"]),
                edit["component"],
                edit["kind"],
                edit["positions"] + (f" suffix_offset={offset}" if offset else ""),
                str(edit["directions"] or "-"),
                edit["act"] or "-",
                tensors,
                f"{edit['parameters']:,}",
                "-" if error is None else f"{error:.1e}",
            )
        )
    lines = aligned(rows)
    share = "" if found["share"] is None else f" ({found['share']:.4%} of the base model's)"
    manifest = json.dumps(
        {key: value for key, value in found["manifest"].items() if key != "edits"},
        indent=2,
        ensure_ascii=False,
    )
    lines += [
        "",
        f"parameters  {found['parameters']:,}{share}",
        f"size        {found['size_bytes']:,} bytes",
        f"digest      {found['digest']}",
        f"manifest    {manifest}",
    ]
    return "\n".join(lines)

"""Commands that carry files to a running server and back: push, pull."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from glob import glob, has_magic
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from reft_runtime.client import Body, Change, Server
from reft_runtime.display.text import printable
from reft_runtime.errors import ConfigError, NotFound, ReftError
from reft_runtime.interventions.format.identity import MAX_FILE_BYTES, SUFFIX
from reft_runtime.machine.places import STANDARD_OUTPUT
from reft_runtime.reaching import KeyRefused, Unreachable
from server.cli.console import error_console, print_json, size, warn_behind
from server.cli.local_files import check_free, naming, read_file
from server.cli.options import LOCAL_URL, ApiKey, AsJson, Force, Url
from server.cli.tables import short

app = typer.Typer()


@app.command()
def push(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Intervention files, folders of them, or patterns such as 'made/s*'.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            help="Name to serve one file under; by default the file's.", show_default=False
        ),
    ] = None,
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Put files on a running server, under their names.

    What has the name already is replaced. Each file is checked to have arrived whole. Where one is
    refused the others are put all the same, and the status is 2.
    """
    paths = _files(files)
    if name is not None and len(paths) > 1:
        raise ConfigError(f"name: is for one file, and there are {len(paths)}.", param="name")
    server, taken = Server(url, api_key), []
    for path in paths:
        served = path.name.removesuffix(SUFFIX) if name is None else name
        try:
            entry, change = _upload(server, path, served)
        except (Unreachable, KeyRefused):
            raise
        except ReftError as error:
            file = "" if error.message.startswith(str(path)) else f"{path}: "
            typer.echo(printable(f"reft: {file}{error.message}"), err=True)
            continue
        taken.append({**entry, "new": change == "added"})
        if not as_json:
            typer.echo(f"{served}: {change}, {short(entry['digest'])}, {size(entry['size_bytes'])}")
        warn_behind(served, entry)
    if as_json:
        print_json(taken)
    if len(taken) < len(paths):
        if len(paths) > 1:
            typer.echo(f"reft: {len(paths) - len(taken)} of {len(paths)} were not taken.", err=True)
        raise typer.Exit(2)


@app.command()
def pull(
    reference: Annotated[
        str, typer.Argument(metavar="NAME[@DIGEST]", help="An intervention, or a version of it.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write, the folder to put it in, or - for standard output; by default "
            "here, under its name.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a file from a running server.

    It is checked to have arrived whole.
    """
    own = f"{reference.partition('@')[0]}{SUFFIX}"
    path = Path(own) if out is None else out / own if os.path.isdir(out) else out
    if path == STANDARD_OUTPUT:
        if as_json:
            raise ConfigError("json: standard output has the file itself; leave out --json.")
        typer.echo(Server(url, api_key).download(reference)[0], nl=False)
        return
    check_free(path, force=force)
    data, digest = Server(url, api_key).download(reference)
    _write(path, data, force=force)
    if as_json:
        made = {"id": reference, "file": str(path), "digest": digest, "size_bytes": len(data)}
        print_json(made)
    else:
        typer.echo(f"{path}: {short(digest)}, {size(len(data))}")


def _files(given: Sequence[str]) -> list[Path]:
    """The files that arguments name, each once; raises `NotFound` where one names none."""
    found: dict[Path, None] = {}
    for argument in given:
        path = Path(argument)
        if os.path.isdir(path):
            inside = sorted(path.glob(f"*{SUFFIX}"))
        elif has_magic(argument) and not path.exists():
            inside = sorted(p for p in map(Path, glob(argument)) if p.suffix == SUFFIX)
        else:
            inside = [path]
        if not inside:
            raise NotFound(f"{argument}: there is no *{SUFFIX} there.")
        found.update(dict.fromkeys(inside))
    return list(found)


def _upload(server: Server, path: Path, name: str) -> tuple[Body, Change]:
    """Put one file on the server, with a progress bar: its entry, and what that changed."""
    with naming(path):
        status = path.stat()  # a pipe, or a device, may have no end
        fits = stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES
        data = path.read_bytes() if fits else read_file(path)  # which says what it is
    console = error_console()
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(name, total=len(data))
        return server.upload(name, data, lambda sent: progress.advance(task, sent))


def _write(path: Path, data: bytes, *, force: bool) -> None:
    """Write a whole file, or none."""
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_bytes(data)
        if force:
            partial.replace(path)
        else:
            os.link(partial, path)
    except OSError as error:
        raise ConfigError(
            f"out: {path} cannot be written: {error.strerror}.", param="out"
        ) from None
    finally:
        with suppress(OSError):  # it may never have been there
            partial.unlink()

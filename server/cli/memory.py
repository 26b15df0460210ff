"""Commands that say which interventions stay in a running server's memory: pin, unpin, warm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from reft_runtime.client import Body, Server
from server.cli.console import print_json, size, warn_behind
from server.cli.options import LOCAL_URL, ApiKey, AsJson, Url

app = typer.Typer()

Names = Annotated[list[str], typer.Argument(metavar="NAME", help="Interventions.")]


@app.command()
def pin(
    names: Names, url: Url = LOCAL_URL, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Keep interventions in a running server's memory.

    A pin belongs to the name: it stays when the intervention is replaced.
    """
    _each(Server(url, api_key).pin, names, "pinned", as_json=as_json)


@app.command()
def unpin(
    names: Names, url: Url = LOCAL_URL, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Let pinned interventions make room for others again."""
    _each(Server(url, api_key).unpin, names, "not pinned", as_json=as_json)


@app.command()
def warm(
    names: Names, url: Url = LOCAL_URL, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Read interventions into a running server's memory now.

    No request then has to wait for that.
    """
    _each(Server(url, api_key).warm, names, "in memory", as_json=as_json)


def _each(change: Callable[[str], Body], names: list[str], done: str, *, as_json: bool) -> None:
    """Change one name after the other, and say so at once; the first that is refused ends it."""
    entries = []
    for name in dict.fromkeys(names):
        entries.append(change(name))
        if not as_json:
            typer.echo(f"{name}: {done}, {size(entries[-1]['size_bytes'])}")
        warn_behind(name, entries[-1])
    if as_json:
        print_json(entries)

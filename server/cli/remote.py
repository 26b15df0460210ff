"""Commands that manage a running server: ls, show, rm, rollback, ps."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated

import typer
from rich.live import Live

from reft_runtime.client import Body, Server
from reft_runtime.display.text import aligned, printable
from reft_runtime.errors import ConfigError, did_you_mean
from reft_runtime.interventions.registry.paging import SORTS
from server.cli.console import console, print_json, size, table, warn_behind
from server.cli.options import LOCAL_URL, ApiKey, AsJson, Url
from server.cli.overview import busy, overview
from server.cli.tables import ranges, short

app = typer.Typer()

REFRESH_SECONDS = 1.0

LONGEST_LAYERS = 12
"""A listing shows at most this many characters of the layers."""

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of an intervention.")]


@app.command("ls")
def list_(
    query: Annotated[
        str,
        typer.Option(
            "-q",
            "--query",
            metavar="TEXT",
            help="Only those with this in name or description.",
        ),
    ] = "",
    sort: Annotated[
        str,
        typer.Option(
            help="name, size, parameters, modified, requests, in_flight or last_used; with a "
            "minus, as --sort=-requests, the other way round."
        ),
    ] = "name",
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List the interventions of a running server."""
    if sort not in SORTS:
        orders = ", ".join(name for name in SORTS if not name.startswith("-"))
        meant = did_you_mean(sort, SORTS) or f" There are {orders}, each with a minus, too."
        raise ConfigError(f"sort: {sort!r} is no order.{meant}", param="sort")
    entries = list(Server(url, api_key).listing(query, sort))
    if as_json:
        print_json(entries)
        return
    rows = [
        (
            entry["id"],
            " ".join(entry["manifest"]["description"].split()),
            " ".join(entry["kinds"]),
            _layers(entry["layers"]),
            _place(entry),
            size(entry["size_bytes"]),
            f"{entry['requests']:,}",
        )
        for entry in entries
    ]
    columns = {"name": "whole", "description": "cut"}
    columns |= dict.fromkeys(("kinds", "layers", "tier"), "whole")
    if rows:
        console().print(table({**columns, "size": "right", "requests": "right"}, rows))
    else:
        having = f" has {query!r} in its name or description" if query else " is served"
        typer.echo(f"No intervention{having}.", err=True)
    for entry in entries:
        if entry["problem"]:
            typer.echo(f"{entry['id']}: {printable(entry['problem'])}", err=True)


@app.command()
def show(name: Name, url: Url = LOCAL_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show one intervention of a running server, and its versions."""
    server = Server(url, api_key)
    entry, versions = server.entry(name), server.versions(name)
    if as_json:
        print_json({**entry, "versions": versions})
        return
    manifest = entry["manifest"]
    lines = [
        ("name", entry["id"]),
        ("description", manifest["description"]),
        ("digest", entry["digest"]),
        ("kinds", " ".join(entry["kinds"])),
        ("layers", ranges(entry["layers"])),
        ("positions", " ".join(entry["positions"])),
        ("parameters", f"{entry['parameters']:,} ({entry['share']:.4%} of the base model's)"),
        ("template", (manifest["template"] or "").replace("\n", "\\n")),
        ("metrics", json.dumps(manifest["metrics"]) if manifest.get("metrics") else ""),
        ("tier", _place(entry)),
        ("requests", f"{entry['requests']:,} since the start, {entry['in_flight']:,} in flight"),
        ("problem", entry["problem"] or ""),
    ]
    typer.echo("\n".join(aligned([(key, printable(text)) for key, text in lines if text])))
    typer.echo()
    rows = [
        (
            short(version["digest"]),
            "served" if version["current"] else "kept" if version["kept"] else "",
            version["origin"],
            time.strftime("%Y-%m-%d %H:%M", time.localtime(version["modified"])),
            size(version["size_bytes"]),
            str(version["in_flight"]),
        )
        for version in versions
    ]
    columns = dict.fromkeys(("version", "state", "origin", "made"), "whole")
    console().print(table({**columns, "size": "right", "in flight": "right"}, rows))


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Interventions.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Stop serving interventions.

    All names are looked up before any is removed. An upload and its kept versions are deleted. A
    file in the served folder stays where it is.
    """
    server = Server(url, api_key)
    found = [server.entry(name) for name in dict.fromkeys(names)]
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError("yes: nobody can be asked here; --yes removes without asking.")
        what = ", ".join(f"{entry['id']} ({short(entry['digest'])})" for entry in found)
        if not typer.confirm(f"Remove {what} from {server.shown}?"):
            raise typer.Exit(1)
    removed = []
    for entry in found:
        name = entry["id"]
        answer = server.remove(name)
        removed.append({key: answer[key] for key in answer if key != "object"})
        if not as_json:
            below = f"; the {' and the '.join(entry['hides'])}'s serves" if entry["hides"] else ""
            typer.echo(f"{name}: removed{below}")
        warn_behind(name, answer)
    if as_json:
        print_json(removed)


@app.command()
def rollback(
    name: Name,
    digest: Annotated[
        str | None,
        typer.Argument(
            help="The version, 8 digits or more; by default the one served before.",
            show_default=False,
        ),
    ] = None,
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Serve an earlier version of an upload again.

    A second roll-back undoes the first.
    """
    server = Server(url, api_key)
    before = server.entry(name)["digest"]
    entry = server.rollback(name, digest)
    if as_json:
        print_json({**entry, "before": before})
    elif entry["digest"] == before:
        typer.echo(f"{name}: {short(before)} is served already")
    else:
        typer.echo(f"{name}: {short(entry['digest'])} is served, {short(before)} was")
    warn_behind(name, entry)


@app.command()
def ps(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Refresh every second, until Ctrl-C.")
    ] = False,
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show what a running server is doing.

    Requests that run and wait, speeds, and the interventions in use.
    """
    server = Server(url, api_key)
    if not watch:
        stats, used = server.stats(), busy(server)
        if as_json:
            print_json({**stats, "in_use": used})
        else:
            console().print(overview(stats, used))
        return
    if as_json:
        raise ConfigError("watch: is for people; leave out --json, or --watch.", param="watch")
    try:
        with Live(overview(server.stats(), busy(server)), console=console()) as live:
            while True:
                time.sleep(REFRESH_SECONDS)
                live.update(overview(server.stats(), busy(server)), refresh=True)
    except KeyboardInterrupt:
        return


def _place(entry: Body) -> str:
    """Where an intervention's tensors are, and whether they stay there."""
    return f"{entry['tier']}, pinned" if entry["pinned"] else str(entry["tier"])


def _layers(layers: list[int]) -> str:
    """Layers in short; where there are many runs, the first, the last and their number."""
    text = ranges(layers)
    return text if len(text) <= LONGEST_LAYERS else f"{layers[0]}..{layers[-1]} ({len(layers)})"

"""The command that shows what tenants have used."""

from __future__ import annotations

from typing import Annotated

import typer

from reft_runtime.client import Server
from server.cli.console import console, print_json, table
from server.cli.options import LOCAL_URL, ApiKey, AsJson, Url

app = typer.Typer()

COUNTS = {
    "requests": "requests",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "completion_tokens": "generated",
}
"""Columns of a table, by the answer's fields."""


@app.command()
def usage(
    first: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="DAY",
            help="First day, YYYY-MM-DD in UTC; by default 30 days before the last.",
            show_default=False,
        ),
    ] = None,
    last: Annotated[
        str | None,
        typer.Option("--to", metavar="DAY", help="Last day; by default today.", show_default=False),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Only this tenant.", metavar="NAME", show_default=False)
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="WHAT", help="A row for each day, tenant or intervention, or commas between."
        ),
    ] = "tenant",
    url: Url = LOCAL_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show what tenants have used; admins are told of all."""
    given = {"from": first, "to": last, "tenant": tenant, "group_by": by}
    asked = {name: value for name, value in given.items() if value is not None}
    found = Server(url, api_key).usage(**asked)
    if as_json:
        print_json(found)
        return
    groups = [name for name in ("day", "tenant", "intervention") if name in by.split(",")]
    rows = [[str(row[name]) for name in groups] + _counts(row) for row in found["data"]]
    if rows:
        rows.append(["total", *[""] * (len(groups) - 1), *_counts(found["total"])])
        columns = dict.fromkeys(groups, "whole") | dict.fromkeys(COUNTS.values(), "right")
        console().print(table(columns, rows))
    else:
        typer.echo(f"Nothing was used from {found['from']} to {found['to']}.", err=True)
    if not found["kept"]:
        typer.echo("Counted in memory since the server's start: it has no --state-dir.", err=True)
    if found["problem"] is not None:
        typer.echo(f"Problem: {found['problem']}.", err=True)


def _counts(row: dict[str, int]) -> list[str]:
    return [f"{row[name]:,}" for name in COUNTS]

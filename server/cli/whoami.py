"""The command that says who one is to a running server."""

from __future__ import annotations

import typer

from reft_runtime.client import Body, Server
from reft_runtime.display.text import aligned, printable
from server.cli.console import print_json
from server.cli.options import LOCAL_URL, ApiKey, AsJson, Url

app = typer.Typer()

QUOTAS = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "concurrent_requests": "requests at a time",
}
"""Quotas in words, by the answer's fields."""


@app.command()
def whoami(url: Url = LOCAL_URL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show whose key this is, and what it may see, change and use."""
    me = Server(url, api_key).me()
    if as_json:
        print_json(me)
        return
    limits = [
        *(f"{me[name]:,} {words}" for name, words in QUOTAS.items() if me[name] is not None),
        *(f"{name} {most:,}" for name, most in me["limits"].items() if most is not None),
    ]
    lines = [
        ("tenant", me["tenant"]),
        ("role", me["role"]),
        ("sees", " ".join(_seen(me)) or "the base model alone"),
        ("changes", _changed(me)),
        ("limits", ", ".join(limits) or "none"),
        ("base model", me["model"]),
    ]
    typer.echo("\n".join(aligned([(key, printable(text)) for key, text in lines])))


def _seen(me: Body) -> list[str]:
    """The patterns of the names that a tenant sees."""
    own = f"{me['prefix']}*"
    unlisted = me["upload"] and me["prefix"] is not None and own not in me["interventions"]
    return [*me["interventions"], *([own] if unlisted else [])]


def _changed(me: Body) -> str:
    if not me["upload"]:
        return "nothing"
    return "what it sees" if me["prefix"] is None else f"{me['prefix']}*"

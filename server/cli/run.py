"""The command `run`: a file of requests, answered into another one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from reft_runtime.errors import ConfigError, ReftError
from reft_runtime.machine.places import STANDARD_OUTPUT
from reft_runtime.progress import bar
from server.cli.backend import find_server
from server.cli.batch import (
    Line,
    answer_all,
    check_requests,
    is_refused,
    read_requests,
    resume,
)
from server.cli.console import print_json
from server.cli.options import (
    LOCAL_SETTINGS,
    ApiKey,
    AsJson,
    MaybeUrl,
    with_settings,
)
from server.cli.terminal import stages_told, stoppable
from server.settings import load_settings
from server.starting import start_engine
from server.variables import tell_unknown_variables

app = typer.Typer()

Requests = Annotated[Path, typer.Argument(help="Requests, one a line, in OpenAI's batch format.")]


@app.command()
@stages_told()
@with_settings(*LOCAL_SETTINGS)
def run(
    requests: Requests,
    out: Annotated[
        Path,
        typer.Option(
            help="Where the answers go, one a line, in the order of the requests; - is standard "
            "output."
        ),
    ],
    url: MaybeUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Answer a file of requests.

    A running server is asked, or a model in this process.

    What is in the file of answers stays: the same command goes on where it was stopped.
    """
    piped = out == STANDARD_OUTPUT
    if piped and as_json:
        raise ConfigError("json: standard output has the answers themselves; leave out --json.")
    count = check_requests(requests)
    if not piped and out.exists() and out.samefile(requests):
        raise ConfigError(f"out: {out} holds the requests; name another file.", param="out")
    lines = read_requests(requests)
    done, refused = (0, 0) if piped else resume(out, lines)
    if done < count:
        kept = f"The answers so far are in {out}; the same command goes on from there."
        with stoppable("The answers so far are written." if piped else kept):
            refused += asyncio.run(_run(lines, out, done, count, _asked(url, api_key, options)))
    if as_json:
        print_json({"out": str(out), "requests": count, "done_before": done, "refused": refused})
    else:
        before = f", {done:,} of them before" if done else ""
        more = f"; {refused:,} were refused, see `response.body.error`" if refused else ""
        where = "standard output" if piped else out
        typer.echo(f"{where}: {count:,} answers{before}{more}", err=piped)
    if refused:
        raise typer.Exit(1)


async def _run(
    lines: Iterator[Line],
    out: Path,
    done: int,
    count: int,
    asked: AbstractAsyncContextManager[tuple[httpx.AsyncClient, int]],
) -> int:
    """Write the answers that are missing; return how many of these are refusals."""
    refused, piped = 0, out == STANDARD_OUTPUT
    shown = bar(total=count, initial=done, desc="Answers", unit="request")
    opened = nullcontext(typer.get_binary_stream("stdout")) if piped else out.open("ab")
    with shown, opened as file:

        def write(answer: dict[str, Any]) -> None:
            nonlocal refused
            file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
            file.flush()
            refused += is_refused(answer)
            shown.update()

        try:
            async with asked as (client, at_once):
                await answer_all(client, lines, at_once, write)
        except ReftError as error:
            kept = "are written" if piped else f"are in {out}: run it again"
            message = f"{error.message} {shown.n:,} of {count:,} answers {kept}."
            raise type(error)(message, param=error.param) from None
    return refused


@asynccontextmanager
async def _asked(
    url: str | None, api_key: str | None, options: Mapping[str, Any]
) -> AsyncIterator[tuple[httpx.AsyncClient, int]]:
    """A client of the server given, else of this machine's, else of an application in here.

    With it comes how many requests it should send at once.
    """
    server = find_server(url, api_key, options)
    if server is not None:
        async with server.async_client() as client:
            yield client, server.at_once()
        return
    settings = load_settings(options).model_copy(update={"api_key": None, "keys": None})
    tell_unknown_variables()
    engine = start_engine(settings)
    try:
        from server.app import create_app

        application = create_app(engine, settings)
        transport = httpx.ASGITransport(application, raise_app_exceptions=False)
        async with (
            application.router.lifespan_context(application),
            httpx.AsyncClient(transport=transport, base_url="http://in-process") as client,
        ):
            yield client, engine.info.max_running
    finally:
        engine.close()

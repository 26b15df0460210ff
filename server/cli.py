"""The command `reft`. What needs the model is imported late, so that `--help` is quick."""

from __future__ import annotations

import asyncio
import atexit
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, get_args, get_origin

import typer
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from reft_runtime.errors import ReftError
from reft_runtime.stages import stage
from reft_runtime.version import VERSION
from server import files_cli, training_cli
from server.applied import encode, read_asked, resolve
from server.settings import Settings, load_settings
from server.tables import trace_table

if TYPE_CHECKING:
    from reft_runtime.llm import Engine
    from reft_runtime.use import Use

Command = TypeVar("Command", bound=Callable[..., None])

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="One resident language model, many tasks: serve LoReFT interventions per request.",
)
app.add_typer(files_cli.app)
app.add_typer(training_cli.app)


def main() -> None:
    """Entry point of the console command; mistakes end it with a message and no traceback."""
    try:
        app()
    except ReftError as error:
        typer.echo(f"reft: {error.message}", err=True)
        _leave(2)
    except SystemExit as end:
        _leave(end.code)


def _leave(status: str | int | None) -> NoReturn:
    """End the process without what a library of the model's says when Python takes it down.

    Its last lines, some thirty of "nanobind: leaked", would hide the server's own.
    """
    if "torch" not in sys.modules or not isinstance(status, int):
        raise SystemExit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def _reft(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def _with_settings(*names: str) -> Callable[[Command], Command]:
    """Give a command the options of these fields of `Settings`, or of all, as `**options`."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        ours = [_option(name) for name in names or Settings.model_fields]
        signature = signature.replace(parameters=[*own, *ours])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return command

    return decorate


def _option(name: str) -> inspect.Parameter:
    """Option of a settings field; its default None means not given: the environment decides."""
    field = Settings.model_fields[name]
    kind: Any = field.annotation
    if get_origin(kind) is UnionType:
        kind = get_args(kind)[0]
    notes = [f"env: REFT_{name.upper()}"]
    if field.default not in (None, PydanticUndefined):
        notes.append(f"default: {field.default}")
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        flag += f"/--no-{name.replace('_', '-')}"
    option = typer.Option(flag, help=f"{field.description} [{', '.join(notes)}]")
    kind = Annotated[str if kind is SecretStr else kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


@app.command()
@_with_settings()
def serve(**options: Any) -> None:
    """Serve a model and its interventions over HTTP."""
    settings = load_settings(options)
    from server.lifecycle import listen, run, tell_address
    from server.logs import configure_logging

    configure_logging(settings)
    with listen(settings.host, settings.port) as listener:
        tell_address(listener)
        raise SystemExit(run(_engine(settings), settings, listener))


@app.command()
@_with_settings(
    "model", "interventions", "state_dir", "device", "dtype", "max_model_len", "threads"
)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model, as one user's turn.")],
    intervention: Annotated[
        list[str] | None,
        typer.Option(
            "--intervention",
            "-i",
            metavar="WHICH[=STRENGTH]",
            help="Intervention to apply: NAME, NAME@DIGEST or a file, by default at strength 1, as "
            "trained; may be given several times.",
        ),
    ] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Then say on standard error what every edit did."),
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Makes the answer repeatable when temperature is above 0.")
    ] = None,
    **options: Any,
) -> None:
    """Answer one prompt in the terminal, without a server; the answer alone is standard output."""
    settings = load_settings(options)
    from reft_runtime.sampling import SamplingParams

    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    asked = read_asked(intervention or (), settings.model)
    engine = _engine(settings)
    try:
        uses = resolve(engine, asked)
        asyncio.run(_print_answer(engine, prompt, uses, sampling, raw=raw, trace=trace))
    finally:
        engine.close()


def _engine(settings: Settings) -> Engine:
    with stage("Starting Python's libraries"):
        from reft_runtime.llm import Engine

    return Engine(settings.model, **settings.engine_options())


async def _print_answer(
    engine: Engine, prompt: str, uses: list[Use], sampling: Any, *, raw: bool, trace: bool
) -> None:
    if raw:
        tokens: Sequence[int] = engine.tokenizer.encode(prompt)
    else:
        tokens = encode(engine, [{"role": "user", "content": prompt}], uses)
    stream = await engine.open(tokens, sampling, uses, trace=trace)
    async for deltas in stream:
        typer.echo("".join(delta.text for delta in deltas), nl=False)
    typer.echo()
    if trace:
        typer.echo(trace_table(await engine.explain(stream), uses, len(tokens)), err=True)

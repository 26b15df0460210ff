"""The command `reft`. What needs the model is imported late, so that `--help` is quick."""

from __future__ import annotations

import asyncio
import atexit
import errno
import io
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from reft_runtime.display.text import printable
from reft_runtime.errors import ReftError
from reft_runtime.quiet import hide_import_messages
from reft_runtime.reaching import NotServed
from reft_runtime.version import VERSION
from server.cli import chat as chat_cli
from server.cli import classify as classify_cli
from server.cli import cluster as cluster_cli
from server.cli import compare as compare_cli
from server.cli import direction as direction_cli
from server.cli import evaluation as evaluation_cli
from server.cli import files as files_cli
from server.cli import keys as keys_cli
from server.cli import memory as memory_cli
from server.cli import remote as remote_cli
from server.cli import run as run_cli
from server.cli import training as training_cli
from server.cli import transfers as transfer_cli
from server.cli import usage as usage_cli
from server.cli import whoami as whoami_cli
from server.cli.applied import read_asked, resolve, telling_templates
from server.cli.local_files import check_model
from server.cli.options import LOCAL_SETTINGS, MaxTokens, Prompt, Seed, Temperature, with_settings
from server.cli.tables import trace_table
from server.cli.terminal import stages_told
from server.settings import load_settings
from server.starting import check_folders, start_engine
from server.variables import tell_unknown_variables

if TYPE_CHECKING:
    from reft_runtime.front.engine import Engine
    from reft_runtime.front.prompts import Prompt as Asked
    from reft_runtime.use import Use

GROUPS = {
    "Serve": ("serve", "key", "cluster"),
    "Ask": ("generate", "chat", "compare", "sweep", "classify", "run"),
    "Manage a running server": (
        *("ls", "show", "push", "pull", "rm", "rollback"),
        *("pin", "unpin", "warm", "ps", "usage", "whoami"),
    ),
    "Train and measure": ("check", "train", "eval", "direction"),
    "Convert files": ("inspect", "import", "export"),
}
"""The commands as the help shows them."""


_UNCUT = 1_000


class _Grouped(TyperGroup):
    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands below the titles of their groups."""
        width = max(map(len, self.commands))
        for title, names in GROUPS.items():
            with formatter.section(title):
                rows = [(name.ljust(width), self.commands[name]) for name in names]
                formatter.write_dl([(name, one.get_short_help_str(_UNCUT)) for name, one in rows])


app = typer.Typer(
    cls=_Grouped,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="One resident language model, many tasks: serve LoReFT interventions per request.",
)
app.add_typer(chat_cli.app)
app.add_typer(compare_cli.app)
app.add_typer(classify_cli.app)
app.add_typer(remote_cli.app)
app.add_typer(memory_cli.app)
app.add_typer(usage_cli.app)
app.add_typer(whoami_cli.app)
app.add_typer(transfer_cli.app)
app.add_typer(training_cli.app)
app.add_typer(direction_cli.app)
app.add_typer(evaluation_cli.app)
app.add_typer(files_cli.app)
app.add_typer(run_cli.app)
app.add_typer(keys_cli.app, name="key")
app.add_typer(cluster_cli.app, name="cluster")


def main() -> None:
    """Entry point of the console command; mistakes end it with a message and no traceback."""
    status: str | int | None
    hide_import_messages()
    _take_any_text()
    try:
        status = app(standalone_mode=False) or 0
    except ReftError as error:
        typer.echo(printable(f"reft: {_without_passwords(error.message)}"), err=True)
        status = 1 if isinstance(error, NotServed) else 2
    except TyperException as error:
        typer.echo(_without_passwords(_usage(error)), err=True)
        status = error.exit_code
    except KeyboardInterrupt:  # typer itself takes it once it has found the command
        status = 128 + signal.SIGINT
    except typer.Abort:
        typer.echo("Aborted!", err=True)
        status = 1
    except SystemExit as end:
        status = end.code
    except OSError as error:
        if error.filename is not None:
            typer.echo(printable(f"reft: {error.filename}: {error.strerror}."), err=True)
        elif error.errno in _NO_ROOM:
            typer.echo(f"reft: the output cannot be written: {error.strerror}.", err=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed
        else:
            raise
        status = 2
    _leave(status)


_PASSWORD = re.compile(r"(:/{1,2})[^/@\s]+@")


def _without_passwords(message: str) -> str:
    """A message without the user and password of a URL, also of one that was read as a path."""
    return _PASSWORD.sub(r"\1", message)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk answers to those who write to it."""


def _take_any_text() -> None:
    """Let no character end a command that a terminal, a pipe or a file has or cannot show.

    What the output's encoding does not have is written as an escape. Bytes of the input that are
    no text are refused where they are used. A stream that the process was started without, as by
    `>&-`, is one of nothing.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # it ends with the process
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


_EXTRA = re.compile(r"Got unexpected extra argument\S* \((\S+?)[ )]")


def _usage(error: TyperException) -> str:
    """What a mistaken command line is told: one line, or the whole help where nothing was given."""
    message = error.format_message()
    if "\n" in message:
        return message
    context = getattr(error, "ctx", None)
    params = context.command.params if context else ()
    names = {name for one in params for name in one.opts}
    extra = _EXTRA.match(message)
    # As other servers' commands take it. Behind an argument it would be another of its kind.
    if extra and "--model" in names and all(name.startswith("-") for name in names):
        message += f". A model is given by --model {extra[1]}"
    end = "" if message.endswith((".", "?")) else "."
    return f"reft: {message}{end} --help lists what there is."


def _leave(status: str | int | None) -> NoReturn:
    """End the process without what a library of the model's says when Python takes it down.

    Its last lines, some thirty of "nanobind: leaked", would hide the server's own.
    """
    if "torch" not in sys.modules or not isinstance(status, int):
        raise SystemExit(status)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what was written is lost
            status = status or 1
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


@app.command()
@with_settings()
def serve(**options: Any) -> None:
    """Serve a model and its interventions over HTTP."""
    settings = load_settings(options)
    check_model(settings.model)
    check_folders(settings)
    from server.lifecycle import check_exposure, listen, listen_for_metrics, run, tell_address
    from server.logs import configure_logging
    from server.tenants.keys import Keys

    configure_logging(settings)
    tell_unknown_variables()
    Keys.of(settings)  # what is wrong is told before the model is loaded, which may take minutes
    with listen(settings.host, settings.port) as listener, listen_for_metrics(settings) as other:
        check_exposure(listener, settings)
        tell_address(listener)
        raise SystemExit(run(start_engine(settings), settings, listener, other))


@app.command()
@with_settings(*LOCAL_SETTINGS)
def generate(
    prompt: Prompt,
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
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    **options: Any,
) -> None:
    """Answer one prompt in the terminal, without a server.

    Standard output is the answer alone.
    """
    settings = load_settings(options)
    tell_unknown_variables()
    from reft_runtime.sampling import SamplingParams

    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    asked = read_asked(intervention or (), settings.model)
    with stages_told():
        engine = start_engine(settings)
    try:
        uses = resolve(engine, asked)
        asyncio.run(_print_answer(engine, prompt, uses, sampling, raw=raw, trace=trace))
    finally:
        engine.close()


async def _print_answer(
    engine: Engine, prompt: str, uses: list[Use], sampling: Any, *, raw: bool, trace: bool
) -> None:
    asked: Asked = [{"role": "user", "content": prompt}]
    if raw:
        asked = engine.tokenizer.encode(prompt)
    with telling_templates():
        stream = await engine.open(asked, sampling, uses, trace=trace)
    shown = printable if sys.stdout.isatty() else str
    try:
        async for deltas in stream:
            typer.echo(shown("".join(delta.text for delta in deltas)), nl=False)
        typer.echo()
        if trace:
            length = len(stream.assembler.request.prompt)
            typer.echo(trace_table(await stream.trace(), uses, length), err=True)
    finally:
        stream.abort()  # where nobody reads the answer


if __name__ == "__main__":
    main()

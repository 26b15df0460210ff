"""A conversation in the terminal: what is typed, the commands in it, the answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from reft_runtime.display.text import printable
from reft_runtime.errors import ConfigError, InvalidRequest, ReftError, did_you_mean
from reft_runtime.sampling import SamplingParams
from reft_runtime.use import Use, with_strength
from server.cli.backend import BASE, Applied, Ask, Backend, Reply
from server.cli.columns import Message, alone, answer_columns, conversation, show_columns
from server.cli.console import console
from server.cli.tables import trace_table

Read = Callable[[str], str]
"""A function that reads one line behind a prompt, and raises `EOFError` at the end."""

BLOCK = '"""'
NOTHING = "-"


class Chat:
    """One conversation with a backend; `options` are what is applied, as `--intervention` says."""

    def __init__(
        self, backend: Backend, sampling: SamplingParams, options: list[str], system: str | None
    ) -> None:
        self._backend = backend
        self._sampling = sampling
        self._options: list[str] = []
        self._applied: Applied = BASE
        self._turns: list[Message] = []
        self._system = system
        self._tracing = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/use": self._use,
            "/strength": self._strength,
            "/compare": self._compare,
            "/system": self._set_system,
            "/trace": self._trace,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }
        self._apply(options)

    def run(self, read: Read) -> None:
        """Read and answer until the end of the input, or /quit.

        Ctrl-C ends what is typed, or the answer that comes.
        """
        url = self._backend.url
        place = "in this process" if url is None else f"on the server at {url}"
        _note(f"{self._backend.model} {place}. {self._applied_in_words()}")
        self._warn_of_one_turn()
        _note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends.")
        while True:
            try:
                text = read_message(read)
            except KeyboardInterrupt:
                typer.echo()
                continue
            except EOFError:
                typer.echo()
                return
            if text.strip() == "/quit":
                return
            try:
                self._take(text)
            except ReftError as error:
                typer.echo(printable(f"reft: {error.message}"), err=True)

    def _take(self, text: str) -> None:
        if not text.strip():
            return
        if text.startswith("/"):
            name, _, rest = text.partition(" ")
            command = self._commands.get(name)
            if command is None:
                raise InvalidRequest(
                    f"there is no command {name}.{did_you_mean(name, self._commands)} /help lists"
                    " them; what begins with a blank is sent as it is."
                )
            command(rest.strip())
        else:
            self._answer(text)

    def _answer(self, text: str) -> None:
        self._turns.append({"role": "user", "content": text.lstrip(" ")})
        said: list[str] = []
        thought = False

        def think(piece: str) -> None:
            nonlocal thought
            if piece:
                thought = True
                typer.secho(printable(piece), err=True, dim=True, nl=False)

        def say(piece: str) -> None:
            if thought and piece and not any(said):
                typer.echo("\n", err=True)
            said.append(piece)
            sys.stdout.write(printable(piece))
            sys.stdout.flush()

        ask = self._asked(self._applied, trace=self._tracing)
        reply: Reply | None = None
        try:
            reply = self._backend.answer(ask, say, think)
        except KeyboardInterrupt:
            pass
        finally:
            if said:
                typer.echo()
                self._turns.append({"role": "assistant", "content": "".join(said)})
            else:
                del self._turns[-1]
        if reply is None:
            _note("Stopped." if said else "\nStopped.")
            return
        if reply.finish_reason == "length":
            _note(f"Cut off at {reply.tokens} tokens; --max-tokens says how long one may be.")
        if ask.trace:
            _note("\n" + trace_table(reply.trace, ask.applied.uses, reply.prompt_tokens))

    def _asked(self, applied: Applied, *, trace: bool) -> Ask:
        """The conversation up to its last question, for what is applied."""
        messages = alone(conversation(self._system, self._turns), applied)
        return Ask(messages, applied, self._sampling, trace)

    def _use(self, rest: str) -> None:
        """/use NAME[=STRENGTH]...  apply these from now on; /use - none, /use says which"""
        if rest:
            self._apply([] if rest == NOTHING else rest.split())
            self._warn_of_one_turn()
        _note(self._applied_in_words())

    def _strength(self, rest: str) -> None:
        """/strength [NAME] NUMBER  change the strength of what is applied"""
        *names, number = rest.split() or [""]
        uses = [Use.parse(option) for option in self._options]
        try:
            strength = float(number)
        except ValueError:
            raise InvalidRequest("/strength: give a number, such as /strength 0.5.") from None
        known = [use.label for use in uses]
        for name in names:
            if name not in known:
                raise InvalidRequest(
                    f"/strength: {name} is not applied.{did_you_mean(name, known)}"
                )
        if not uses:
            raise InvalidRequest("/strength: nothing is applied; /use NAME does it.")
        if len(uses) > 1 and not names:
            raise InvalidRequest(f"/strength: of which? {', '.join(known)} are applied.")
        changed = names or known
        self._apply(
            [
                with_strength(use.label, strength) if use.label in changed else option
                for use, option in zip(uses, self._options, strict=True)
            ]
        )
        _note(self._applied_in_words())

    def _compare(self, rest: str) -> None:
        """/compare [A B+C=0.5]...  the last question, to the base and each of these"""
        asked = [turn["role"] for turn in self._turns]
        if "user" not in asked:
            raise InvalidRequest("/compare: asks the last question again; there is none yet.")
        wanted = [self._backend.resolve(column.split("+")) for column in rest.split()]
        if not wanted and self._options:
            wanted = [self._applied]
        kept = self._turns
        last = len(asked) - asked[::-1].index("user")
        self._turns = kept[:last]
        try:
            asks = [self._asked(applied, trace=True) for applied in (BASE, *wanted)]
            show_columns(console(), answer_columns(self._backend, asks))
        except KeyboardInterrupt:
            _note("Stopped.")
        finally:
            self._turns = kept

    def _set_system(self, rest: str) -> None:
        """/system TEXT             what the model is told first; /system - nothing"""
        if rest:
            self._system = None if rest == NOTHING else rest
        _note(f"System: {self._system}" if self._system else "No system message.")

    def _trace(self, rest: str) -> None:
        """/trace                   what every edit did, behind each answer; or no longer"""
        self._tracing = not self._tracing
        _note("Traces are on." if self._tracing else "Traces are off.")

    def _reset(self, rest: str) -> None:
        """/reset                   forget the conversation; what is applied stays"""
        self._turns = []
        _note("The conversation is forgotten.")

    def _save(self, rest: str) -> None:
        """/save FILE               write the conversation, a row that `reft train` reads"""
        if not rest:
            raise InvalidRequest("/save: name a file, such as /save talk.jsonl.")
        messages = conversation(self._system, self._turns)
        row = {"messages": messages, "interventions": self._options}
        path = Path(rest).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigError(f"/save: {path} cannot be written: {error.strerror}.") from None
        _note(f"{path}: {len(self._turns)} messages")

    def _help(self, rest: str) -> None:
        """/help                    this"""
        lines = [command.__doc__ or "" for command in self._commands.values()]
        lines.append("/quit                    end, as Ctrl-D does")
        lines.append("")
        lines.append(
            f"A backslash at a line's end goes on in the next; so does {BLOCK}, up to {BLOCK}."
        )
        typer.echo("\n".join(lines))

    def _apply(self, options: list[str]) -> None:
        self._applied = self._backend.resolve(options) if options else BASE
        self._options = options

    def _applied_in_words(self) -> str:
        if not self._options:
            return "No intervention is applied."
        return f"Applied: {', '.join(self._options)}."

    def _warn_of_one_turn(self) -> None:
        if self._applied.one_turn:
            _note("Its template takes one message: each question is asked by itself.")


def read_message(read: Read) -> str:
    """What is typed: a line, or several with a backslash at their ends or in triple quotes."""
    line = read("> ")
    if line.startswith(BLOCK):
        text = line.removeprefix(BLOCK)
        while not text.rstrip().endswith(BLOCK):
            text += "\n" + read("... ")
        return text.rstrip().removesuffix(BLOCK).strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read("... ")
    return line


def _note(text: str) -> None:
    typer.secho(text, err=True, dim=True)

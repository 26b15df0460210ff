"""Who answers a command's questions: a running server, or a model in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from reft_runtime.client import Body, Server
from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions.format.identity import names_file
from reft_runtime.outputs import EditTrace, Trace
from reft_runtime.sampling import SamplingParams
from reft_runtime.use import Use
from server.cli.applied import read_asked, resolve, start_engine
from server.cli.options import LOCAL_URL
from server.cli.terminal import stages_told
from server.settings import load_settings

CHAT = "chat"
"""The template of a manifest that takes whole conversations; so does none."""

Say = Callable[[str], object]
"""Takes the pieces of an answer's text as they come."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What is applied to a request; `label` is how it was asked for, empty for the base model.

    `one_turn` says that its template takes one user's message, not a conversation.
    """

    label: str = ""
    uses: tuple[Use, ...] = ()
    one_turn: bool = False


BASE = Applied()


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat to be answered."""

    messages: Sequence[Mapping[str, str]]
    applied: Applied
    sampling: SamplingParams
    trace: bool = False


_UNTRACED = Trace((), 0.0)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its text and length in tokens, why it ended, and the trace if it was asked for."""

    text: str
    tokens: int
    prompt_tokens: int
    finish_reason: str
    trace: Trace = _UNTRACED


class Backend(Protocol):
    """Answers chats. Mistakes raise `ReftError`s."""

    @property
    def model(self) -> str:
        """The base model's name."""

    @property
    def url(self) -> str | None:
        """The server's address; None for a model in this process."""

    def resolve(self, options: Sequence[str]) -> Applied:
        """What the values of `--intervention` mean together; raises where one is not there."""

    def answer(self, ask: Ask, say: Say) -> Reply:
        """One answer, told as it comes; `KeyboardInterrupt` ends the request and goes on."""

    def answers(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answers to all, computed together."""

    def close(self) -> None:
        """Free what it holds."""


def server_to_ask(url: str | None, api_key: str | None, options: Mapping[str, Any]) -> str | None:
    """The address given, or of this machine's server; None for a model in this process.

    A `model` among the options asks for that.
    """
    if url is not None or options["model"] is not None:
        return url
    return LOCAL_URL if Server(LOCAL_URL, api_key).answers_at_all() else None


def open_backend(url: str | None, api_key: str | None, options: Mapping[str, Any]) -> Backend:
    """Whom `server_to_ask` finds; `options` are those of `Settings` for a model in this process."""
    found = server_to_ask(url, api_key, options)
    return LocalBackend(options) if found is None else RemoteBackend(Server(found, api_key))


class RemoteBackend:
    """A running server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.model = server.models()[0]
        self.url = server.url

    def resolve(self, options: Sequence[str]) -> Applied:
        """As in `Backend`; an unknown name raises `NotServed`."""
        uses = [Use.parse(option) for option in options]
        return Applied("+".join(options), tuple(uses), _one_turn(map(self._template, uses)))

    def answer(self, ask: Ask, say: Say) -> Reply:
        """As in `Backend`."""
        text, ended, usage = "", "", {"prompt_tokens": 0, "completion_tokens": 0}
        traced: list[Body] = []
        body = {**self._body(ask), "stream_options": {"include_usage": True}}
        for event in self._server.stream(_PATH, body):
            usage = event.get("usage") or usage
            traced = event.get("trace", [])
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                ended = choice["finish_reason"] or ended
                text += piece
                say(piece)
        return Reply(
            text, usage["completion_tokens"], usage["prompt_tokens"], ended, *_traces(traced)
        )

    def answers(self, asks: Sequence[Ask]) -> list[Reply]:
        """As in `Backend`."""
        return [_reply(whole) for whole in self._server.ask([(_PATH, self._body(a)) for a in asks])]

    def close(self) -> None:
        """Nothing is held."""

    def _body(self, ask: Ask) -> Body:
        sampling = ask.sampling
        uses = [{"name": use.label, "strength": use.strength} for use in ask.applied.uses]
        return {
            "model": self.model,
            "messages": list(ask.messages),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            **({} if sampling.seed is None else {"seed": sampling.seed}),
            **({"interventions": uses} if uses else {}),
            **({"trace": True} if ask.trace else {}),
        }

    def _template(self, use: Use) -> str | None:
        name, at, _ = use.label.partition("@")
        if names_file(name):
            raise InvalidRequest(
                f"--intervention: a server applies what it has; put the file on it first, with"
                f" `reft push {name}`, and give its name."
            )
        template: str | None = self._server.entry(name)["manifest"]["template"]
        if at:
            self._server.check_model(use.label)
        return template


class LocalBackend:
    """A model in this process, which is loaded first."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        settings = load_settings(options)
        self._given = settings.model
        with stages_told():
            self._engine = start_engine(settings)
        self._runner = asyncio.Runner()  # one loop, for events of an answer may come after its end
        self.model = self._engine.info.model
        self.url = None

    def resolve(self, options: Sequence[str]) -> Applied:
        """As in `Backend`; files may be named, too."""
        uses = resolve(self._engine, read_asked(options, self._given))
        templates = (
            use.intervention.template for use in uses if not isinstance(use.intervention, str)
        )
        return Applied("+".join(options), tuple(uses), _one_turn(templates))

    def answer(self, ask: Ask, say: Say) -> Reply:
        """As in `Backend`."""
        return self._runner.run(self._answer(ask, say))

    def answers(self, asks: Sequence[Ask]) -> list[Reply]:
        """As in `Backend`."""

        async def together() -> list[Reply]:
            return list(await asyncio.gather(*(self._answer(ask, lambda _: None) for ask in asks)))

        return self._runner.run(together())

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()
        self._runner.close()

    async def _answer(self, ask: Ask, say: Say) -> Reply:
        engine, uses = self._engine, ask.applied.uses
        stream = await engine.open(ask.messages, ask.sampling, uses, trace=ask.trace)
        text, count, ended = "", 0, ""
        try:
            async for deltas in stream:
                for delta in deltas:
                    say(delta.text)
                    text += delta.text
                    count += len(delta.tokens)
                    ended = delta.finish_reason or ended
            trace = await stream.trace() if ask.trace else _UNTRACED
        finally:
            stream.abort()
        return Reply(text, count, len(stream.assembler.request.prompt), ended, trace)


_PATH = "/v1/chat/completions"


def _one_turn(templates: Iterable[str | None]) -> bool:
    return any(template not in (None, CHAT) for template in list(templates))


def _reply(whole: Body) -> Reply:
    [choice] = whole["choices"]
    usage = whole["usage"]
    return Reply(
        choice["message"]["content"] or "",
        usage["completion_tokens"],
        usage["prompt_tokens"],
        choice["finish_reason"],
        *_traces(whole.get("trace", [])),
    )


def _traces(written: Sequence[Body]) -> list[Trace]:
    return [
        Trace(
            tuple(EditTrace(**edit) for edit in one["edits"]),
            one["kl"],
            tuple(map(tuple, one["log_ratios"])),
        )
        for one in written
    ]

"""Who answers a command's questions: a running server, or a model in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from reft_runtime.client import Asked, Body, Labelled, Server
from reft_runtime.errors import InvalidRequest
from reft_runtime.front.hop import in_turn
from reft_runtime.front.prepared import Prepared, release_all
from reft_runtime.interventions.format.identity import names_file
from reft_runtime.interventions.format.template import is_text
from reft_runtime.outputs import EditTrace, Trace
from reft_runtime.sampling import SamplingParams
from reft_runtime.use import Use
from server.cli.applied import read_asked, resolve
from server.cli.options import LOCAL_URL
from server.cli.terminal import stages_told
from server.settings import load_settings
from server.starting import start_engine
from server.thoughts import reader_of
from server.variables import tell_unknown_variables

if TYPE_CHECKING:
    from reft_runtime.interventions.registry.holding import Holding
    from reft_runtime.training import Score
    from reft_runtime.training.sources import Data

Say = Callable[[str], object]


def _ignored(piece: str) -> None:
    """Take a piece of text, and do nothing with it."""


"""A function that is given the pieces of an answer's text as they come."""


@dataclass(frozen=True, slots=True)
class Applied:
    """The interventions of a request; `label` is how they were asked for, empty for none.

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
        """The server's address, to be shown; None for a model in this process."""

    def resolve(self, options: Sequence[str]) -> Applied:
        """Look up the values of `--intervention`; raises `NotFound` where one is not there."""

    def answer(self, ask: Ask, say: Say, think: Say = _ignored) -> Reply:
        """Answer one chat, piece by piece; `KeyboardInterrupt` ends the request and is raised.

        `say` gets the answer, and `think` what the model thinks before.
        """

    def answers(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer all chats together, in order."""

    def classify(
        self, asked: Sequence[Asked], labels: Sequence[str] | None, applied: Applied
    ) -> list[Labelled]:
        """The labels of texts or chats, in order; without `labels` those of the files."""

    def evaluate(self, data: Data, interventions: Sequence[str]) -> tuple[Score, ...]:
        """The score of each intervention on rows, as `reft eval` finds it."""

    def close(self) -> None:
        """Free what the backend holds."""


def open_backend(
    url: str | None, api_key: str | None, options: Mapping[str, Any], wanted: Sequence[str] = ()
) -> Backend:
    """The server at the address given, else this machine's, else a model in this process.

    `options` are those of `Settings`; a `model` among them asks for a model in this process.
    `wanted` are the interventions that the command names: files among them are checked before a
    model is loaded.
    """
    server = find_server(url, api_key, options)
    return LocalBackend(options, wanted) if server is None else RemoteBackend(server)


def find_server(url: str | None, api_key: str | None, options: Mapping[str, Any]) -> Server | None:
    """The server that `open_backend` would ask; None if a model in this process is to answer."""
    if url is not None:
        return Server(url, api_key)
    local = Server(LOCAL_URL, api_key)
    return local if options["model"] is None and local.answers_at_all() else None


class RemoteBackend:
    """A running server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.model = server.base_model()
        self.url = server.shown

    def resolve(self, options: Sequence[str]) -> Applied:
        """As in `Backend`; an unknown name raises `NotServed`."""
        uses = [Use.parse(option) for option in options]
        return Applied("+".join(options), tuple(uses), _one_turn(map(self._template, uses)))

    def answer(self, ask: Ask, say: Say, think: Say = _ignored) -> Reply:
        """As in `Backend`."""
        text, ended, usage = "", "", {"prompt_tokens": 0, "completion_tokens": 0}
        traced: list[Body] = []
        body = {**self._body(ask), "stream_options": {"include_usage": True}}
        for event in self._server.stream(_PATH, body):
            usage = event.get("usage") or usage
            traced = event.get("trace", [])
            for choice in event["choices"]:
                think(choice["delta"].get("reasoning_content") or "")
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

    def classify(
        self, asked: Sequence[Asked], labels: Sequence[str] | None, applied: Applied
    ) -> list[Labelled]:
        """As in `Backend`."""
        uses = [{"name": use.label, "strength": use.strength} for use in applied.uses]
        return self._server.classify(asked, labels, {"model": self.model, "interventions": uses})

    def evaluate(self, data: Data, interventions: Sequence[str]) -> tuple[Score, ...]:
        """As in `Backend`."""
        from reft_runtime.training import evaluate

        server = self._server
        report = evaluate([data], interventions, url=server.url, api_key=server.api_key, base=False)
        return report.scores

    def close(self) -> None:
        """Do nothing: a server's client holds nothing."""

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
    """A model in this process, which is loaded when the backend is made."""

    def __init__(self, options: Mapping[str, Any], wanted: Sequence[str] = ()) -> None:
        self._settings = load_settings(options)
        tell_unknown_variables()
        read_asked(wanted, self._settings.model)
        with stages_told():
            self._engine = start_engine(self._settings)
        self._runner = asyncio.Runner()  # one loop, for events of an answer may come after its end
        self.model = self._engine.info.model
        self.url = None

    def resolve(self, options: Sequence[str]) -> Applied:
        """As in `Backend`; files may be named, too."""
        uses = resolve(self._engine, read_asked(options, self._settings.model))
        templates = (
            use.intervention.template for use in uses if not isinstance(use.intervention, str)
        )
        return Applied("+".join(options), tuple(uses), _one_turn(templates))

    def answer(self, ask: Ask, say: Say, think: Say = _ignored) -> Reply:
        """As in `Backend`."""
        return self._runner.run(self._answer(ask, say, think))

    def answers(self, asks: Sequence[Ask]) -> list[Reply]:
        """As in `Backend`."""

        async def together() -> list[Reply]:
            return list(await asyncio.gather(*(self._answer(ask) for ask in asks)))

        return self._runner.run(together())

    def classify(
        self, asked: Sequence[Asked], labels: Sequence[str] | None, applied: Applied
    ) -> list[Labelled]:
        """As in `Backend`."""
        found = self._engine.classify(asked, labels, intervention=applied.uses, progress=False)
        return [Labelled(dict(zip(one.labels, one.probs, strict=True))) for one in found]

    def evaluate(self, data: Data, interventions: Sequence[str]) -> tuple[Score, ...]:
        """As in `Backend`; files may be named, too."""
        from reft_runtime.training import evaluate

        settings = self._settings
        report = evaluate(
            [data],
            interventions,
            engine=self._engine,
            model=settings.model,
            folder=next(iter(settings.folders), None),
            dtype=settings.dtype,
            threads=settings.threads,
            base=False,
        )
        return report.scores

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()
        self._runner.close()

    async def _answer(self, ask: Ask, say: Say = _ignored, think: Say = _ignored) -> Reply:
        engine, uses = self._engine, ask.applied.uses

        def prepare(holding: Holding) -> list[Prepared]:
            return engine.admission.prepare(
                [ask.messages], ask.sampling, uses, trace=ask.trace, thinks=True, holding=holding
            )

        [prepared] = await in_turn(lambda: engine.admission.acquire(uses), prepare, release_all)
        reader = None if prepared.thinking is None else reader_of(prepared.thinking)
        stream = engine.start(prepared)
        text, count, ended = "", 0, ""
        try:
            async for deltas in stream:
                for delta in deltas:
                    thought, said = "", delta.text
                    if reader is not None:
                        thought, said = reader.read(delta.text, ended=bool(delta.finish_reason))
                    think(thought)
                    say(said)
                    text += said
                    count += len(delta.tokens)
                    ended = delta.finish_reason or ended
            trace = await stream.trace() if ask.trace else _UNTRACED
        finally:
            stream.abort()
        return Reply(text, count, len(stream.assembler.request.prompt), ended, trace)


_PATH = "/v1/chat/completions"


def _one_turn(templates: Iterable[str | None]) -> bool:
    return any(is_text(template) for template in list(templates))


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

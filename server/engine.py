"""Protocols of the engine with exactly what the server calls, so that tests can replace it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

if TYPE_CHECKING:
    from reft_runtime.front.admission import Admission
    from reft_runtime.front.prepared import Prepared
    from reft_runtime.interventions import Entry, Version
    from reft_runtime.interventions.registry.entry import (
        Change,
        Page,
        SourceState,
        Tier,
        VersionEntry,
    )
    from reft_runtime.interventions.registry.incoming import Incoming
    from reft_runtime.interventions.registry.paging import Sort
    from reft_runtime.outputs import ChoiceDelta, TokenLogprob, Trace
    from reft_runtime.stats import EngineInfo, EngineStats


class Tokenizer(Protocol):
    """The part of `reft_runtime.text.Tokenizer` that the server uses."""

    @property
    def switches(self) -> Sequence[str]:
        """Names of the chat template's own variables."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that `decode` leaves out of the text with `skip_special_tokens`."""

    @property
    def byte_level(self) -> bool:
        """Whether the text of token ids is that of their joined bytes."""

    @property
    def frame(self) -> str:
        """The `Grammar.frame` of answers to chats; empty for most models."""

    @property
    def tool_template(self) -> str:
        """The model's own chat template for chats with tools; empty if it has none."""

    def token_id(self, text: str) -> int | None:
        """Id of the token that was added for a text; None if there is none."""

    def describe(self) -> dict[str, Any]:
        """Special tokens and chat template, for clients that write prompts themselves."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the token ids."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token adds to a text."""

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own entries for the token ids."""

    def token_text(self, token_id: int) -> str:
        """Text of a token as OpenAI's log-probabilities show it."""


class Registry(Protocol):
    """The part of `reft_runtime.interventions.Registry` that the server uses.

    Every method may be called from any thread. A listing has the names for which `sees` is true.
    """

    def resolve(self, ref: str) -> Version:
        """The version that `NAME` or `NAME@DIGEST` stands for now; raises `NotFound`."""

    def meant(self, ref: str, sees: Callable[[str], bool] = ...) -> str:
        """Question after the error for an unknown name: which name was meant; may be empty."""

    def count(self, name: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Add the tokens of a request that has ended to the counts of a name."""

    def entry(self, name: str) -> Entry:
        """The listing's entry for one name; raises `NotFound`."""

    def entries(self) -> list[Entry]:
        """The listing, sorted by name."""

    def pages(self, sees: Callable[[str], bool] = ...) -> Iterator[list[Entry]]:
        """The listing in parts, sorted by name."""

    def page(
        self,
        q: str,
        sort: Sort,
        after: str | None,
        limit: int,
        sees: Callable[[str], bool] = ...,
    ) -> Page:
        """The first `limit` entries that match `q`, after the place where another page ended."""

    def versions_of(self, name: str) -> Sequence[VersionEntry]:
        """The versions of a name that requests can use, the current one first."""

    def sources(self) -> Sequence[SourceState]:
        """The sources of interventions, and why those that are away cannot be read."""

    def state_problem(self) -> str | None:
        """Why uploads cannot be kept now; None if they can."""

    def unserved(self) -> Mapping[str, str]:
        """Reasons why files are not served, by path, or by name for uploads."""

    def problems(self) -> Mapping[str, str]:
        """The reasons of `unserved`, and the problems of interventions that are listed, by name."""

    def tiers(self) -> Mapping[Tier, int]:
        """Number of interventions by the place of their tensors (disk or host memory)."""

    def held_bytes(self) -> int:
        """Memory that interventions take now, in bytes."""

    def waiting(self) -> int:
        """Number of requests that wait for memory for their interventions."""

    def open(self, ref: str) -> tuple[Version, BinaryIO]:
        """A version and its open file, which the caller closes; raises `NotFound`."""

    def incoming(self) -> Incoming:
        """A temporary file for an upload, which `put` takes."""

    def put(
        self,
        name: str,
        data: Incoming,
        sha256: str | None,
        expected: Collection[str] | None,
        *,
        share: float,
    ) -> Change:
        """Upload a file under a name; `share` is how much of the memory may be taken for good."""

    def load(self, name: str, path: str, *, replace: bool) -> Change:
        """Serve a file of the sources under a name."""

    def rollback(
        self, name: str, digest: str | None, expected: Collection[str] | None, *, share: float
    ) -> Change:
        """Serve a kept version of an upload again."""

    def pin(self, name: str, *, share: float) -> Change:
        """Keep the tensors of a name in memory."""

    def unpin(self, name: str) -> Change:
        """Let the tensors of a name be evicted."""

    def warm(self, name: str) -> Entry:
        """Read the tensors of a name; returns its entry."""

    def remove(
        self, name: str, expected: Collection[str] | None = None, *, uploads_only: bool = False
    ) -> Change:
        """Stop serving what a name stands for; raises `NotFound`."""

    @property
    def shares_state(self) -> bool:
        """Whether other servers may have the same state."""

    def catch_up(self, name: str) -> None:
        """Take in what a name stands for in the state now; raises `Unavailable` if it cannot."""


class Stream(Protocol):
    """The part of `reft_runtime.front.streams.Stream` (one request) that the server uses."""

    @property
    def queue_seconds(self) -> float | None:
        """Seconds that the request waited in the queue; None while it waits."""

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens that came from the prefix cache."""

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """The prompt's log-probabilities; None if not asked for."""

    @property
    def label_logprobs(self) -> tuple[float, ...]:
        """Log-probabilities of the request's labels, once it has ended; empty without labels."""

    listener: Callable[[], None]
    """Called on the event loop when a step told of the request, and when it was aborted."""

    def gained(self) -> list[ChoiceDelta] | None:
        """What the choices gained since the last call, maybe nothing; None once all have ended."""

    async def trace(self) -> Trace:
        """Wait until all choices have ended; return what the request's interventions did."""

    def abort(self) -> None:
        """End the request; does nothing if it has ended."""


class Engine(Protocol):
    """The part of `reft_runtime.front.engine.Engine` that handlers use.

    The registry is not in it: they get it as the tenant sees it, by `Context.registry`.
    """

    @property
    def info(self) -> EngineInfo:
        """What is loaded, and the engine's bounds."""

    @property
    def alive(self) -> bool:
        """Whether the engine can answer; once False it stays False."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""

    @property
    def admission(self) -> Admission:
        """The part that resolves and checks requests."""

    def start(self, prepared: Prepared) -> Stream:
        """Queue a request; what it holds is released when it ends, or is refused."""

    def stats(self) -> EngineStats:
        """A snapshot of load and counters."""


class WholeEngine(Engine, Protocol):
    """The part of `reft_runtime.front.engine.Engine` that the server itself uses."""

    @property
    def registry(self) -> Registry:
        """The interventions that are served."""

    def begin_drain(self) -> None:
        """Refuse new requests from now on."""

    async def drained(self) -> None:
        """Wait until no request is left."""

    def stop(self) -> None:
        """Fail the requests that are left; interventions can still be changed until `close`."""

    def close(self) -> None:
        """Fail the requests that are left, and stop."""

"""The engine as the server sees it: exactly what is called, so that tests can put another there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

if TYPE_CHECKING:
    from reft_runtime.front.admission import Admission
    from reft_runtime.front.prepared import Prepared
    from reft_runtime.interventions import Entry, Version
    from reft_runtime.interventions.registry.entry import Page, Tier, VersionEntry
    from reft_runtime.interventions.registry.paging import Sort
    from reft_runtime.outputs import ChoiceDelta, EngineInfo, EngineStats, TokenLogprob, Trace


class Tokenizer(Protocol):
    """As `reft_runtime.text.Tokenizer`."""

    @property
    def switches(self) -> Sequence[str]:
        """Names of the chat template's own variables."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out of the text."""

    @property
    def byte_level(self) -> bool:
        """Whether the text of ids is that of their bytes, joined."""

    def describe(self) -> dict[str, Any]:
        """What a client needs to write prompts itself."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token adds to a text."""

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own entries for `ids`."""

    def token_text(self, token_id: int) -> str:
        """A token as OpenAI's logprobs show it."""


class Registry(Protocol):
    """As `reft_runtime.interventions.Registry`; every method may be called from any thread."""

    def resolve(self, ref: str) -> Version:
        """The version that `NAME` or `NAME@DIGEST` stands for now."""

    def meant(self, ref: str) -> str:
        """A question to put behind the error for an unknown name; may be empty."""

    def count(self, name: str, prompt_tokens: int, generation_tokens: int) -> None:
        """Add the tokens of a request that has ended."""

    def entry(self, name: str) -> Entry:
        """One line of the listing."""

    def entries(self) -> list[Entry]:
        """The listing, sorted by name."""

    def pages(self) -> Iterator[list[Entry]]:
        """The listing in parts."""

    def page(self, q: str, sort: Sort, after: str | None, limit: int) -> Page:
        """The first `limit` entries that match, behind those where another page ended."""

    def versions_of(self, name: str) -> Sequence[VersionEntry]:
        """The versions of a name that can be asked for, the current one first."""

    def unserved(self) -> Mapping[str, str]:
        """Why files are not served."""

    def problems(self) -> Mapping[str, str]:
        """As `unserved`, and what is wrong with those that are listed."""

    def tiers(self) -> Mapping[Tier, int]:
        """How many interventions have their tensors where."""

    def held_bytes(self) -> int:
        """Memory that they take."""

    def open(self, ref: str) -> tuple[Version, BinaryIO]:
        """A version and its file, which whoever asks closes."""

    def put(
        self, name: str, data: bytes, sha256: str | None, expected: Collection[str] | None
    ) -> tuple[Entry, bool]:
        """Upload a file under a name; the entry that it made, and whether the name is new."""

    def load(self, name: str, path: str, replace: bool) -> object:
        """Load a file inside the sources under a name."""

    def rollback(self, name: str, digest: str | None, expected: Collection[str] | None) -> Entry:
        """Serve an uploaded version again that is still kept; the entry that it made."""

    def remove(self, name: str, expected: Collection[str] | None = None) -> None:
        """Take away what a name stands for."""


class Stream(Protocol):
    """As `reft_runtime.front.streams.Stream`: one request; iterate it for what it gains."""

    @property
    def queue_seconds(self) -> float | None:
        """How long it waited; None while it waits."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """The prompt's log-probabilities, if asked for."""

    def __aiter__(self) -> AsyncIterator[list[ChoiceDelta]]:
        """What its choices gained, step by step."""

    async def trace(self) -> Trace:
        """What the interventions of a traced request did, when all its choices have ended."""

    def abort(self) -> None:
        """End the request; does nothing if it has ended."""


class Engine(Protocol):
    """As `reft_runtime.front.engine.Engine`."""

    @property
    def info(self) -> EngineInfo:
        """What is loaded, and its bounds."""

    @property
    def alive(self) -> bool:
        """Whether it can answer; once False it stays so."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""

    @property
    def registry(self) -> Registry:
        """The interventions."""

    @property
    def admission(self) -> Admission:
        """Resolves and checks requests."""

    def start(self, prepared: Prepared) -> Stream:
        """Queue a request; what it holds is let go when it ends, or is refused."""

    def stats(self) -> EngineStats:
        """A snapshot of load and counters."""

    def begin_drain(self) -> None:
        """Take no new request from now on."""

    async def drained(self) -> None:
        """Wait until no request is left."""

    def close(self) -> None:
        """Fail what is left and stop."""

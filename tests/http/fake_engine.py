"""An engine without a model: every token is a byte, and the answer is the alphabet, over and over.

It keeps the contract of `reft_runtime.front.engine.Engine` and records what the server asked of it.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from reft_runtime.caller import everything
from reft_runtime.errors import (
    Draining,
    EngineDead,
    InvalidRequest,
    NotFound,
    Overloaded,
    ReftError,
    UnknownName,
    did_you_mean,
)
from reft_runtime.front.admission import Admission
from reft_runtime.front.prepared import Prepared
from reft_runtime.grammar import GrammarCompiler
from reft_runtime.outputs import ChoiceDelta, FinishReason, TokenLogprob, Trace
from reft_runtime.reasoning import Channels, Marks, Thinking
from reft_runtime.sampling import Grammar
from reft_runtime.schedule.request import Request
from reft_runtime.stats import EngineInfo, EngineStats, PrefixCacheStats, SnapshotStats

if TYPE_CHECKING:
    from reft_runtime.interventions import Registry
    from reft_runtime.interventions.registry.entry import Change, SourceState, Tier
    from reft_runtime.text import Message

ALPHABET = b"abcdefghijklmnopqrstuvwxyz"
DIGEST = "d1" * 32
EOS = 0


class FakeTokenizer:
    byte_level = True
    special_ids: frozenset[int] = frozenset()
    switches: tuple[str, ...] = ("enable_thinking",)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, completion_prefix: str = ""
    ) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self,
        messages: Sequence[Message],
        template: str | None = None,
        *,
        system: str = "prepend",
        completion_prefix: str = "",
        options: Any = None,
        add_special_tokens: bool | None = None,
    ) -> list[int]:
        self.last_options = options
        for name in () if options is None else options.switches:
            if name not in self.switches:
                raise InvalidRequest(
                    "The template has no such switch.", param=f"chat_template_kwargs.{name}"
                )
        if template not in (None, "chat") and len(messages) > 1:
            raise InvalidRequest("This template takes one user message.", param="messages")
        if template is not None and template != "chat":
            return self.encode(template.replace("{prompt}", messages[0]["content"]))
        self.last_messages = messages
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    def laid_out(self, text: str, template: str) -> None:
        return None

    marks: Marks | Channels | None = None
    """Marks of bytes, each of which ends with the byte that is its id."""

    frame = ""

    def thinking(self, prompt: Sequence[int], said: str | None = None) -> Thinking | None:
        if self.marks is None:
            return None
        return self.marks.after(self.decode(prompt)) if said is None else self.marks.within(said)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")

    tool_template = ""

    def token_id(self, text: str) -> int | None:
        return None

    def describe(self) -> dict[str, Any]:
        sizes = {"vocab_size": 256, "model_max_length": 64}
        return {"tokenizer_class": "FakeTokenizer", **sizes, "chat_template": None}

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        return [self.token_text(token) for token in ids]

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


@dataclass
class FakeVersion:
    name: str
    digest: str = DIGEST
    template: str | None = None
    system_turn: str = "prepend"
    completion_prefix: str | None = None
    texts: str | None = None
    labels: tuple[str, ...] | None = None
    size_bytes: int = 3

    in_flight: int = 0

    @property
    def manifest_json(self) -> bytes:
        return json.dumps({"template": self.template}).encode()

    def edits(self) -> tuple[()]:
        return ()


class FakeHolding:
    """Versions that are held, and ready at once."""

    granted = True

    def __init__(self, versions: list[Any]) -> None:
        self.versions = versions
        self.ready: Future[None] = Future()
        self.ready.set_result(None)
        self._released = False

    def release(self) -> None:
        for version in () if self._released else self.versions:
            version.in_flight -= 1
        self._released = True


class FakeIncoming:
    """A file that is being uploaded, in memory."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, part: bytes) -> None:
        self.data += part

    def discard(self) -> None:
        pass


class FakeRegistry:
    """Its versions are `FakeVersion`s, written `Any` where the contract says `Version`."""

    def __init__(self, *versions: FakeVersion) -> None:
        self.closed = False
        self.versions = {version.name: version for version in versions}
        self.tokens: dict[str, tuple[int, int]] = {}
        self.pinned: set[str] = set()
        self.places: list[SourceState] = []
        self.state: str | None = None

    def resolve(self, ref: str) -> Any:
        name, at, prefix = ref.partition("@")
        version = self.versions.get(name)
        if version is None or (at and (len(prefix) < 8 or not version.digest.startswith(prefix))):
            raise NotFound(f"The model `{ref}` does not exist.", param="model")
        return version

    def acquire(self, refs: Any) -> Any:
        versions = [self.resolve(ref) if isinstance(ref, str) else ref for ref in refs]
        for version in versions:
            self.hold(version)
        return FakeHolding(versions)

    def hold(self, version: Any) -> None:
        version.in_flight += 1

    def release(self, version: Any) -> None:
        version.in_flight -= 1

    def meant(self, ref: str, sees: Callable[[str], bool] = everything) -> str:
        names = [name for name in self.versions if sees(name)]
        return "" if ref.partition("@")[0] in names else did_you_mean(ref, names)

    def entry(self, name: str) -> Any:
        if name not in self.versions:
            raise UnknownName(name, self.meant(name))
        version = self.versions[name]
        return SimpleNamespace(
            name=name,
            digest=version.digest,
            versions=(version.digest,),
            origin="folder",
            tier="host",
            pinned=name in self.pinned,
            in_flight=version.in_flight,
            requests=0,
            prompt_tokens=self.tokens.get(name, (0, 0))[0],
            generation_tokens=self.tokens.get(name, (0, 0))[1],
            last_used=None,
            size_bytes=version.size_bytes,
            modified=1.5e9,
            problem=None,
            hides=(),
            summary=SimpleNamespace(
                description="",
                kinds=("loreft",),
                positions=("l1",),
                layers=(1,),
                parameters=10,
                directions=4,
            ),
            manifest_json=version.manifest_json,
        )

    def entries(self) -> list[Any]:
        return [self.entry(name) for name in sorted(self.versions)]

    def pages(self, sees: Callable[[str], bool] = everything) -> Iterator[list[Any]]:
        yield [entry for entry in self.entries() if sees(entry.name)]

    def page(
        self,
        q: str,
        sort: str,
        after: str | None,
        limit: int,
        sees: Callable[[str], bool] = everything,
    ) -> Any:
        self.last_page = (q, sort, after, limit)
        [entries] = self.pages(sees)
        return SimpleNamespace(entries=entries[:limit], total=3, next="next")

    def open(self, ref: str) -> tuple[Any, io.BytesIO]:
        version = self.resolve(ref)
        return version, io.BytesIO(b"abc")

    def versions_of(self, name: str) -> list[Any]:
        from reft_runtime.interventions.registry.entry import VersionEntry  # loads torch

        entry = self.entry(name)
        return [
            VersionEntry(entry.digest, "uploaded", 3, 1.5e9, in_flight=0, current=True, kept=True)
        ]

    def rollback(
        self, name: str, digest: str | None, expected: Any = None, *, share: float = 1.0
    ) -> Change:
        entry = self.entry(name)
        self.last_rollback = (name, digest, expected)
        return _change(entry.digest, entry)

    def held_bytes(self) -> int:
        return 1234

    def waiting(self) -> int:
        return 0

    def tiers(self) -> dict[Tier, int]:
        return {"disk": 0, "host": len(self.versions)}

    def sources(self) -> list[SourceState]:
        return self.places

    def state_problem(self) -> str | None:
        return self.state

    def unserved(self) -> dict[str, str]:
        return self.problems()

    def problems(self) -> dict[str, str]:
        return {"broken.safetensors": "Cut off."}

    def count(self, name: str, prompt_tokens: int, generation_tokens: int) -> None:
        prompt, generated = self.tokens.get(name, (0, 0))
        self.tokens[name] = (prompt + prompt_tokens, generated + generation_tokens)

    def incoming(self) -> Any:
        return FakeIncoming()

    def put(
        self,
        name: str,
        data: Any,
        sha256: str | None = None,
        expected: Any = None,
        *,
        share: float = 1.0,
    ) -> Change:
        assert not self.closed
        self.last_put = (data if isinstance(data, bytes) else data.data, sha256)
        before = self.versions.get(name)
        self.versions[name] = FakeVersion(name)
        return _change(None if before is None else before.digest, self.entry(name))

    def load(self, name: str, path: str, *, replace: bool = False) -> Change:
        if name in self.versions and not replace:
            raise InvalidRequest(f"The intervention `{name}` is loaded already.", param="name")
        if path.startswith("/"):
            raise InvalidRequest("The path leads outside the sources.", param="path")
        before = self.versions.get(name)
        self.versions[name] = FakeVersion(name)
        return _change(None if before is None else before.digest, self.entry(name))

    def pin(self, name: str, *, share: float = 1.0) -> Change:
        self.entry(name)
        self.pinned.add(name)
        return _change(self.versions[name].digest, self.entry(name))

    def unpin(self, name: str) -> Change:
        self.entry(name)
        self.pinned.discard(name)
        return _change(self.versions[name].digest, self.entry(name))

    def warm(self, name: str) -> Any:
        return self.entry(name)

    shares_state = True

    def catch_up(self, name: str) -> None:
        pass

    def remove(self, name: str, expected: Any = None, *, uploads_only: bool = False) -> Change:
        before = self.entry(name).digest
        del self.versions[name]
        return _change(before, None)


def _change(before: str | None, left: Any) -> Change:
    from reft_runtime.interventions.registry.entry import Change  # loads torch

    return Change(before, left)


@dataclass
class FakeEngine:
    info: EngineInfo = field(
        default_factory=lambda: EngineInfo(
            model="tiny",
            architecture="TinyForCausalLM",
            dtype="float32",
            device="cpu",
            threads=1,
            max_model_len=100,
            max_running=8,
            vocab_size=256,
            parameters=1000,
            memory_bytes=4_000_000,
            intervention_bytes=2_000_000,
            kv_bytes=1_000_000,
            kv_tokens=800,
        )
    )
    alive: bool = True
    heartbeat_age: float = 0.0
    overloaded: bool = False
    fail_after: int | None = None
    """Steps after which every request fails."""
    says: bytes | None = None
    """Whole answer, one byte a step; None for the alphabet, until `max_tokens`."""
    step_seconds: float = 0.0
    die_after: float | None = None
    """Seconds after which the engine dies, counted from the second request (after the canary)."""
    draining: bool = False
    names: int = 0
    """Interventions that it has beside its own."""
    streams: list[FakeStream] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.own = FakeRegistry(
            FakeVersion("emoji"),
            FakeVersion("pirate", "e2" * 32, template="Q: {prompt} A:"),
            FakeVersion("formal", "f3" * 32, template="{prompt} =>"),
            *(FakeVersion(f"{'x' * 60}{i}") for i in range(self.names)),
        )
        self.registry: FakeRegistry | Registry = self.own
        """Its own, or one that a test puts in its place."""

    @property
    def admission(self) -> Admission:
        return Admission(self.registry, self.tokenizer, _Grammars(), self.info, {0})

    @property
    def running(self) -> list[FakeStream]:
        return [stream for stream in self.streams if not stream.ended]

    @property
    def held(self) -> int:
        """How often its own versions are held."""
        return sum(version.in_flight for version in self.own.versions.values())

    def start(self, prepared: Prepared) -> FakeStream:
        try:
            if not self.alive:
                raise EngineDead("The engine stopped.")
            if self.draining:
                raise Draining("The server is shutting down.", retry_after=2.5)
            if self.overloaded:
                raise Overloaded("The queue is full.", retry_after=2.5)
        except ReftError:
            prepared.release()
            raise
        stream = FakeStream(self, prepared)
        self.streams.append(stream)
        if self.die_after is not None and len(self.streams) > 1:
            asyncio.get_running_loop().call_later(self.die_after, self.close)
        return stream

    def stats(self) -> EngineStats:
        cache = PrefixCacheStats(
            queries={"base": 48, "own": 16},
            hits={"base": 32, "own": 0},
            blocks={"base": 3, "own": 1},
            evictions=2,
            snapshots=SnapshotStats(kept=3, places=8, hits=5, evictions=1),
        )
        return EngineStats(len(self.running), 0, 0.5, 1, 5, 7, 0, self.heartbeat_age, cache)

    def begin_drain(self) -> None:
        self.draining = True

    async def drained(self) -> None:
        while self.running:
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        self.alive = False

    def close(self) -> None:
        self.stop()
        self.own.closed = True


class FakeStream:
    def __init__(self, engine: FakeEngine, prepared: Prepared) -> None:
        request: Request = prepared.request
        self.engine, self.prompt, self.sampling = engine, request.prompt, request.sampling
        strengths = [applied.strength for applied in request.interventions]
        self.interventions = list(zip(prepared.versions, strengths, strict=True))
        self.salt = request.salt
        self.cached_tokens = len(self.prompt) // 2
        self.queue_seconds: float | None = None
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.labels = request.labels
        self.label_logprobs: tuple[float, ...] = ()
        self.aborted = self.ended = False
        self.listener: Callable[[], None] = lambda: None
        self._release = prepared.release
        self._gained: list[ChoiceDelta] = []
        self._error: Exception | None = None
        self._told = False
        self._task = asyncio.ensure_future(self._tell())

    async def trace(self) -> Trace:
        return Trace((), 0.0)

    def abort(self) -> None:
        self.aborted = self.aborted or not self.ended
        self._end()

    def _end(self) -> None:
        self.ended = True
        self._task.cancel()
        self._release()

    def gained(self) -> list[ChoiceDelta] | None:
        if self._gained:
            gained, self._gained = self._gained, []
            return gained
        if self._error is not None:
            raise self._error
        return None if self._told else []

    async def _tell(self) -> None:
        try:
            async for deltas in self.steps():
                self._gained += deltas
                self.listener()
        except Exception as error:
            self._error = error
        self.ended = self._told = True
        self._release()
        self.listener()

    async def steps(self) -> AsyncIterator[list[ChoiceDelta]]:
        sampling, engine = self.sampling, self.engine
        count, letters = sampling.max_tokens or 0, ALPHABET
        ended: Literal["stop", "length"] = "length"
        if engine.says is not None:
            letters = engine.says
            ended = "stop" if len(letters) <= count else "length"
            count = min(len(letters), count)
        self.queue_seconds = 0.25
        if sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None, *(self._logprob(token) for token in self.prompt[1:])]
        if self.labels is not None:  # a later label is half as likely as the one before it
            await asyncio.sleep(engine.step_seconds)
            self.label_logprobs = tuple(-i * math.log(2) for i, _ in enumerate(self.labels.labels))
        if count == 0:
            why: FinishReason = "length" if self.labels is None else "stop"
            yield [ChoiceDelta(i, "", finish_reason=why) for i in range(sampling.n)]
        for step in itertools.islice(itertools.count(), count):
            await asyncio.sleep(engine.step_seconds)
            if not engine.alive:
                raise EngineDead("The engine stopped.")
            if engine.fail_after is not None and step >= engine.fail_after:
                raise _Secret("weights at /secret/path")
            token = letters[step % len(letters)]
            last = step == count - 1
            yield [
                ChoiceDelta(
                    index,
                    chr(token),
                    (token,),
                    () if sampling.logprobs is None else (self._logprob(token),),
                    ended if last else None,
                )
                for index in range(sampling.n)
            ]

    def _logprob(self, token: int) -> TokenLogprob:
        wanted = max(self.sampling.logprobs or 0, self.sampling.prompt_logprobs or 0)
        others = [(ord("x"), -0.25), (ord("y"), float("-inf"))]
        return TokenLogprob(token, -0.5, tuple(others[:wanted]))


class _Grammars(GrammarCompiler):
    """Takes every grammar; the answers do not follow it."""

    def __init__(self) -> None:
        super().__init__(lambda: None, 256, ())

    def compiling(self, grammar: Grammar, tenant: str = "") -> Any:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def start(self, grammar: Grammar, tenant: str = "") -> Any:
        return None


class _Secret(ReftError):
    """A fault whose message must not reach a client."""

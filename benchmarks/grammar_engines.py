"""llguidance and xgrammar behind one interface, each in a process of its own.

A process, because a schema can take one for ever, fill its memory or end it: the caller stops it
after a time and starts another one.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

LIMIT_SECONDS = 20
MEMORY_BYTES, STACK_BYTES = 12 << 30, 300 << 20


class Vocabulary(NamedTuple):
    """The bytes of every token; `end` is the token that ends a text."""

    tokens: list[bytes]
    end: int


class Walk(NamedTuple):
    """How far a text was accepted: whether to its end, and the seconds of each mask."""

    accepted: bool
    masks: list[float]


class Outcome(NamedTuple):
    """What became of a schema: `error` is empty where it compiled."""

    error: str
    compile_seconds: float = 0.0
    walks: Sequence[Walk] = ()
    peak_mib: float = 0.0


class Matcher(Protocol):
    """The state of one text."""

    def mask(self) -> Any:
        """The packed row of what may come next, valid until the next call."""

    def advance(self, token: int) -> bool:
        """Take one token; False where it is not allowed."""


Compile = Callable[[str], Callable[[], Matcher]]
"""Compiles a schema to what makes matchers; raises ValueError with the engine's message."""


def _llguidance(vocabulary: Vocabulary, *, bounded: bool = False) -> Compile:
    import llguidance
    import torch

    from reft_runtime.grammar.source import LIMITS

    split = greedy(vocabulary)

    class Tokens:
        """What LLTokenizer asks of a tokenizer; it is called while a mask is made."""

        eos_token_id, bos_token_id = vocabulary.end, None
        tokens, special_token_ids = vocabulary.tokens, (vocabulary.end,)

        def __call__(self, text: bytes) -> list[int]:
            return split(text)

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Tokens()))
    limits = LIMITS if bounded else llguidance.LLParserLimits()
    row = torch.zeros((tokenizer.vocab_size + 31) // 32, dtype=torch.int32)

    class State:
        def __init__(self, matcher: Any) -> None:
            self._matcher = matcher

        def mask(self) -> Any:
            self._matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * 4)
            return row

        def advance(self, token: int) -> bool:
            return bool(self._matcher.consume_token(token))

    def compile_schema(schema: str) -> Callable[[], Matcher]:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return lambda: State(matcher.deep_copy())

    return compile_schema


def _xgrammar(vocabulary: Vocabulary) -> Compile:
    import xgrammar

    info = xgrammar.TokenizerInfo(vocabulary.tokens, stop_token_ids=[vocabulary.end])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    rows = xgrammar.allocate_token_bitmask(1, info.vocab_size)

    class State:
        def __init__(self, matcher: Any) -> None:
            self._matcher = matcher

        def mask(self) -> Any:
            self._matcher.fill_next_token_bitmask(rows)
            return rows[0]

        def advance(self, token: int) -> bool:
            return bool(self._matcher.accept_token(token))

    def compile_schema(schema: str) -> Callable[[], Matcher]:
        try:
            # Not its strict mode: that closes objects that the schema leaves open.
            compiled = compiler.compile_json_schema(schema, strict_mode=False)
        except Exception as error:
            raise ValueError(str(error)) from error
        return lambda: State(xgrammar.GrammarMatcher(compiled))

    return compile_schema


ENGINES: dict[str, Callable[[Vocabulary], Compile]] = {
    "llguidance": _llguidance,
    "llguidance, bounded": functools.partial(_llguidance, bounded=True),
    "xgrammar": _xgrammar,
}
"""Bounded is as the runtime uses it; whitespace is flexible in all of them."""


def greedy(vocabulary: Vocabulary) -> Callable[[bytes], list[int]]:
    """Splits bytes into the longest tokens, from the left; which tokens does not matter here."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens) if i != vocabulary.end}
    longest = max(map(len, ids))

    def split(text: bytes) -> list[int]:
        found, start = [], 0
        while start < len(text):
            stop = next(
                stop
                for stop in range(min(len(text), start + longest), start, -1)
                if text[start:stop] in ids
            )
            found.append(ids[text[start:stop]])
            start = stop
        return found

    return split


def _walk(matcher: Matcher, tokens: Sequence[int], end: int) -> Walk:
    masks = []
    for token in (*tokens, end):
        begin = time.perf_counter()
        row = matcher.mask()
        masks.append(time.perf_counter() - begin)
        allowed = int(row[token // 32]) >> (token % 32) & 1
        if not allowed or (token != end and not matcher.advance(token)):
            return Walk(False, masks)
    return Walk(True, masks)


def _run(compiler: Compile, schema: str, texts: Sequence[Sequence[int]], end: int) -> Outcome:
    begin = time.perf_counter()
    try:
        start = compiler(schema)
    except ValueError as error:
        return Outcome(str(error).strip()[:400] or "refused", time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    walks = [_walk(start(), tokens, end) for tokens in texts]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Outcome("", seconds, walks, peak)


def _serve(name: str, vocabulary: Vocabulary, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    def loop() -> None:
        compiler = ENGINES[name](vocabulary)
        pipe.send("ready")
        while True:
            schema, texts = pipe.recv()
            pipe.send(_run(compiler, schema, texts, vocabulary.end))

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=loop)
    with contextlib.suppress(EOFError):
        thread.start()
        thread.join()


class Engine:
    """One engine, in a process that is started anew after a schema that it did not survive."""

    def __init__(self, name: str, vocabulary: Vocabulary) -> None:
        self._name, self._vocabulary = name, vocabulary
        self._split = greedy(vocabulary)
        self._start()

    def run(self, schema: str, texts: Sequence[str]) -> Outcome:
        """Compile a schema and walk along texts, with a mask before every token."""
        self._pipe.send((schema, [self._split(text.encode()) for text in texts]))
        try:
            if self._pipe.poll(LIMIT_SECONDS):
                outcome: Outcome = self._pipe.recv()
                return outcome
            error = f"no answer in {LIMIT_SECONDS} s"
        except (EOFError, ConnectionError):
            error = "its process ended"
        self.close()
        self._start()
        return Outcome(error)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve, args=(self._name, self._vocabulary, other), daemon=True
        )
        self._process.start()
        other.close()
        if self._pipe.recv() != "ready":
            raise RuntimeError(f"{self._name} did not load")

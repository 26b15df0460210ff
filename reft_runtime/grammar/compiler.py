"""Compiles grammars for one tokenizer, within bounds, and keeps those used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLTokenizer

from reft_runtime.errors import EngineDead, InvalidRequest
from reft_runtime.grammar.queues import TenantQueues
from reft_runtime.grammar.source import MAX_BYTES, STACK_BYTES, matcher_of, read_tokenizer
from reft_runtime.grammar.state import GrammarState
from reft_runtime.grammar.trial import Refusal, Trial
from reft_runtime.sampling import Grammar

KEPT = 128
"""Grammars that are kept, and refusals; in use one takes mostly some hundreds of kilobytes."""

MOST_WAITING = 64
"""Most grammars that wait to be compiled; with several tenants no part of one is larger."""


class GrammarCompiler:
    """Makes the first state of a grammar; safe to use from many threads.

    Each is first tried in a process of its own, and then compiled in one thread of this one, which
    the tenants that ask for one have in turn. `definition` returns the content of the tokenizer's
    `tokenizer.json`, None if it has none; it is called at the first use, which takes half a second.
    """

    def __init__(
        self, definition: Callable[[], str | None], vocab_size: int, eos_ids: Collection[int]
    ) -> None:
        self._definition = definition
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._lock = threading.RLock()  # a callback may come at once
        self._kept: OrderedDict[Grammar, Future[LLMatcher | Refusal]] = OrderedDict()
        self._waiting = TenantQueues(MOST_WAITING)
        self._thread: ThreadPoolExecutor | None = None
        self._tokenizer: LLTokenizer | None = None
        self._trial: Trial | None = None
        self._closed = False

    def compiling(self, grammar: Grammar, tenant: str = "") -> Future[LLMatcher | Refusal]:
        """Begin to compile a grammar that is not kept; done when `start` will not wait for it.

        Raises `InvalidRequest` if it is too long, `Overloaded` if too many of the tenant wait
        already, and `EngineDead` if it is closed.
        """
        size, most = len(grammar.source.encode(errors="surrogatepass")), MAX_BYTES[grammar.kind]
        if size > most:
            raise InvalidRequest(
                f"{grammar.param}: {size} bytes, and at most {most} are compiled; make it smaller.",
                param=grammar.param,
            )
        with self._lock:
            future = self._kept.get(grammar)
            if future is None or not future.done():
                if self._closed:
                    raise EngineDead("the engine is closed")
                known, future = future, future or Future()
                # What waits in a long queue of one tenant, another has sooner by its own turn.
                if self._waiting.add(tenant, grammar, future):
                    self._started().submit(self._compile_next)
                if known is None:
                    self._kept[grammar] = future
                    future.add_done_callback(lambda done: self._forget_failed(grammar, done))
            self._kept.move_to_end(grammar)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return future

    def start(self, grammar: Grammar, tenant: str = "") -> GrammarState:
        """The state before the first token of an answer; may wait seconds for the compiler.

        Raises `InvalidRequest`, which names the grammar's field and the place in it, `Overloaded`,
        `Unavailable`, or `EngineDead`.
        """
        found = self.compiling(grammar, tenant).result()
        if isinstance(found, Refusal):
            where = grammar.param + found.place
            raise InvalidRequest(f"{where}: {found.fault}.", param=where)
        return GrammarState(found.deep_copy(), grammar.param)

    def close(self) -> None:
        """End the process and the thread; what is kept can still be used. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._thread is not None:
            self._thread.shutdown()  # what waits ends at once: a cancelled future is no answer
        if self._trial is not None:
            self._trial.close()

    def _started(self) -> ThreadPoolExecutor:
        """The thread that compiles, which needs more stack than others."""
        if self._thread is None:
            usual = threading.stack_size(STACK_BYTES)
            try:
                self._thread = ThreadPoolExecutor(1, "reft-grammar")
                self._thread.submit(int)
            finally:
                threading.stack_size(usual)
        return self._thread

    def _compile_next(self) -> None:
        with self._lock:
            grammar, future = self._waiting.take()
        if future.done() or not future.set_running_or_notify_cancel():
            return
        try:
            made = self._compile(grammar)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(made)

    def _compile(self, grammar: Grammar) -> LLMatcher | Refusal:
        if self._closed:
            raise EngineDead("the engine is closed")
        if self._tokenizer is None or self._trial is None:
            definition = self._definition()
            try:
                self._tokenizer = read_tokenizer(definition, self._vocab_size, self._eos_ids)
            except ValueError as error:
                said = f"this model's tokenizer cannot be held to a form ({error}); leave it out"
                return Refusal(said, "")
            assert definition is not None
            self._trial = Trial(definition, self._vocab_size, self._eos_ids)
        refusal = self._trial.of(grammar)
        return refusal if refusal.fault else matcher_of(self._tokenizer, grammar)

    def _forget_failed(self, grammar: Grammar, done: Future[LLMatcher | Refusal]) -> None:
        """What failed for a reason of the machine's is tried again when it is asked for again."""
        if done.cancelled() or done.exception() is not None:
            with self._lock:
                self._kept.pop(grammar, None)

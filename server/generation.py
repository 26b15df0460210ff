"""From a validated body to the engine and back: prepare, open, follow, account."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reft_runtime.errors import Overloaded
from reft_runtime.front.bounds import MAX_TRACED_ROWS, bound_scores, too_much_traced
from reft_runtime.outputs import Choice, ChoiceDelta, TokenLogprob, Trace
from reft_runtime.sampling import SamplingParams
from server.auth import cache_salt
from server.context import Context
from server.errors import ApiError
from server.schemas.common import SamplingBody
from server.selection import Selection, select

if TYPE_CHECKING:
    from reft_runtime.front.engine import Engine
    from reft_runtime.front.streams import Stream
    from reft_runtime.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Job:
    """What one request asks of the engine; interventions and sampling are those of every prompt."""

    prompts: list[list[int]]
    sampling: SamplingParams
    selection: Selection
    trace: bool
    arrived: float
    """When the request came, on the monotonic clock."""


Encode = Callable[["Tokenizer", Selection], list[list[int]]]


async def prepare(
    context: Context, body: SamplingBody, sampling: SamplingParams, encode: Encode, *, prompt: str
) -> Job:
    """Resolve and tokenise in a worker thread; `prompt` is the field that errors of length name.

    Raises `NotFound` for an unknown model, and `ApiError` for a prompt that leaves no room.
    """
    engine = context.engine
    arrived = time.monotonic()

    def work() -> Job:
        selection = select(engine, body.model, body.interventions)
        prompts = encode(engine.tokenizer, selection)
        for tokens in prompts:
            _check_length(engine, tokens, sampling.max_tokens, prompt)
        bound_scores([len(tokens) for tokens in prompts], sampling, trace=body.trace)
        return Job(prompts, sampling, selection, body.trace, arrived)

    return await asyncio.to_thread(work)


def _check_length(
    engine: Engine, tokens: Sequence[int], max_tokens: int | None, prompt: str
) -> None:
    limit = engine.info.max_model_len
    needed = 1 if max_tokens is None else max_tokens
    if len(tokens) + needed > limit:
        param = prompt if len(tokens) + min(needed, 1) > limit else "max_tokens"
        raise ApiError(
            400,
            f"This model's maximum context length is {limit} tokens, but {len(tokens) + needed} "
            f"are needed ({len(tokens)} in the prompt, {needed} for the answer). "
            f"Shorten the prompt or lower max_tokens.",
            param=param,
            code="context_length_exceeded",
        )


@dataclass(slots=True)
class Run:
    """One request under way: its streams as one, what it used, and how long it took.

    A choice's index counts through the prompts: prompt * n + choice.
    """

    id: str
    context: Context
    job: Job
    streams: list[Stream] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    finish_reasons: dict[int, str] = field(default_factory=dict)
    first_token_seconds: float | None = None
    """From the request's arrival."""
    ends: list[str] = field(default_factory=list)
    """Why each choice ended; empty while the request runs."""
    _last: dict[int, float] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all prompts, each counted once."""
        return sum(len(prompt) for prompt in self.job.prompts)

    @property
    def choices(self) -> int:
        """Number of choices of all prompts."""
        return len(self.job.prompts) * self.job.sampling.n

    @property
    def queue_seconds(self) -> float | None:
        """How long the prompt that waited longest did; None while all wait."""
        queued = [s.queue_seconds for s in self.streams if s.queue_seconds is not None]
        return max(queued, default=None)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, of what was made so far."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in self.streams)},
        }

    def prompt(self, index: int) -> list[int]:
        """Prompt of choice `index`."""
        return self.job.prompts[index // self.job.sampling.n]

    def prompt_logprobs(self, index: int) -> list[TokenLogprob | None]:
        """Log-probabilities of the prompt of choice `index`; complete from its first delta on."""
        return self.streams[index // self.job.sampling.n].prompt_logprobs or []

    def headers(self) -> dict[str, str]:
        """Response headers that are known once the first token is."""
        headers = {"x-prompt-tokens": str(self.prompt_tokens)}
        if self.queue_seconds is not None:
            headers["x-queue-time"] = f"{1000 * self.queue_seconds:.1f}"
        if self.streams[0].versions:
            headers["x-intervention"] = ", ".join(self.streams[0].versions)
        return headers

    async def steps(self) -> AsyncGenerator[list[tuple[int, ChoiceDelta]], None]:
        """What each engine step added, as (index, delta) pairs.

        Raises what the engine raises, and `Overloaded` when the first token is late.
        """
        n = self.job.sampling.n
        timeout = self.context.settings.first_token_timeout
        async with aclosing(_merge([aiter(stream) for stream in self.streams])) as merged:
            try:
                async with asyncio.timeout(timeout):
                    step = await anext(merged, None)
            except TimeoutError:
                raise Overloaded(f"No first token within {timeout:g} seconds.") from None
            if step is not None:
                queued = self.streams[step[0]].queue_seconds
                self.first_token_seconds = time.monotonic() - self.job.arrived
                self.context.metrics.first_token(self.first_token_seconds, queued)
            while step is not None:
                prompt, deltas = step
                self._count(prompt, deltas)
                yield [(prompt * n + delta.index, delta) for delta in deltas]
                step = await anext(merged, None)

    async def collect(self) -> list[Choice]:
        """All choices, whole, in order."""
        choices = [Choice(index, "") for index in range(self.choices)]
        texts: list[list[str]] = [[] for _ in choices]
        async with aclosing(self.steps()) as steps:
            async for step in steps:
                for index, delta in step:
                    choice = choices[index]
                    texts[index].append(delta.text)
                    choice.tokens += delta.tokens
                    choice.logprobs += delta.logprobs
                    choice.finish_reason = delta.finish_reason
        for choice, pieces in zip(choices, texts, strict=True):
            choice.text = "".join(pieces)
        return choices

    async def explain(self) -> list[Trace]:
        """The trace of each prompt, when all has ended; none where it is not asked for."""
        return [await stream.trace() for stream in self.streams] if self.job.trace else []

    def _count(self, prompt: int, deltas: list[ChoiceDelta]) -> None:
        now = time.monotonic()
        before = self._last.get(prompt)
        if before is not None:
            self.context.metrics.next_token(now - before)
        self._last[prompt] = now
        for delta in deltas:
            self.completion_tokens += len(delta.tokens)
            if delta.finish_reason is not None:
                index = prompt * self.job.sampling.n + delta.index
                self.finish_reasons[index] = delta.finish_reason


@asynccontextmanager
async def opened(context: Context, job: Job, prefix: str) -> AsyncIterator[Run]:
    """Queue `job` in the engine; on leaving, whatever the reason, nothing of it is left there.

    Raises what `Engine.open` raises; then no prompt of the job stays queued.
    """
    run = Run(f"{prefix}-{uuid.uuid4().hex}", context, job)
    unfinished = "error"
    try:
        for position, prompt in enumerate(job.prompts):
            stream = await context.engine.open(
                prompt,
                job.sampling,
                job.selection.uses,
                request_id=f"{run.id}-{position}",
                salt=cache_salt(context.settings),
                trace=job.trace,
            )
            run.streams.append(stream)
            if (rows := sum(stream.traced_rows for stream in run.streams)) > MAX_TRACED_ROWS:
                raise too_much_traced(rows)
        yield run
    except asyncio.CancelledError:
        unfinished = "abort"
        raise
    finally:
        for stream in run.streams:
            stream.abort()
        if run.streams:
            run.ends = [run.finish_reasons.get(i, unfinished) for i in range(run.choices)]
            seconds = time.monotonic() - job.arrived
            names = dict.fromkeys(job.selection.names)
            tokens = run.prompt_tokens, run.completion_tokens
            context.metrics.finished(seconds, run.ends, names, *tokens)
            for name in names:
                context.engine.registry.count(name, *tokens)


async def _merge(
    sources: list[AsyncIterator[list[ChoiceDelta]]],
) -> AsyncGenerator[tuple[int, list[ChoiceDelta]], None]:
    """Items of all `sources` as they come, each with its source's position."""
    if len(sources) == 1:
        async for step in sources[0]:
            yield 0, step
        return

    async def pull(position: int) -> tuple[int, list[ChoiceDelta] | None]:
        return position, await anext(sources[position], None)

    waiting = {asyncio.ensure_future(pull(position)) for position in range(len(sources))}
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                position, item = task.result()
                if item is not None:
                    waiting.add(asyncio.ensure_future(pull(position)))
                    yield position, item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

"""A job in the engine: started, followed to its end, and accounted for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reft_runtime.errors import Overloaded
from reft_runtime.front.prepared import Prepared, release_all
from reft_runtime.front.prompt_form import PromptForm
from reft_runtime.outputs import Choice, ChoiceDelta, TokenLogprob, Trace
from server.context import Context
from server.following import Follower, Rest
from server.schemas.answers.base import Usage
from server.tenants.meter import Meter
from server.tenants.quota import Refused, TooLarge

if TYPE_CHECKING:
    from reft_runtime.reasoning import Thinking
    from server.engine import Stream
    from server.tenants.quota import Admitted


Step = list[tuple[int, ChoiceDelta]]
"""What one step of the engine, or a few, added: pairs of a choice's index and what it gained."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a client, with an engine request for each prompt; these hold versions.

    `label` is the answer's `model`: the name of what is applied.
    """

    id: str
    label: str
    prepared: list[Prepared]
    arrived: float
    """Time at which the request came, in seconds on the monotonic clock."""

    @property
    def n(self) -> int:
        """Number of choices of each prompt."""
        return self.prepared[0].request.sampling.n

    @property
    def form(self) -> PromptForm:
        """How the request's prompts are written."""
        return self.prepared[0].form

    @property
    def versions(self) -> tuple[str, ...]:
        """Interventions applied to each prompt, as `NAME@DIGEST`, in order."""
        return self.prepared[0].versions

    @property
    def names(self) -> list[str]:
        """Names of the interventions, each once, in the order in which they apply."""
        return list(dict.fromkeys(version.partition("@")[0] for version in self.versions))

    @property
    def thinking(self) -> Thinking | None:
        """What the model may write before its answer to a chat."""
        return self.prepared[0].thinking

    @property
    def trace(self) -> bool:
        """Whether the request is traced."""
        return bool(self.prepared[0].request.trace)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts; each prompt counts once, whatever `n` is."""
        return sum(len(one.request.prompt) for one in self.prepared)


@asynccontextmanager
async def before_the_deadline(context: Context, arrived: float) -> AsyncIterator[asyncio.Timeout]:
    """Raise `Overloaded` if a block before the first token ends later than it may.

    `arrived` is when the request came, on the monotonic clock. A block that goes on after the first
    token takes the deadline away then: `reschedule(None)`.
    """
    limit = context.settings.first_token_timeout
    deadline = asyncio.timeout(max(0.0, arrived + limit - time.monotonic()))
    try:
        async with deadline:
            yield deadline
    except TimeoutError:
        if not deadline.expired():
            raise
        raise Overloaded(f"No first token within {limit:g} seconds.") from None


@dataclass(slots=True, eq=False)
class Run:
    """One request under way: its streams as one, its token counts and its times.

    A choice's index counts through all prompts: prompt * n + choice.
    """

    context: Context
    job: Job
    admitted: Admitted
    streams: list[Stream] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Of these, those with which the model thought, as far as a writer has read the answers."""
    finish_reasons: dict[int, str] = field(default_factory=dict)
    first_token_seconds: float | None = None
    """Seconds from the request's arrival to its first token; None before that."""
    ends: list[str] = field(default_factory=list)
    """Why each choice ended; empty while the request runs."""
    meter: Meter = field(init=False)
    _last: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        context, job = self.context, self.job
        prompts = [len(one.request.prompt) for one in job.prepared]
        self.meter = Meter(context.quotas, context.usage, self.admitted, job.names, prompts)

    @property
    def choices(self) -> int:
        """Number of choices of all prompts."""
        return len(self.job.prepared) * self.job.n

    @property
    def names(self) -> list[str]:
        """Names of the interventions that are applied."""
        return self.job.names

    @property
    def queue_seconds(self) -> float | None:
        """Seconds that the first of its prompts waited in the queue; None while all wait."""
        queued = [s.queue_seconds for s in self.streams if s.queue_seconds is not None]
        return min(queued, default=None)

    def usage(self) -> Usage:
        """OpenAI's usage object for the tokens so far."""
        usage: Usage = {
            "prompt_tokens": self.job.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.job.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(s.cached_tokens for s in self.streams)},
        }
        if self.job.thinking is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return usage

    def prompt(self, index: int) -> Sequence[int]:
        """Token ids of the prompt of choice `index`."""
        return self.job.prepared[index // self.job.n].request.prompt

    def prompt_logprobs(self, index: int) -> list[TokenLogprob | None]:
        """Log-probabilities of the prompt of choice `index`; complete from its first delta on."""
        return self.streams[index // self.job.n].prompt_logprobs or []

    def headers(self) -> dict[str, str]:
        """Response headers, which are complete once the first token has come."""
        headers = {"x-prompt-tokens": str(self.job.prompt_tokens), **self.admitted.headers}
        if self.queue_seconds is not None:
            headers["x-queue-time"] = f"{1000 * self.queue_seconds:.1f}"
        if self.job.versions:
            headers["x-intervention"] = ", ".join(self.job.versions)
        return headers

    async def follow(self, take: Callable[[Step], Rest]) -> None:
        """Pass what each engine step adds to `take` until all choices have ended.

        `take` is called, and may return a coroutine, as `Follower` says. Raises what the engine and
        `take` raise, and `Overloaded` if the first token takes longer than `first_token_timeout`.
        """
        n = self.job.n
        async with before_the_deadline(self.context, self.job.arrived) as deadline:

            def told(prompt: int, deltas: list[ChoiceDelta]) -> Rest:
                if self.first_token_seconds is None:
                    deadline.reschedule(None)
                    queued = self.streams[prompt].queue_seconds
                    self.first_token_seconds = time.monotonic() - self.job.arrived
                    self.context.metrics.first_token(self.first_token_seconds, queued)
                self._count(prompt, deltas)
                return take([(prompt * n + delta.index, delta) for delta in deltas])

            await Follower(self.streams, told).run()

    async def collect(self) -> list[Choice]:
        """Run the request to its end, and return all choices in order."""
        choices = [Choice(index) for index in range(self.choices)]

        def add(step: Step) -> None:
            for index, delta in step:
                choices[index].add(delta)

        await self.follow(add)
        return choices

    async def explain(self) -> list[Trace]:
        """Traces of the prompts once all choices have ended; empty if no trace was asked for."""
        return [await stream.trace() for stream in self.streams] if self.job.trace else []

    def _count(self, prompt: int, deltas: list[ChoiceDelta]) -> None:
        now = time.monotonic()
        tokens: dict[int, int] = {}
        for delta in deltas:
            tokens[delta.index] = tokens.get(delta.index, 0) + len(delta.tokens)
            if delta.finish_reason is not None:
                index = prompt * self.job.n + delta.index
                self.finish_reasons[index] = delta.finish_reason
        made, most = sum(tokens.values()), max(tokens.values())
        before = self._last.get(prompt)
        if before is not None:
            for _ in range(most):
                self.context.metrics.next_token((now - before) / most)
        self._last[prompt] = now
        self.completion_tokens += made
        self.meter.step(prompt, self.streams[prompt].cached_tokens, made, now)


@asynccontextmanager
async def opened(context: Context, job: Job) -> AsyncIterator[Run]:
    """Queue `job` in the engine, if its tenant's quotas let it pass.

    When the block ends, for any reason, nothing of the job is left in the engine. Raises what
    `Quotas.admit` and `Engine.start` raise; then no prompt of the job stays queued, and nothing is
    held.
    """
    metrics, tenant = context.metrics, context.tenant.name
    try:
        admitted = await context.quotas.admit(context.tenant, job.prompt_tokens)
    except BaseException as error:
        release_all(job.prepared)
        if isinstance(error, Refused | TooLarge):
            metrics.rejected(tenant, error.reason)
        raise
    run = Run(context, job, admitted)
    unfinished = "error"
    metrics.under_way.add(run)
    try:
        for prepared in job.prepared:
            run.streams.append(context.engine.start(prepared))
        yield run
    except asyncio.CancelledError:
        unfinished = "abort"
        raise
    except Overloaded:
        if not run.meter.counts.requests:
            metrics.rejected(tenant, "overloaded")
        raise
    finally:
        for stream in run.streams:
            stream.abort()
        release_all(job.prepared[len(run.streams) :])
        run.meter.end()
        metrics.under_way.discard(run)
        if run.streams:
            run.ends = [run.finish_reasons.get(i, unfinished) for i in range(run.choices)]
            seconds = time.monotonic() - job.arrived
            counts = run.meter.counts
            metrics.finished(seconds, run.ends, tenant, job.names, counts)
            for name in job.names:
                context.registry.count(name, counts.prompt_tokens, counts.completion_tokens)

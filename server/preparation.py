"""From a validated body to a job for the engine: names, tokens, limits, versions that are held."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reft_runtime.errors import InvalidRequest
from reft_runtime.front.hop import in_turn
from reft_runtime.front.prepared import Prepared, release_all
from reft_runtime.sampling import SamplingParams
from server.auth import caller_of
from server.context import Context
from server.generation import Job, before_the_deadline
from server.schemas.classify import ClassifyRequest
from server.schemas.common import ModelBody, SamplingBody
from server.selection import label, selected
from server.tenants.tenant import Limits

if TYPE_CHECKING:
    from reft_runtime.front.prompts import Prompt
    from reft_runtime.interventions.registry.holding import Holding
    from reft_runtime.text import ChatOptions
    from reft_runtime.use import Use


async def prepare(
    context: Context,
    body: SamplingBody,
    sampling: SamplingParams,
    prompts: Callable[[], Sequence[Prompt]],
    options: Callable[[], ChatOptions | None] = lambda: None,
    *,
    prefix: str,
    thinks: bool = False,
) -> Job:
    """Resolve, tokenise and check a request in one worker thread.

    The thread also calls `prompts` and `options`. A grammar is compiled before, and takes nobody's
    thread: one that takes long holds up only those that are compiled after it. Nor does waiting for
    the tensors of interventions, and for the request's turn to have them in memory. `prefix` begins
    the answer's id; with `thinks`, what the model thinks is told from its answer. Raises `NotFound`
    for an unknown model, `InvalidRequest` for more than the tenant's limits allow, `Overloaded` if
    all this takes longer than `first_token_timeout`, and what `Admission.prepare` raises. After an
    error, or if the client leaves meanwhile, nothing is held.
    """
    sampling = _limited(context.tenant.limits, body, sampling)

    def admit(uses: Sequence[Use], name: str, holding: Holding) -> list[Prepared]:
        return context.engine.admission.prepare(
            prompts(),
            sampling,
            uses,
            options=options(),
            request_id=name,
            caller=caller_of(context),
            priority=body.priority,
            trace=body.trace,
            thinks=thinks,
            holding=holding,
        )

    if sampling.grammar is not None:
        compiling = context.engine.admission.compiling(sampling.grammar, caller_of(context))
        # Another request may wait for the same one: it goes on if this client leaves.
        await asyncio.shield(asyncio.wrap_future(compiling))
    return await _prepared(context, body, admit, prefix)


def _limited(limits: Limits, body: SamplingBody, sampling: SamplingParams) -> SamplingParams:
    """The settings within a tenant's limits; raises `InvalidRequest` if the body asks for more.

    Where the body gives no length, the route's own default is cut to the limit. Where the route has
    none, the engine cuts the answer (`Caller.max_tokens`).
    """
    if limits.n is not None and sampling.n > limits.n:
        raise InvalidRequest(f"n: your key allows {limits.n}; give at most that.", param="n")
    most, asked = limits.max_tokens, sampling.max_tokens
    if most is None or asked is None or asked <= most:
        return sampling
    if {"max_tokens", "max_completion_tokens"} & body.model_fields_set:
        raise InvalidRequest(
            f"max_tokens: your key allows {most} for an answer; give at most that.",
            param="max_tokens",
        )
    return replace(sampling, max_tokens=most)


async def prepare_labels(context: Context, body: ClassifyRequest) -> Job:
    """Resolve, tokenise and check a request for a classification, as `prepare` does.

    An error about a prompt names the field `input`.
    """

    def admit(uses: Sequence[Use], name: str, holding: Holding) -> list[Prepared]:
        options = None
        if body.messages is not None:
            options = body.options(context.engine.tokenizer.switches)
        try:
            return context.engine.admission.prepare_labels(
                body.asked(),
                body.labels,
                uses,
                options=options,
                request_id=name,
                caller=caller_of(context),
                priority=body.priority,
                holding=holding,
            )
        except InvalidRequest as error:
            if error.param == "prompt":
                error.param = "input"
                error.message = error.message.replace("prompt:", "input:", 1)
            raise

    return await _prepared(context, body, admit, "classify-")


async def _prepared(
    context: Context,
    body: ModelBody,
    admit: Callable[[Sequence[Use], str, Holding], list[Prepared]],
    prefix: str,
) -> Job:
    arrived = time.monotonic()
    name = f"{prefix}{uuid.uuid4().hex}"

    def acquire() -> Holding:
        with selected(context, body.model, body.interventions) as uses:
            return context.engine.admission.acquire(uses, caller_of(context))

    def prepare(holding: Holding) -> list[Prepared]:
        with selected(context, body.model, body.interventions) as uses:
            return admit(uses, name, holding)

    async with before_the_deadline(context, arrived):
        prepared = await in_turn(acquire, prepare, release_all, context.work)
    return Job(name, label(body.model, body.interventions), prepared, arrived)

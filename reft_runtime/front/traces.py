"""What a trace asks of the base model when an answer has ended, and what it makes of it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace

from torch.nn.functional import kl_div

from reft_runtime.front.assembly import Assembler
from reft_runtime.machine.cores import releasing_workers
from reft_runtime.outputs import TokenLogprob, Trace
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import Request

_FIRST_TOKEN = SamplingParams(temperature=0, max_tokens=1)
_SCORES = SamplingParams(max_tokens=0, prompt_logprobs=0)


def base_requests(own: Assembler) -> list[Request]:
    """Requests to the base model for the trace of a request that has ended.

    The first is for the first token's distribution; then there is one for each choice, for the
    log-probabilities of its tokens behind the prompt. With the prefix cache only the first computes
    the prompt. None are needed where there is no token, or where nothing changes the base model.
    """
    request = own.request
    if not any(own.scores) or not any(applied.strength for applied in request.interventions):
        return []
    plain = replace(request, interventions=(), traced_rows=0)
    first = replace(plain, id=uuid.uuid4().hex, sampling=_FIRST_TOKEN)
    return [first] + [
        replace(
            plain,
            id=uuid.uuid4().hex,
            prompt=(*request.prompt, *(score.token for score in scores)),
            sampling=_SCORES,
            trace=False,
            scored_from=len(request.prompt),
        )
        for scores in own.scores
    ]


@releasing_workers
def trace_of(own: Assembler, bases: Sequence[Assembler]) -> Trace:
    """The trace of a request, with what came of its `base_requests`."""
    if not bases:
        return Trace(own.edits, 0.0, tuple((0.0,) * len(scores) for scores in own.scores))
    first, *answers = bases
    kl = 0.0
    if own.first_logprobs is not None and first.first_logprobs is not None:
        logprobs = first.first_logprobs, own.first_logprobs
        kl = float(kl_div(*logprobs, reduction="sum", log_target=True))
    ratios = (
        tuple(_ratios(scores, answer.prompt_logprobs or []))
        for scores, answer in zip(own.scores, answers, strict=True)
    )
    return Trace(own.edits, kl, tuple(ratios))


def _ratios(scores: Sequence[TokenLogprob], text: Sequence[TokenLogprob | None]) -> list[float]:
    """Of an answer's tokens, which are the last ones of what the base model scored as `text`."""
    bases = [score for score in text if score is not None]
    return [own.logprob - base.logprob for own, base in zip(scores, bases, strict=True)]

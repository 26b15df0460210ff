"""How much of a step each of several tenants may take. Knows no tensors.

All sequences of a step wait for its end. So one tenant with many sequences slows another with few,
whoever started first. The bound: others may add to a step at most so many times what a tenant's own
part of it would take alone as their weights are over its weight. Of two tenants of equal weight
each goes on at half the speed that it would have alone, or faster. Where the bound asks for it, the
tenants that take most let their last sequences rest for a step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from reft_runtime.schedule.pacing import LEAST_TOKENS, StepTimes


@dataclass(slots=True)
class Share:
    """A tenant's part of a step: decoding sequences, and prompt tokens."""

    weight: float
    decodes: int = 0
    prompt_tokens: int = 0


def allot(
    wanted: Mapping[str, Share], prompt_limit: int, times: StepTimes
) -> dict[str, Share] | None:
    """The most that each tenant may take of a step, by what each could take; None if all get that.

    `prompt_limit` is the most prompt tokens of all. The tenant with the tightest bound gets all
    that it wants, the others in the order of their bounds what time is left, but one decoding
    sequence at least, or else `LEAST_TOKENS` of prompts: everybody goes on in every step.
    """
    weights = sum(share.weight for share in wanted.values())
    bounds = {
        tenant: times.step(share.decodes, share.prompt_tokens) * _slower(share.weight, weights)
        for tenant, share in wanted.items()
    }
    longest = min(bounds.values())
    decodes = sum(share.decodes for share in wanted.values())
    tokens = min(prompt_limit, sum(share.prompt_tokens for share in wanted.values()))
    if times.step(decodes, tokens) <= longest:
        return None
    allotted: dict[str, Share] = {}
    decodes = tokens = 0
    for tenant in sorted(wanted, key=bounds.__getitem__):
        share = wanted[tenant]
        more = range(decodes + 1, decodes + share.decodes + 1)
        fit = bisect_right(more, longest, key=partial(_seconds, times, tokens))
        own = min(share.decodes, max(1, fit))
        decodes += own
        spare = times.prompt_tokens(longest - times.step(decodes, tokens))
        prompts = min(share.prompt_tokens, spare if own else max(LEAST_TOKENS, spare))
        tokens += prompts
        allotted[tenant] = Share(share.weight, own, prompts)
    return allotted


def _slower(weight: float, weights: float) -> float:
    """How many times as long as alone a step may take for a tenant, by its weight and all weights.

    A tenant with most of the weight is slowed less than by its share: it also waits for the end of
    the step that is under way when it comes.
    """
    others = (weights - weight) / weight
    return 1 + others * min(1.0, others)


def _seconds(times: StepTimes, prompt_tokens: int, decodes: int) -> float:
    return times.step(decodes, prompt_tokens)

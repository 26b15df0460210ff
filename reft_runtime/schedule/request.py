"""What is asked of the engine: token ids, edits and sampling settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reft_runtime.outputs import Tracing
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.labels import LabelTree

if TYPE_CHECKING:
    from reft_runtime.grammar import GrammarState
    from reft_runtime.interventions.format.canonical import CanonicalEdit


@dataclass(frozen=True, slots=True)
class AppliedIntervention:
    """One intervention of a request: the version's digest, its edits and the strength.

    `subspace` holds the directions of the version's edits that are applied, None for all.
    """

    digest: str
    edits: tuple[CanonicalEdit, ...]
    strength: float = 1.0
    subspace: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks of the engine; token ids only.

    `id` is never used again: late events of a request that has ended cannot reach another one.
    `given_id` is the caller's own id, which may come back once the request is over.

    `seed` is always set: the caller's, or one drawn when the request was made. `salt` separates
    tenants in cache keys. `tenant`, `weight` and `priority` decide when a request's turn comes:
    tenants share the engine by weight, and of one tenant the lowest priority goes first.
    `interventions` are applied in order. With `trace` the engine tells what they did, and `along`
    what rows it finds, also for those of strength 0. If the
    prompt's log-probabilities are asked for, its tokens from `scored_from` on are scored. `grammar`
    is the state in which each choice begins, None if answers are free. A request with `labels` is
    told their log-probabilities and makes no tokens: its sampling has a `max_tokens` of 0.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    interventions: tuple[AppliedIntervention, ...] = ()
    salt: bytes = b""
    trace: Tracing = False
    scored_from: int = 1
    given_id: str | None = None
    grammar: GrammarState | None = None
    labels: LabelTree | None = None
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0

    def touches(self, applied: AppliedIntervention) -> bool:
        """Whether one of the interventions changes rows, or they are read along its directions."""
        return bool(applied.strength) or self.trace == "along"

"""What the runtime hands back of a request: answers, classifications, traces, comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from reft_runtime.display.html import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FinishReason = Literal["stop", "length"]

Tracing = Literal[False, True, "along"]
"""Whether a request is traced; `along` also tells where rows lie along the edits' directions."""

_SHOWN_LABELS = 5
"""Labels in the representation of a classification."""

BASE_LABEL = "base"
"""What tables and reports call the model without an intervention."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural) of one token and of its best alternatives.

    `top` holds (token id, log-probability) pairs, best first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


# Not frozen: there is one for every token, and a frozen one takes five times as long to make.
@dataclass(slots=True)
class ChoiceDelta:
    """What one choice of a request gained in one engine step.

    `text` may be empty while a character or a possible stop string is incomplete. `tokens` are the
    generated ids, an ending EOS or stop id included. `logprobs`, if asked for, has one entry for
    each of them. `stop_reason` is the stop string or stop id that ended the choice, None for EOS or
    length.
    """

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Choice:
    """One answer, whole once it has a `finish_reason`."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Append what one step added to this choice."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        if delta.finish_reason:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(slots=True)
class Generation:
    """The answer to one prompt: `choices` (as many as `n`), and the first one's text as `text`."""

    prompt_tokens: list[int]
    choices: list[Choice]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = field(default=0, compare=False)
    """Prompt tokens whose keys and values came from the prefix cache."""

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def tokens(self) -> list[int]:
        """Token ids of the first choice."""
        return self.choices[0].tokens


@dataclass(frozen=True, slots=True, repr=False)
class Classification:
    """Which of several labels answers a prompt.

    `logprobs` are the model's log-probabilities (natural) of the labels, in their order: each is
    the sum over the label's tokens, and over the end of the answer where another label begins with
    this one. `probs` are the probabilities of the labels among each other; they sum to 1.
    """

    labels: tuple[str, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: list[int]
    cached_tokens: int = field(default=0, compare=False)
    """Prompt tokens whose keys and values came from the prefix cache."""

    @property
    def probs(self) -> tuple[float, ...]:
        """Probability of each label, in their order."""
        best = max(self.logprobs)
        weights = [math.exp(logprob - best) for logprob in self.logprobs]
        total = sum(weights)
        return tuple(weight / total for weight in weights)

    @property
    def label(self) -> str:
        """The likeliest label; the first of several that are equally likely."""
        return self.labels[self.logprobs.index(max(self.logprobs))]

    @property
    def prob(self) -> float:
        """Probability of `label`."""
        return max(self.probs)

    def ranked(self) -> list[tuple[str, float]]:
        """Labels with their probabilities, the likeliest first."""
        pairs = zip(self.labels, self.probs, strict=True)
        return sorted(pairs, key=lambda pair: -pair[1])

    def __repr__(self) -> str:
        shown = [f"{label!r}: {prob:.3f}" for label, prob in self.ranked()[:_SHOWN_LABELS]]
        more = ["..."] if len(self.labels) > _SHOWN_LABELS else []
        return f"Classification({', '.join(shown + more)})"

    def _repr_html_(self) -> str:
        rows = [(label, f"{prob:.3f}") for label, prob in self.ranked()]
        return table(("label", "probability"), rows, texts=(0,))


@dataclass(frozen=True, slots=True)
class EditTrace:
    """What one edit did to one row.

    `relative_size` is the length of the edit's change over the length of the row before it, which
    counts as 1e-12 at least: a row may be of zeros.
    `intervention` is the position of the intervention in the request and `edit` that of the edit in
    its file, both from 0. `position` is the token's in the request; from the prompt's length on,
    tokens are generated.
    """

    intervention: int
    edit: int
    layer: int
    component: str
    position: int
    relative_size: float


@dataclass(frozen=True, slots=True)
class EditAlong(EditTrace):
    """What one edit did to one row, and where the row lies along the edit's directions.

    `before` and `after` are the row's coordinates before and after the edit: its product with each
    direction, taken at length 1. Directions are the rows of R, or what stands for it (W2, or the
    one vector that is added), in ascending order where a request names some. At strength 0 the
    row is read and not changed.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TracedEdit:
    """What one edit did in one step: `EditTrace`, or `EditAlong`, for several positions."""

    intervention: int
    edit: int
    layer: int
    component: str
    positions: tuple[int, ...]
    relative_sizes: tuple[float, ...]
    before: tuple[tuple[float, ...], ...] = ()
    after: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """What a request's interventions did: every edit of every row, and the outcome.

    `edits` are `EditAlong` if the request asks for a trace `along`.
    `kl` is the Kullback-Leibler divergence, in nats, of the distribution of the first generated
    token from the base model's after the same prompt. `log_ratios` has, for each choice, one number
    per token, an ending EOS or stop id included: the token's log-probability with the edits minus
    the base model's after the same tokens (nats; above 0 if the edits make the token likelier).
    """

    edits: tuple[EditTrace, ...]
    kl: float
    log_ratios: tuple[tuple[float, ...], ...] = ()

    @property
    def mean_log_ratio(self) -> float:
        """Mean of `log_ratios` over the tokens of all choices, in nats per token; 0 without tokens.

        Over answers drawn at temperature 1 it estimates the divergence from the base model per
        token.
        """
        ratios = [ratio for choice in self.log_ratios for ratio in choice]
        return sum(ratios) / len(ratios) if ratios else 0.0

    def summaries(self) -> list[EditSummary]:
        """What each edit did to all its rows, by intervention and edit."""
        rows: dict[tuple[int, int], list[EditTrace]] = {}
        for row in self.edits:
            rows.setdefault((row.intervention, row.edit), []).append(row)
        return [EditSummary.of(rows[key]) for key in sorted(rows)]

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the size of every edit as a heat map, layers by positions; return its axes.

        Where several edits meet in one place, the largest is shown. Raises `ConfigError` without
        matplotlib, and `InvalidRequest` if nothing was edited.
        """
        from reft_runtime.display.plots import heat_map

        return heat_map(
            [(e.layer, e.component, e.position, e.relative_size) for e in self.edits], axes
        )

    def _repr_html_(self) -> str:
        rows = [
            (
                str(one.intervention),
                str(one.layer),
                one.component,
                str(len(one.positions)),
                f"{one.mean:.3f}",
                f"{one.largest:.3f}",
            )
            for one in self.summaries()
        ]
        head = ("intervention", "layer", "component", "rows", "mean change", "largest change")
        far = (
            f"first token {self.kl:.3f} nats from the base, answer {self.mean_log_ratio:.3f} a"
            " token"
        )
        return table(head, rows, texts=(2,)) + f"<p>{far}</p>"


@dataclass(frozen=True, slots=True)
class EditSummary:
    """What one edit did: the positions of its rows, and the mean and the largest relative size."""

    intervention: int
    layer: int
    component: str
    positions: tuple[int, ...]
    mean: float
    largest: float

    @classmethod
    def of(cls, rows: Sequence[EditTrace]) -> Self:
        """The summary of the rows of one edit; `rows` must not be empty."""
        sizes = [row.relative_size for row in rows]
        return cls(
            rows[0].intervention,
            rows[0].layer,
            rows[0].component,
            tuple(sorted(row.position for row in rows)),
            sum(sizes) / len(sizes),
            max(sizes),
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """One column of `Engine.compare`: which interventions, their answer, and what they did."""

    interventions: tuple[str, ...]
    answer: Generation
    trace: Trace

    def _repr_html_(self) -> str:
        return _side_by_side([self])


class Comparisons(list[Comparison]):
    """All columns of `Engine.compare`, the base model's first."""

    def _repr_html_(self) -> str:
        return _side_by_side(self)


def _side_by_side(comparisons: Iterable[Comparison]) -> str:
    """HTML with the answers, each with its length and its distance from the base."""
    rows = [
        (
            " + ".join(one.interventions) or BASE_LABEL,
            one.answer.text.strip(),
            str(len(one.answer.tokens)),
            f"{one.trace.kl:.3f}",
            f"{one.trace.mean_log_ratio:.3f}",
        )
        for one in comparisons
    ]
    head = ("interventions", "answer", "tokens", "first token, nats", "mean a token, nats")
    return table(head, rows, texts=(0, 1))

"""The base model's view of a traced request's answers, computed in the same steps as others.

The base model is asked by requests of the engine's own, called questions. A traced request is over
when its trace is told, not when its last choice has ended.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import kl_div

from reft_runtime.engine.events import Event, Explained, Failed, PromptScored, TokenMade
from reft_runtime.outputs import TokenLogprob
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import Request

_FIRST_TOKEN = SamplingParams(temperature=0, max_tokens=1)
_SCORES = SamplingParams(max_tokens=0, prompt_logprobs=0)


class Explanation:
    """The trace of one request: its tokens as they are made, then the base model's view of them.

    `note` takes the request's tokens. `first` and `base_first` are the distributions [vocabulary]
    of its first token and of the base model's, in natural logarithms. `questions` are the requests
    to the base model that are not answered yet, made once all choices have ended: `answer` takes
    an event of one of them, and `outcome` is complete when none is left.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.questions: list[Request] = []
        self._scores: list[list[TokenLogprob]] = [[] for _ in range(request.sampling.n)]
        self.first: Tensor | None = None
        self.base_first: Tensor | None = None
        self._bases: dict[str, list[float]] = {}

    def note(self, event: TokenMade) -> None:
        """Take in a token of one of the request's choices."""
        if event.logprob is not None:
            self._scores[event.choice].append(event.logprob)

    def ask(self) -> list[Request]:
        """Make and return the questions, once the last choice has ended.

        The first asks for the first token's distribution, and one more for each choice asks for
        the log-probabilities of its tokens after the prompt. With the prefix cache only the first
        computes the prompt. There are no questions if no token was made, or if nothing changes
        the base model.
        """
        request = self.request
        if any(self._scores) and any(applied.strength for applied in request.interventions):
            plain = replace(request, interventions=())
            first = replace(plain, id=uuid.uuid4().hex, sampling=_FIRST_TOKEN)
            self.questions = [first] + [
                replace(
                    plain,
                    id=uuid.uuid4().hex,
                    prompt=(*request.prompt, *(score.token for score in scores)),
                    sampling=_SCORES,
                    trace=False,
                    scored_from=len(request.prompt),
                )
                for scores in self._scores
            ]
            self._bases = {question.id: [] for question in self.questions[1:]}
        return self.questions

    def answer(self, event: Event) -> None:
        """Take in an event of a question."""
        match event:
            case PromptScored():
                self._bases[event.request_id] += [score.logprob for score in event.logprobs]
            case TokenMade() if event.finish_reason:
                self.questions = [q for q in self.questions if q.id != event.request_id]

    def outcome(self) -> Explained:
        """The trace's figures; see `Trace`."""
        bases: SequenceOf[list[float]] = list(self._bases.values())
        if not bases:
            return Explained(
                self.request.id, 0.0, tuple((0.0,) * len(scores) for scores in self._scores)
            )
        kl = 0.0
        if self.first is not None and self.base_first is not None:
            kl = float(kl_div(self.base_first, self.first, reduction="sum", log_target=True))
        ratios = tuple(
            tuple(score.logprob - other for score, other in zip(scores, others, strict=True))
            for scores, others in zip(self._scores, bases, strict=True)
        )
        return Explained(self.request.id, kl, ratios)


class Explanations:
    """The explanations under way, of all traced requests of an engine."""

    def __init__(self) -> None:
        self._of: dict[str, Explanation] = {}
        self._asked: dict[str, Explanation] = {}

    def begin(self, request: Request) -> None:
        """Note a request that is queued, if it is traced."""
        if request.trace and request.id not in self._asked:
            self._of[request.id] = Explanation(request)

    def first(self, request_id: str, logprobs: Tensor) -> None:
        """Take the first token's log-probabilities [vocabulary] of a traced request or a question.

        Those of a question are the base model's.
        """
        if (own := self._of.get(request_id)) is not None:
            own.first = logprobs
        else:
            self._asked[request_id].base_first = logprobs

    def choices_ended(self, request_id: str) -> tuple[list[Request], list[Event]]:
        """Return the questions to queue once the last choice has ended, or else the outcome."""
        explanation = self._of.get(request_id)
        if explanation is None:
            return [], []
        questions = explanation.ask()
        if not questions:
            return [], [self._of.pop(request_id).outcome()]
        self._asked |= {question.id: explanation for question in questions}
        return questions, []

    def drop(self, request_id: str) -> list[str]:
        """Forget a request that is over; returns the ids of its unanswered questions."""
        explanation = self._of.pop(request_id, None)
        left = [] if explanation is None else [question.id for question in explanation.questions]
        for question in left:
            del self._asked[question]
        return left

    def pass_on(self, events: list[Event]) -> list[Event]:
        """Return the events of a step that callers are told.

        Events of questions are taken in and not told; the trace is told when it is complete. A
        question that failed fails its request.
        """
        told: list[Event] = []
        for event in events:
            explanation = self._asked.get(event.request_id)
            if explanation is None:
                if isinstance(event, TokenMade) and event.request_id in self._of:
                    self._of[event.request_id].note(event)
                told.append(event)
                continue
            if isinstance(event, Failed):
                told.append(replace(event, request_id=explanation.request.id))
                continue
            explanation.answer(event)
            if isinstance(event, TokenMade) and event.finish_reason:
                del self._asked[event.request_id]
                if not explanation.questions:
                    told.append(self._of.pop(explanation.request.id).outcome())
        return told

    def check_integrity(self) -> None:
        """Raise AssertionError if a trace is left. The engine must be idle."""
        if self._of or self._asked:
            raise AssertionError(f"traces left: {', '.join(self._of)}")

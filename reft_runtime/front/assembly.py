"""Turns the engine's token events into the text that callers read, for one request."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

from reft_runtime.engine.events import (
    Event,
    Explained,
    Failed,
    LabelsScored,
    PromptReused,
    PromptScored,
    Started,
    TokenMade,
    Traced,
)
from reft_runtime.errors import InvalidRequest, OutOfMemory, RequestFailed
from reft_runtime.front.prepared import Prepared
from reft_runtime.outputs import ChoiceDelta, EditAlong, EditTrace, TokenLogprob, Trace
from reft_runtime.schedule.request import Request
from reft_runtime.text import TextStream, Tokenizer


class Assembler:
    """Assembles the text of one request's choices, finds stop strings and collects the results.

    `abort_choice` is called with the index of a choice that a stop string ended, because the engine
    does not know about text.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        abort_choice: Callable[[int], None],
        completion_prefix: str = "",
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.started_at: float | None = None
        self.cached_tokens = 0
        """Prompt tokens that came from the prefix cache; known when the first delta comes."""
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            None if sampling.prompt_logprobs is None else [None] * request.scored_from
        )
        self.label_logprobs: tuple[float, ...] = ()
        """Log-probabilities of the request's labels, in their order, once it is done."""
        self._explained: Explained | None = None
        self._made = [0] * sampling.n
        self._edits: dict[tuple[int, int, int, str], dict[int, tuple[Any, ...]]] = {}
        self._abort_choice = abort_choice
        self._include_stop = sampling.include_stop_str_in_output
        self._texts = {
            index: TextStream(
                tokenizer,
                sampling.stop,
                sampling.min_tokens,
                skip_special_tokens=sampling.skip_special_tokens,
                kept_special_tokens=sampling.kept_special_tokens,
                include_stop=sampling.include_stop_str_in_output,
                completion_prefix=completion_prefix,
            )
            for index in range(sampling.n)
        }

    @classmethod
    def of(
        cls, prepared: Prepared, tokenizer: Tokenizer, abort: Callable[[str, int], None]
    ) -> Self:
        """That of a prepared request; `abort` ends a choice, by the request's id and its index."""
        request, prefix = prepared.request, prepared.form.completion_prefix
        return cls(request, tokenizer, partial(abort, request.id), prefix)

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return not self._texts

    @property
    def over(self) -> bool:
        """Whether all choices have ended and, for a traced request, the trace has come."""
        return self.done and (self._explained is not None or not self.request.trace)

    def trace(self) -> Trace:
        """What the interventions of a traced request did, available once the request is `over`.

        It takes some milliseconds for thousands of rows. Raises `RuntimeError` before that, and for
        a request that is not traced.
        """
        if self._explained is None:
            raise RuntimeError("the request is not traced, or not over")
        ratios = zip(self._explained.log_ratios, self._made, strict=True)
        # The engine may have made more tokens than the text has, which a stop string ended.
        return Trace(
            self._edit_traces(),
            self._explained.kl,
            tuple(choice[:made] for choice, made in ratios),
        )

    def _edit_traces(self) -> tuple[EditTrace, ...]:
        kind = EditAlong if self.request.trace == "along" else EditTrace
        found = [
            kind(*edit, position, *told)
            for edit, rows in self._edits.items()
            for position, told in rows.items()
        ]
        return tuple(sorted(found, key=lambda e: (e.position, e.intervention)))

    def feed(self, event: Event) -> ChoiceDelta | None:
        """Take one event of this request and return what its choice gained, None if nothing.

        Events of a choice that has ended give None. Raises `RequestFailed` if the request failed,
        `OutOfMemory` if memory ran out, and `InvalidRequest` if its grammar turned out too complex.
        """
        match event:
            case Started():
                self.started_at = event.at
            case PromptReused():
                self.cached_tokens = event.tokens
            case PromptScored():
                assert self.prompt_logprobs is not None
                self.prompt_logprobs.extend(event.logprobs)
            case Failed():
                self._texts.clear()
                if event.out_of_memory:
                    raise OutOfMemory(event.reason)
                if event.param is not None:
                    raise InvalidRequest(f"{event.param}: {event.reason}", param=event.param)
                raise RequestFailed(event.reason)
            case Traced():
                # A preempted prompt is computed and edited again, with the same rows and sizes.
                for e in event.edits:
                    rows = self._edits.setdefault(
                        (e.intervention, e.edit, e.layer, e.component), {}
                    )
                    along = (e.before, e.after) if e.before else ()
                    told = zip(e.relative_sizes, *along, strict=True)
                    rows.update(zip(e.positions, told, strict=True))
            case Explained():
                self._explained = event
            case LabelsScored():
                self.label_logprobs = event.logprobs
                self._texts.clear()
                return ChoiceDelta(index=0, text="", finish_reason="stop")
            case TokenMade():
                return self._token(event)
        return None

    def _token(self, event: TokenMade) -> ChoiceDelta | None:
        text_stream = self._texts.get(event.choice)
        if text_stream is None:
            return None  # a stop string ended it, and this token was made before the abort
        tokens = () if event.token is None else (event.token,)
        self._made[event.choice] += len(tokens)
        # The token that ends an answer is not part of its text, even if it is an ordinary token.
        ends = event.finish_reason == "stop" and not (event.complete or self._include_stop)
        text, stop_string = text_stream.push(() if ends else tokens)
        if event.finish_reason and stop_string is None:
            rest, stop_string = text_stream.finish()
            text += rest
        if stop_string is not None and event.finish_reason is None:
            self._abort_choice(event.choice)
        reason = event.finish_reason if stop_string is None else "stop"
        if reason is not None:
            del self._texts[event.choice]
        return ChoiceDelta(
            index=event.choice,
            text=text,
            tokens=tokens,
            logprobs=() if event.logprob is None else (event.logprob,),
            finish_reason=reason,
            stop_reason=event.stop_id if stop_string is None else stop_string,
        )

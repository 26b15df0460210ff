"""Sampling on a device: what `sampler` does, without waiting for the device.

A row's settings are sent as a few numbers. Penalties are counted on the device, from its own
tokens where the CPU does not know them yet. Only tokens, and log-probabilities where a request
asks for them, travel back, and the next step is launched before they arrive.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from reft_runtime.engine.masks import allowed
from reft_runtime.engine.sampler import TINY, Sampled, banned, has_penalties, noise
from reft_runtime.kernels.staging import Fetch, send, to_device
from reft_runtime.outputs import TokenLogprob
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import Sequence

NOBODY = -1


class Settings(NamedTuple):
    """The settings of one row as the kernels read them, all float64; `NOBODY` stands for none.

    `source` is the index of the row's logits, `place` of its edited scores, `lane` of its counts.
    Tokens without a bit in its row of masks, `mask`, are dropped. Items [first_item, stop_item) are
    added to its scores. The newest token, which is still to be counted, is `newest`, or stands at
    index `newest_at` of the previous step's tokens. `point` in [0, 1) draws the token; `inverse` is
    1 / temperature, or 0 for a greedy row. After temperature, scores more than `reach` below the
    best are dropped (min_p), then at most `limit` scores are kept (top_k), and of their weight
    `share` (top_p). `best` is the number of best tokens whose log-probabilities are asked for.
    """

    source: float
    place: float
    lane: float
    mask: float
    first_item: float
    stop_item: float
    newest: float
    newest_at: float
    point: float
    repetition: float
    presence: float
    frequency: float
    inverse: float
    reach: float
    limit: float
    share: float
    best: float


class Needs(NamedTuple):
    """Whether any row of a batch needs a draw, a top_k or top_p threshold, log-probabilities."""

    draws: bool
    truncates: bool
    logprobs: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows for which tokens are picked from `logits` [any, vocabulary].

    `settings` is float64 [rows, fields of `Settings`]. `items` is float64 [items, 2]: pairs of a
    token id and what is added to its score, sorted by id within each row. `masks` is int32 [masks,
    words], with a bit for each token id that is allowed, lowest first. `counts` is int32
    [lanes, vocabulary]. `before` is int64, the previous step's tokens. `edited` is the number of
    rows whose scores differ from their logits.
    """

    logits: Tensor
    settings: Tensor
    items: Tensor
    masks: Tensor | None
    counts: Tensor | None
    before: Tensor | None
    edited: int
    needs: Needs


class Chosen(NamedTuple):
    """The picked tokens, int64 [rows], -1 where a row is not finite, and log-probabilities.

    `logprobs` is [rows, 1 + k]: the picked token's own, then those of the k best tokens, whose
    ids are `ids` [rows, k].
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    ids: Tensor | None = None


Select = Callable[[Batch], Chosen]
"""Picks a token for each row of a batch; does not wait for the device that the logits are on."""


class Draw(NamedTuple):
    """One token to pick for `sequence`, from row `source` of the logits.

    `made` tokens of the sequence are generated already. If the CPU does not know the newest of
    them yet, it stands at index `newest_at` of the previous step's tokens.
    """

    sequence: Sequence
    made: int
    source: int
    newest_at: int = NOBODY


class Picked:
    """Picked tokens, with log-probabilities if a row asks for them, on their way to the CPU."""

    def __init__(self, draws: SequenceOf[Draw], chosen: Chosen) -> None:
        self.tokens = chosen.tokens
        """int64 [rows] on the device of the logits; -1 where a row is not finite."""
        self._best = [draw.sequence.request.sampling.logprobs for draw in draws]
        self._fetch = Fetch(*(tensor for tensor in chosen if tensor is not None))

    def result(self) -> list[Sampled | None]:
        """Wait for the tokens; None stands for a row that cannot be sampled."""
        tokens, *logprobs = self._fetch.lists()
        if not logprobs:
            return [None if token < 0 else Sampled(token) for token in tokens]
        return [
            None if token < 0 else Sampled(token, _logprob(token, values, ids, k))
            for token, values, ids, k in zip(tokens, *logprobs, self._best, strict=True)
        ]


def sampling_bytes(vocabulary: int, rows: int) -> int:
    """Bytes for `rows` rows: their counts, their edited scores, and the scores that may be kept."""
    return 3 * rows * vocabulary * 4


@dataclass(slots=True)
class _Held:
    """What stays the same for a sequence, and how many of its tokens its lane has counted.

    `constant` holds the fields of its `Settings` from `repetition` on.
    """

    constant: tuple[float, ...]
    needs: Needs
    penalised: bool
    bias: Tensor | None
    bias_and_bans: Tensor | None
    lane: int = NOBODY
    counted: int | None = None


@dataclass(slots=True)
class DeviceSampler:
    """Picks tokens by `select`, for at most `most` sequences at once."""

    vocabulary: int
    most: int
    eos_ids: frozenset[int]
    device: torch.device
    select: Select
    _held: dict[Sequence, _Held] = field(default_factory=dict)
    _free: list[int] = field(init=False)
    _counts: Tensor | None = None

    def __post_init__(self) -> None:
        self._free = list(range(self.most))[::-1]

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile the kernels that a row may need, for logits of a model's dtype."""
        params = SamplingParams(
            top_k=2, top_p=0.5, repetition_penalty=2, logit_bias={0: 1}, logprobs=1
        )
        sequence = Sequence(Request("warm up", (0,), params, seed=0), 0, 0, [0])
        logits = torch.zeros(1, self.vocabulary, dtype=dtype, device=self.device)
        self.pick(logits, [Draw(sequence, 0, 0)]).result()
        self.release([sequence])
        self._counts = None  # allocated again when a request has a penalty

    @torch.inference_mode()
    def pick(self, logits: Tensor, draws: SequenceOf[Draw], before: Tensor | None = None) -> Picked:
        """Pick a token for each of `draws` from `logits` [any, vocabulary].

        `before` are the previous step's tokens, needed where the CPU does not know some of them.
        """
        told = array("d")
        items: list[Tensor] = []
        masks = allowed([draw.sequence for draw in draws], self.vocabulary, self.eos_ids)
        formed = [mask for mask in masks if mask is not None]
        masked = 0
        counting: list[tuple[_Held, int]] = []
        needs: set[Needs] = set()
        edited = added = 0
        for draw, mask in zip(draws, masks, strict=True):
            sequence, made, source, _ = draw
            held = self._held.get(sequence) or self._hold(sequence)
            params = sequence.request.sampling
            needs.add(held.needs)
            place = mask_at = newest = newest_at = NOBODY
            first, point = added, 0.0
            own = held.bias
            if mask is not None:
                mask_at, masked = masked, masked + 1
            elif made < params.min_tokens:
                own = held.bias_and_bans
            if own is not None:
                items.append(own)
                added += len(own)
            if held.penalised:
                newest, newest_at = self._count(held, draw)
                counting.append((held, made))
            if held.penalised or own is not None or mask is not None:
                place, edited = edited, edited + 1
            if params.temperature:
                point = noise(sequence.request.seed, sequence.choice, made)
            told.extend((source, place, held.lane, mask_at, first, added, newest, newest_at, point))
            told.extend(held.constant)
        settings, adds = self._send(told, items)
        batch = Batch(
            logits,
            settings,
            adds,
            send(torch.stack(formed), self.device) if formed else None,
            self._counts,
            before,
            edited,
            Needs(*map(any, zip(*needs, strict=True))),
        )
        # If anything fails from here on, it is unknown what was counted.
        for held, _ in counting:
            held.counted = None
        chosen = self.select(batch)
        for held, made in counting:
            held.counted = made
        return Picked(draws, chosen)

    def release(self, sequences: Iterable[Sequence]) -> None:
        """Forget sequences that have ended or were preempted; unknown ones are ignored."""
        for sequence in sequences:
            held = self._held.pop(sequence, None)
            if held is not None and held.lane >= 0:
                self._free.append(held.lane)

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise AssertionError if lanes are lost, or if `idle` and any sequence is known."""
        used = [held.lane for held in self._held.values() if held.lane >= 0]
        if sorted([*self._free, *used]) != list(range(self.most)):
            raise AssertionError("sampling: lanes are lost or given twice")
        if idle and self._held:
            raise AssertionError(f"sampling: {len(self._held)} sequences are still known")

    def _send(self, told: array[float], items: SequenceOf[Tensor]) -> tuple[Tensor, Tensor]:
        """Send settings and items to the device in one copy."""
        flat = torch.frombuffer(told, dtype=torch.float64)
        if items:
            flat = torch.cat([flat, *(each.flatten() for each in items)])
        settings, added = send(flat, self.device).tensor_split([len(told)])
        return settings.view(-1, len(Settings._fields)), added.view(-1, 2)

    def _hold(self, sequence: Sequence) -> _Held:
        params = sequence.request.sampling
        bias = dict(params.logit_bias)
        bans = dict.fromkeys(banned(params, self.eos_ids), float("-inf"))
        truncates = 0 < params.top_k < self.vocabulary or params.top_p < 1
        held = _Held(
            _constant(params, self.vocabulary),
            Needs(
                params.temperature > 0,
                params.temperature > 0 and truncates,
                params.logprobs is not None,
            ),
            has_penalties(params),
            _items(bias),
            _items({**bias, **bans}),
        )
        self._held[sequence] = held
        return held

    def _count(self, held: _Held, draw: Draw) -> tuple[int, int]:
        """Make a lane count all tokens but the newest, and return that one: the kernel counts it.

        It is returned as (token, NOBODY), or as (NOBODY, its index in the previous step's tokens)
        if the CPU does not know it. (NOBODY, NOBODY) means that the lane counts it already.
        """
        sequence, made = draw.sequence, draw.made
        known = min(made, sequence.generated_length)
        if held.lane < 0:
            held.lane = self._free.pop()
        if held.counted is None or held.counted not in (made - 1, made):
            self._write(held.lane, sequence.request.prompt, sequence.generated[:known])
            held.counted = known
        if held.counted == made:
            return NOBODY, NOBODY
        if known < made:
            return NOBODY, draw.newest_at
        return sequence.tokens[sequence.prompt_length + made - 1], NOBODY

    def _write(self, lane: int, prompt: SequenceOf[int], generated: SequenceOf[int]) -> None:
        """Count all tokens of a sequence anew in its lane."""
        if self._counts is None:
            shape = self.most, self.vocabulary
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        codes = Counter(dict.fromkeys(prompt, 1))
        for token in generated:
            codes[token] += 2
        ids, numbers = to_device((list(codes), list(codes.values())), self.device)
        counts = self._counts[lane].zero_()
        counts[ids] = numbers.int()


def _constant(params: SamplingParams, vocabulary: int) -> tuple[float, ...]:
    """The fields of `Settings` from `repetition` on; rounded to float32 where `sampler` does."""
    temperature, min_p = torch.tensor([params.temperature, params.min_p], dtype=torch.float32)
    inverse = 1 / temperature.clamp(min=TINY) if params.temperature else 0.0
    return (
        max(params.repetition_penalty, TINY),
        params.presence_penalty,
        params.frequency_penalty,
        float(inverse),
        float(-min_p.log()),
        min(params.top_k or vocabulary, vocabulary),
        params.top_p,
        NOBODY if params.logprobs is None else params.logprobs,
    )


def _items(adds: dict[int, float]) -> Tensor | None:
    """Pairs of an id and what is added to its score, float64 [n, 2], by id; None if n is 0."""
    return torch.tensor(sorted(adds.items()), dtype=torch.float64) if adds else None


def _logprob(
    token: int, values: SequenceOf[float], ids: SequenceOf[int], k: int | None
) -> TokenLogprob | None:
    if k is None:
        return None
    top = tuple(zip(ids[:k], values[1 : 1 + k], strict=True))
    return TokenLogprob(token, values[0], top)

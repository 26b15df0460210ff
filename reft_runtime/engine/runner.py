"""Runs one step: packs its chunks, edits, attends, and samples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from reft_runtime.base.model import LoadedModel, forward
from reft_runtime.base.ranks import alike
from reft_runtime.edits.sites import EditSites
from reft_runtime.edits.step import OnDevice, StepEdits
from reft_runtime.edits.tables import EditTables
from reft_runtime.engine.device_sampler import DeviceSampler, Draw, Picked
from reft_runtime.engine.followers import Followers
from reft_runtime.engine.labels import beginnings, label_logprobs, scored_rows
from reft_runtime.engine.masks import allowed
from reft_runtime.engine.sampler import (
    Sampled,
    SampleRow,
    has_penalties,
    prompt_logprobs,
    sample,
)
from reft_runtime.kernels.staging import send, to_device
from reft_runtime.kv.storage import KVStorage
from reft_runtime.machine.memory import CODE_ROOM, check_room, is_out_of_memory
from reft_runtime.outputs import TokenLogprob, TracedEdit
from reft_runtime.schedule.labels import Tokens
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.prefix_cache import BlockCopy, StateCopy
from reft_runtime.schedule.sequence import Sequence, Status

KNOWN_SHAPES = 64
"""Number of step shapes whose code oneDNN still has: it keeps the code of 1,024 products."""

NOT_FINITE = "the model's output is not finite"

Sample = tuple[Sequence, int]
"""A sequence that gets a token, and the index of its row of logits."""


@dataclass(slots=True)
class StepResult:
    """The results of a step: tokens, log-probabilities of prompt tokens, and failures."""

    sampled: list[tuple[Sequence, Sampled]] = field(default_factory=list)
    prompt_logprobs: list[tuple[Sequence, int, list[TokenLogprob]]] = field(default_factory=list)
    """Sequence, index of the first scored prompt token, and one log-probability per token."""
    label_logprobs: list[tuple[Sequence, dict[Tokens, float]]] = field(default_factory=list)
    """Sequence, and log-probabilities of what may come next in its labels, by beginning."""
    failed: dict[Sequence, str] = field(default_factory=dict)
    traces: dict[Sequence, list[TracedEdit]] = field(default_factory=dict)
    first_logprobs: dict[Sequence, Tensor] = field(default_factory=dict)
    """Log-probabilities [vocabulary], on the CPU, of the first token of traced sequences."""


@dataclass(slots=True)
class _Wanted:
    """Rows of logits to compute, and the sequences that they belong to."""

    rows: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    prompts: list[tuple[Sequence, int, int, int]] = field(default_factory=list)
    labels: list[tuple[Chunk, int]] = field(default_factory=list)


class Decoder(Protocol):
    """Another way to compute a step in which every sequence decodes."""

    def logits(self, chunks: SequenceOf[Chunk], tokens: Tensor | None = None) -> Tensor | None:
        """Return logits [chunks, vocabulary], valid until the next step; None if it cannot.

        `tokens` [chunks] are the input tokens on the device, given if the CPU does not know them
        yet; -1 stands for no token.
        """


class Launched:
    """A decode step in progress: each chunk gets one token, which the CPU may wait for later."""

    def __init__(self, chunks: SequenceOf[Chunk], picked: Picked) -> None:
        self.chunks = chunks
        self.tokens = picked.tokens
        """int64 [chunks] on the device, -1 where the logits are not finite."""
        self._picked = picked

    def result(self) -> StepResult:
        """Wait for the tokens; returns those of sequences that still run."""
        result = StepResult()
        for chunk, sampled in zip(self.chunks, self._picked.result(), strict=True):
            if chunk.sequence.status is not Status.RUNNING:
                continue
            if sampled is None:
                result.failed[chunk.sequence] = NOT_FINITE
            else:
                result.sampled.append((chunk.sequence, sampled))
        return result


class Runner:
    """Owns the model and the keys and values.

    Where several ranks compute the model, each has a runner. That of rank 0 has `followers`: it
    tells them what it does, and they do the same.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        storage: KVStorage,
        tables: EditTables | None = None,
        sampler: DeviceSampler | None = None,
        followers: Followers | None = None,
    ) -> None:
        self.loaded = loaded
        self.storage = storage
        two = torch.arange(2, device=loaded.device)
        self.sites = EditSites(
            loaded.model,
            loaded.layers,
            loaded.mixers,
            lambda step: forward(loaded.model, two, two, two[:1], step),
            None if loaded.ranks == 1 else partial(alike, device=loaded.device),
        )
        self.tables = tables
        self.sampler = sampler
        self.decoder: Decoder | None = None
        self._followers = followers
        self._on_device = OnDevice(loaded.device)
        self._known: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._decoding: tuple[tuple[tuple[Sequence, int], ...], StepEdits] | None = None

    @torch.inference_mode()
    def run(self, chunks: SequenceOf[Chunk]) -> StepResult | Launched:
        """Compute the chunks' tokens, and sample where a chunk completes its sequence.

        Returns `Launched` if all chunks decode and the device may still be computing them.
        """
        chunks = self.storage.prepare(chunks)
        wanted = _wanted_rows(chunks)
        logits = None
        if self.decoder is not None and wanted.rows == list(range(len(chunks))):
            logits = self.decoder.logits(chunks)
            # Labels are scored from the logits at once.
            sampled = all(_made(c) and c.sequence.request.labels is None for c in chunks)
            if logits is not None and self.sampler is not None and sampled:
                draws = [Draw(c.sequence, _made(c), row) for row, c in enumerate(chunks)]
                return Launched(chunks, self.sampler.pick(logits, draws))
        if logits is None:
            logits, edits = self.compute(chunks, wanted.rows)
        else:  # the decoder has applied the edits of what it computed
            edits = StepEdits.of((), self._on_device, self.sites.same, self.tables)
        self.fork(chunks)
        result = StepResult(traces=edits.traces)
        result.failed.update(
            {sequence: f"its intervention failed: {e}" for sequence, e in edits.failed.items()}
        )
        self._sample(logits, wanted, result)
        return result

    @torch.inference_mode()
    def compute(self, chunks: SequenceOf[Chunk], rows: SequenceOf[int]) -> tuple[Tensor, StepEdits]:
        """Compute chunks in the order of `KVStorage.prepare`, with their edits.

        Returns the logits [rows, vocabulary] of the packed `rows`, and the edits as they went.
        """
        edits = self._edits(chunks)
        self._check_room(sum(chunk.length for chunk in chunks), len(rows))
        if self._followers is None:
            logits = self._forward(chunks, rows, edits)
        else:
            self._followers.step(chunks, rows)
            try:
                logits = self._forward(chunks, rows, edits)
            except Exception as error:
                raise self._followers.broken(error) from error
        return logits, edits

    def _edits(self, chunks: SequenceOf[Chunk]) -> StepEdits:
        """The edits of a step; those of the one before where the same rows decode again."""
        decoding = tuple((c.sequence, c.sequence.turns_before(c.start)) for c in chunks)
        alike = self.tables is None and all(
            chunk.length == 1
            and chunk.start >= chunk.sequence.prompt_length
            and not chunk.sequence.request.trace
            for chunk in chunks
        )
        if alike and self._decoding is not None and self._decoding[0] == decoding:
            return self._decoding[1].again()
        edits = StepEdits.of(chunks, self._on_device, self.sites.same, self.tables)
        self._decoding = (decoding, edits) if alike else None
        return edits

    def fork(self, chunks: SequenceOf[Chunk]) -> None:
        """Give the chunks' forks what these share, once the chunks are computed."""
        for chunk in chunks:
            for child in chunk.forks:
                self.storage.fork(chunk.sequence, child, chunk.shared)

    @torch.inference_mode()
    def run_after(self, launched: Launched, chunks: SequenceOf[Chunk]) -> Launched | None:
        """Launch the next decode step of a launched step's sequences before their tokens are known.

        Returns None if that is not possible.
        """
        if self.decoder is None or self.sampler is None:
            return None
        chunks = self.storage.prepare(chunks)
        row_of = {chunk.sequence: row for row, chunk in enumerate(launched.chunks)}
        rows = [row_of[chunk.sequence] for chunk in chunks]
        tokens = launched.tokens[send(torch.tensor(rows), self.loaded.device)]
        logits = self.decoder.logits(chunks, tokens)
        if logits is None:
            return None
        draws = [
            Draw(chunk.sequence, _made(chunk), row, before)
            for row, (chunk, before) in enumerate(zip(chunks, rows, strict=True))
        ]
        return Launched(chunks, self.sampler.pick(logits, draws, launched.tokens))

    def keep(self, blocks: SequenceOf[BlockCopy], states: SequenceOf[StateCopy]) -> None:
        """Copy blocks and recurrent states into the prefix cache's places."""
        if blocks:
            self.storage.keep(blocks)
            if self._followers is not None:
                self._followers.keep(blocks)
        if states:
            self.storage.keep_states(states)

    def release(self, sequences: SequenceOf[Sequence]) -> None:
        """Forget sequences that have ended or were preempted."""
        if sequences:
            self._decoding = None
        self.storage.release(sequences)
        if self._followers is not None:
            self._followers.release(sequences)
        if self.sampler is not None:
            self.sampler.release(sequences)

    def close(self) -> None:
        """Free the memory of keys and values, tables and graphs; no step may follow."""
        for held in ("storage", "tables", "sampler", "decoder"):
            vars(self).pop(held, None)

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise AssertionError if the bookkeeping disagrees, or if `idle` and anything is left."""
        self.storage.check_integrity(idle=idle)
        if self.sampler is not None:
            self.sampler.check_integrity(idle=idle)

    def _check_room(self, tokens: int, rows: int) -> None:
        """Raise `MemoryError` if a step's shapes are new and memory is too short for their code.

        The check comes before anything is computed: oneDNN does not survive a failed allocation.
        """
        if self.loaded.device.type != "cpu":
            return
        if (tokens, rows) not in self._known:
            check_room(CODE_ROOM)
        self._known[tokens, rows] = None
        self._known.move_to_end((tokens, rows))
        if len(self._known) > KNOWN_SHAPES:
            self._known.popitem(last=False)

    def _forward(
        self, chunks: SequenceOf[Chunk], wanted: SequenceOf[int], edits: StepEdits
    ) -> Tensor:
        ids = [token for c in chunks for token in c.sequence.tokens[c.start : c.stop]]
        positions = [position for c in chunks for position in range(c.start, c.stop)]
        packed, places, rows = to_device((ids, positions, wanted), self.loaded.device)
        with self.sites.hooked(edits):
            logits: Tensor = forward(
                self.loaded.model, packed, places, rows, self.storage.attention(chunks)
            )
        return logits

    def _sample(self, logits: Tensor, wanted: _Wanted, result: StepResult) -> None:
        for sequence, first, row, count in wanted.prompts:
            tokens = sequence.request.prompt[first : first + count]
            k = sequence.request.sampling.prompt_logprobs or 0
            values = [v for v in prompt_logprobs(logits[row : row + count], tokens, k) if v]
            if len(values) < count:
                result.failed[sequence] = NOT_FINITE
            result.prompt_logprobs.append((sequence, first, values))
        for chunk, row in wanted.labels:
            labels, known = chunk.sequence.request.labels, beginnings(chunk)
            assert labels is not None
            found = label_logprobs(
                logits[row : row + len(known)], known, labels.following, self.loaded.eos_ids
            )
            if found is None:
                result.failed[chunk.sequence] = NOT_FINITE
            else:
                result.label_logprobs.append((chunk.sequence, found))
        if not wanted.samples:
            return
        for sequence, row in wanted.samples:
            if sequence.request.trace and sequence.leads and not sequence.generated_length:
                result.first_logprobs[sequence] = logits[row].float().log_softmax(-1).cpu()
        picked = _pick_each(lambda samples: self._pick(logits, samples), wanted.samples)
        for (sequence, _), outcome in zip(wanted.samples, picked, strict=True):
            if isinstance(outcome, Sampled):
                result.sampled.append((sequence, outcome))
            else:
                result.failed[sequence] = outcome

    def _pick(self, logits: Tensor, samples: SequenceOf[Sample]) -> list[Sampled | None]:
        if self.sampler is not None:
            draws = [Draw(s, s.generated_length, row) for s, row in samples]
            return self.sampler.pick(logits, draws).result()
        kept = [row for _, row in samples]
        if kept != list(range(len(logits))):  # an index makes a copy
            logits = logits[kept]
        masks = allowed([s for s, _ in samples], self.loaded.vocab_size, self.loaded.eos_ids)
        rows = [self._sample_row(s, mask) for (s, _), mask in zip(samples, masks, strict=True)]
        return sample(logits, rows)

    def _sample_row(self, sequence: Sequence, mask: Tensor | None) -> SampleRow:
        request = sequence.request
        return SampleRow(
            params=request.sampling,
            seed=request.seed,
            choice=sequence.choice,
            made=sequence.generated_length,
            counts=sequence.counts() if has_penalties(request.sampling) else None,
            eos_ids=self.loaded.eos_ids,
            allowed=mask,
        )


def _made(chunk: Chunk) -> int:
    """Number of generated tokens up to a chunk's end; 0 for a chunk of the prompt."""
    return max(0, chunk.stop - chunk.sequence.prompt_length)


def _wanted_rows(chunks: SequenceOf[Chunk]) -> _Wanted:
    wanted = _Wanted()
    first = 0
    for chunk in chunks:
        sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
        if sequence.request.labels is not None and (scored := scored_rows(chunk)):
            wanted.labels.append((chunk, len(wanted.rows)))
            wanted.rows.extend(first + at - chunk.start for at in scored)
        if sampling.prompt_logprobs is not None and sequence.leads:
            # The row of token i predicts token i + 1.
            start = max(chunk.start, sequence.request.scored_from - 1)
            stop = min(chunk.stop, sequence.prompt_length - 1)
            if (count := stop - start) > 0:
                wanted.prompts.append((sequence, start + 1, len(wanted.rows), count))
                begin = first + start - chunk.start
                wanted.rows.extend(range(begin, begin + count))
        if chunk.completes and sampling.max_tokens != 0:
            wanted.samples.extend((s, len(wanted.rows)) for s in (sequence, *chunk.forks))
            wanted.rows.append(first + chunk.length - 1)
        first += chunk.length
    return wanted


def _pick_each(
    pick: Callable[[SequenceOf[Sample]], list[Sampled | None]], samples: SequenceOf[Sample]
) -> list[Sampled | str]:
    """Pick all tokens; if that raises, pick them one by one, so that a bad row fails alone."""
    try:
        picked = pick(samples)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if len(samples) == 1:
            return [f"sampling failed: {error}"]
        return [_pick_each(pick, [one])[0] for one in samples]
    return [NOT_FINITE if one is None else one for one in picked]

"""Runs one step: packs its chunks, edits, attends, and samples."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from reft_runtime.engine.cuda.tables import EditTables
from reft_runtime.engine.edits import OnDevice, StepEdits
from reft_runtime.engine.kv import KVStorage
from reft_runtime.engine.loader import LoadedModel, forward
from reft_runtime.engine.sampler import (
    Sampled,
    SampleRow,
    is_plain,
    noise,
    prompt_logprobs,
    sample,
    sample_plain,
)
from reft_runtime.engine.scheduler import Chunk
from reft_runtime.engine.sequence import Sequence, Status
from reft_runtime.engine.sites import EditSites
from reft_runtime.engine.staging import Fetch, send, to_device
from reft_runtime.outputs import EditTrace, TokenLogprob

NOT_FINITE = "the model's output is not finite"


@dataclass(slots=True)
class StepResult:
    """What a step gave: tokens, log-probabilities of prompt tokens, and who failed and why."""

    sampled: list[tuple[Sequence, Sampled]] = field(default_factory=list)
    prompt_logprobs: list[tuple[Sequence, int, list[TokenLogprob]]] = field(default_factory=list)
    """Sequence, index of the first prompt token meant, and one entry a token."""
    failed: dict[Sequence, str] = field(default_factory=dict)
    traces: dict[Sequence, list[EditTrace]] = field(default_factory=dict)
    first_logprobs: dict[Sequence, Tensor] = field(default_factory=dict)
    """Distribution [vocabulary] of the first token, of sequences that are traced."""


@dataclass(slots=True)
class _Wanted:
    """Rows of logits to compute, and which of them are whose."""

    rows: list[int] = field(default_factory=list)
    samples: list[tuple[Sequence, int]] = field(default_factory=list)
    prompts: list[tuple[Sequence, int, int, int]] = field(default_factory=list)


class Decoder(Protocol):
    """Another way to compute a step in which every sequence decodes."""

    def logits(self, chunks: SequenceOf[Chunk], tokens: Tensor | None = None) -> Tensor | None:
        """Logits [chunks, vocabulary], good until the next step; None where it cannot do this.

        `tokens` [chunks] are to be computed where the CPU does not know them yet; -1 is none.
        """


class Launched:
    """A decode step on its way: each chunk gets one token, which the CPU may wait for later."""

    def __init__(self, chunks: SequenceOf[Chunk], tokens: Tensor) -> None:
        self.chunks = chunks
        self.tokens = tokens
        """int64 [chunks] on the device, -1 where the logits are not finite."""
        self._fetch = Fetch(tokens)

    def result(self) -> StepResult:
        """Wait for the tokens, of those sequences that still run."""
        result = StepResult()
        for chunk, token in zip(self.chunks, self._fetch.tolist(), strict=True):
            if chunk.sequence.status is not Status.RUNNING:
                continue
            if token < 0:
                result.failed[chunk.sequence] = NOT_FINITE
            else:
                result.sampled.append((chunk.sequence, Sampled(token)))
        return result


class Runner:
    """Owns the model and the keys and values."""

    def __init__(
        self, loaded: LoadedModel, storage: KVStorage, tables: EditTables | None = None
    ) -> None:
        self.loaded = loaded
        self.storage = storage
        two = torch.arange(2, device=loaded.device)
        self.sites = EditSites(
            loaded.model, loaded.layers, lambda step: forward(loaded.model, two, two, two[:1], step)
        )
        self.tables = tables
        self.decoder: Decoder | None = None
        self._on_device = OnDevice(loaded.device)

    @torch.inference_mode()
    def run(self, chunks: SequenceOf[Chunk]) -> StepResult | Launched:
        """Compute the chunks' tokens, and sample where a chunk completes its sequence.

        Where all decode, and nothing but tokens is asked for, the device may still be at it.
        """
        chunks = self.storage.prepare(chunks)
        wanted = _wanted_rows(chunks)
        logits = None
        if self.decoder is not None and wanted.rows == list(range(len(chunks))):
            logits = self.decoder.logits(chunks)
            if logits is not None and all(map(_is_plain, chunks)):
                return self._launched(chunks, logits)
        # What the decoder computed it has edited, too.
        edits = StepEdits.of(chunks if logits is None else (), self._on_device, self.tables)
        if logits is None:
            logits = self._forward(chunks, wanted, edits)
        for chunk in chunks:
            for child in chunk.forks:
                self.storage.fork(chunk.sequence, child, chunk.stop)
        result = StepResult(traces=edits.traces)
        result.failed.update(
            {sequence: f"its intervention failed: {e}" for sequence, e in edits.failed.items()}
        )
        self._sample(logits, wanted, result)
        return result

    @torch.inference_mode()
    def run_after(self, launched: Launched, chunks: SequenceOf[Chunk]) -> Launched | None:
        """Begin the next step of a launched one's sequences, without knowing their tokens.

        None where that cannot be.
        """
        if self.decoder is None or not all(map(_is_plain, chunks)):
            return None
        chunks = self.storage.prepare(chunks)
        row_of = {chunk.sequence: row for row, chunk in enumerate(launched.chunks)}
        rows = torch.tensor([row_of[chunk.sequence] for chunk in chunks])
        tokens = launched.tokens[send(rows, self.loaded.device)]
        logits = self.decoder.logits(chunks, tokens)
        return None if logits is None else self._launched(chunks, logits)

    def _launched(self, chunks: SequenceOf[Chunk], logits: Tensor) -> Launched:
        params = [chunk.sequence.request.sampling for chunk in chunks]
        return Launched(chunks, sample_plain(logits, params, [_point(c) for c in chunks]))

    def _forward(self, chunks: SequenceOf[Chunk], wanted: _Wanted, edits: StepEdits) -> Tensor:
        ids = [token for c in chunks for token in c.sequence.tokens[c.start : c.stop]]
        positions = [position for c in chunks for position in range(c.start, c.stop)]
        packed, places, rows = to_device((ids, positions, wanted.rows), self.loaded.device)
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
        if not wanted.samples:
            return
        owners = [sequence for sequence, _ in wanted.samples]
        rows = [self._sample_row(sequence) for sequence in owners]
        kept = [row for _, row in wanted.samples]
        if kept != list(range(len(logits))):  # an index makes a copy
            logits = logits[kept]
        for row, sequence in enumerate(owners):
            if sequence.request.trace and sequence.leads and not sequence.generated_length:
                result.first_logprobs[sequence] = logits[row].float().log_softmax(-1).cpu()
        for sequence, outcome in zip(owners, _sample_each(logits, rows), strict=True):
            if isinstance(outcome, Sampled):
                result.sampled.append((sequence, outcome))
            else:
                result.failed[sequence] = outcome

    def _sample_row(self, sequence: Sequence) -> SampleRow:
        request = sequence.request
        return SampleRow(
            params=request.sampling,
            seed=request.seed,
            choice=sequence.choice,
            prompt=request.prompt,
            generated=sequence.generated,
            eos_ids=self.loaded.eos_ids,
        )


def _is_plain(chunk: Chunk) -> bool:
    """Whether a chunk is a generated token, after which `sample_plain` picks the next."""
    request = chunk.sequence.request
    made = chunk.stop - len(request.prompt)
    return made > 0 and is_plain(request.sampling, made)


def _point(chunk: Chunk) -> float:
    """Where in its distribution a chunk's token is drawn, if it is drawn."""
    request = chunk.sequence.request
    if not request.sampling.temperature:
        return 0.0
    return noise(request.seed, chunk.sequence.choice, chunk.stop - len(request.prompt))


def _wanted_rows(chunks: SequenceOf[Chunk]) -> _Wanted:
    wanted = _Wanted()
    first = 0
    for chunk in chunks:
        sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
        if sampling.prompt_logprobs is not None and sequence.leads:
            # The row of token i predicts token i + 1.
            stop = min(chunk.stop, sequence.prompt_length - 1)
            if (count := stop - chunk.start) > 0:
                wanted.prompts.append((sequence, chunk.start + 1, len(wanted.rows), count))
                wanted.rows.extend(range(first, first + count))
        if chunk.completes and sampling.max_tokens != 0:
            wanted.samples.extend((s, len(wanted.rows)) for s in (sequence, *chunk.forks))
            wanted.rows.append(first + chunk.length - 1)
        first += chunk.length
    return wanted


def _sample_each(logits: Tensor, rows: list[SampleRow]) -> list[Sampled | str]:
    """Sample all rows; where that raises, one by one, so that one bad row fails alone."""
    try:
        sampled = sample(logits, rows)
    except Exception as error:
        if len(rows) == 1:
            return [f"sampling failed: {error}"]
        return [_sample_each(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    return [NOT_FINITE if one is None else one for one in sampled]

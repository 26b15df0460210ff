"""The check at load: a model as it will be served gives the logits that it gave before.

The model's own logits are taken first, while nothing is replaced. When all is replaced, the same
tokens go through packed steps as in serving: several prompts of different lengths in one step,
whole and in chunks, prompts beside decoding sequences, keys and values in the storage that serves,
in the dtype that serves. The two may be apart by a multiple of the model's own rounding, which is
the distance between its two attention implementations.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from reft_runtime.base.attention import ProbedLayer
from reft_runtime.base.model import LoadedModel, forward
from reft_runtime.errors import UnsupportedModel
from reft_runtime.kv.choice import storage_for
from reft_runtime.machine.dtypes import name_of
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import Sequence

CHUNKS = ((12, 22, 23), (10, 13, 14), (5, 6), (1, 2))
"""Where the chunks of each prompt end, in tokens.

There are long and short prompts, some longer than a block, and chunks of single tokens.
"""

LARGEST_WINDOW = 64
"""Largest sliding window, in tokens, that prompts are made to exceed.

Larger windows are known from the mask alone.
"""

ROUNDINGS = 4
"""How many times the model's own rounding the engine's logits may be away from the model's."""

LEAST = {4: 1e-3, 2: 8}
"""Distances that are always allowed, by the dtype's bytes.

The one of float32 is a relative distance, the others are roundings (eps) of the dtype.
"""

MOST = 0.5
"""Relative distance from which logits say nothing; those of another model are 1.4 apart."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt: its tokens, and the ends of the chunks in which it is computed."""

    tokens: Tensor
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OwnLogits:
    """A model's own logits for its samples, each [tokens, vocabulary], and how far it rounds."""

    samples: tuple[Sample, ...]
    logits: tuple[Tensor, ...]
    rounding: Tensor
    """Relative distance of each token's logits between the model's two attention implementations.

    It is zero in float32, where rounding is far below what is allowed anyway.
    """


def own_logits(
    model: PreTrainedModel, probed: SequenceOf[ProbedLayer], max_tokens: int
) -> OwnLogits:
    """Run samples through the model's own attention, before anything of the model is replaced."""
    samples = _samples(model.config, {layer.scoring.span for layer in probed}, max_tokens)

    def run(implementation: str) -> tuple[Tensor, ...]:
        model.set_attn_implementation(implementation)
        found: list[Tensor] = []
        # In batches: padding comes after a row's tokens, which do not see it.
        for batch in (samples[: len(CHUNKS)], samples[len(CHUNKS) :]):
            if batch:
                ids = pad_sequence([sample.tokens for sample in batch], batch_first=True)
                logits = model(input_ids=ids.to(model.device), use_cache=False).logits
                found += [rows[: len(s.tokens)] for rows, s in zip(logits, batch, strict=True)]
        return tuple(found)

    eager = run("eager")
    rounding = torch.zeros(1)
    if model.dtype.itemsize < 4:
        with suppress(ValueError, ImportError):  # some models have only one
            rounding = _distances(run("sdpa"), eager)
    return OwnLogits(samples, eager, rounding)


def check(loaded: LoadedModel, own: OwnLogits, probed: SequenceOf[ProbedLayer]) -> None:
    """Raise `UnsupportedModel`, with a reason, if packed steps give other logits than `own`."""
    dtype = name_of(loaded.dtype)
    if not all(bool(logits.isfinite().all()) for logits in own.logits):
        raise UnsupportedModel(f"its own logits are not finite in {dtype}; try another dtype")
    exact = loaded.dtype.itemsize == 4
    least = LEAST[4] if exact else LEAST[2] * torch.finfo(loaded.dtype).eps
    own_rounding = float(own.rounding.quantile(0.75))
    if own_rounding > MOST:
        raise UnsupportedModel(
            f"in {dtype} its logits are mostly rounding (its own two attention implementations"
            f" differ by {own_rounding:.1g}); take float32"
        )
    allowed = min(max(least, ROUNDINGS * own_rounding), MOST)
    distances = _distances(_packed_logits(loaded, own.samples), own.logits)
    windows = [w for layer in probed if (w := layer.scoring.span) is not None]
    for what, rows in _kinds(own.samples, min(windows, default=None)).items():
        found = distances[rows]
        # Rounding may change a router's choice for single tokens, though not in float32.
        far = float(found.max() if exact else found.median())
        if not far <= allowed:
            raise UnsupportedModel(
                f"the engine's logits differ from its own {what}"
                f" (relative {far:.1g}, where {allowed:.1g} is rounding)"
            )


def _samples(
    config: PretrainedConfig, windows: set[int | None], max_tokens: int
) -> tuple[Sample, ...]:
    plans = [*CHUNKS]
    for window in windows:
        if window is not None and window <= LARGEST_WINDOW:
            ends = {window - 1, window, window + 1, 2 * window + 3, 2 * window + 4}
            plans.append(tuple(sorted(ends - {0})))
    generator = torch.Generator().manual_seed(0)
    # The first and the last ids are left out: special tokens, bytes and padding are there.
    first, stop = config.vocab_size // 8, max(config.vocab_size // 2, 1)
    samples = []
    for plan in plans:
        cut = sorted({min(end, max_tokens) for end in plan})
        tokens = torch.randint(first, stop, (cut[-1],), generator=generator)
        samples.append(Sample(tokens, tuple(cut)))
    return tuple(samples)


def _packed_logits(loaded: LoadedModel, samples: SequenceOf[Sample]) -> list[Tensor]:
    """Logits of all tokens by packed steps, which compute one chunk of each sample at a time."""
    sequences = [
        Sequence(Request(str(i), tuple(ids), SamplingParams(), seed=0), 0, i, ids)
        for i, ids in enumerate(sample.tokens.tolist() for sample in samples)
    ]
    ends = {sequence: (0, *s.ends) for sequence, s in zip(sequences, samples, strict=True)}
    blocks = sum(blocks_for(len(sequence.tokens)) for sequence in sequences)
    storage = storage_for(loaded, BlockBudget(blocks * BLOCK_TOKENS), len(sequences))
    found: dict[Sequence, list[Tensor]] = {sequence: [] for sequence in sequences}
    for turn in range(max(len(sample.ends) for sample in samples)):
        chunks = storage.prepare(
            [
                Chunk(sequence, *_start_and_length(ends[sequence], turn))
                for sequence in sequences
                if turn + 1 < len(ends[sequence])
            ]
        )
        ids = [token for c in chunks for token in c.sequence.tokens[c.start : c.stop]]
        positions = [position for c in chunks for position in range(c.start, c.stop)]
        logits = forward(
            loaded.model,
            torch.tensor(ids, device=loaded.device),
            torch.tensor(positions, device=loaded.device),
            torch.arange(len(ids), device=loaded.device),
            storage.attention(chunks),
        )
        for chunk, rows in zip(chunks, logits.split([c.length for c in chunks]), strict=True):
            found[chunk.sequence].append(rows)
            chunk.sequence.computed = chunk.stop
    storage.release(sequences)
    return [torch.cat(parts) for parts in found.values()]


def _start_and_length(ends: SequenceOf[int], turn: int) -> tuple[int, int]:
    return ends[turn], ends[turn + 1] - ends[turn]


def _distances(given: SequenceOf[Tensor], wanted: SequenceOf[Tensor]) -> Tensor:
    """Relative distance of each row of logits, on the CPU, after each row's mean is removed."""
    found = []
    for one, other in zip(given, wanted, strict=True):
        a, b = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (one, other))
        size = b.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        found.append(((a - b).norm(dim=-1) / size).cpu())
    return torch.cat(found)


def _kinds(samples: SequenceOf[Sample], window: int | None) -> dict[str, list[int]]:
    """Indices of rows by the way in which they are computed; each kind is judged by itself."""
    kinds: dict[str, list[int]] = {}
    row = 0
    for sample in samples:
        for start, stop in pairwise((0, *sample.ends)):
            what = "in decode steps" if stop - start == 1 else "in later chunks of a prompt"
            if start == 0 and stop > 1:
                what = "in prompts"
            for position in range(start, stop):
                past = window is not None and position >= window
                kinds.setdefault(f"{what}, past its window" if past else what, []).append(row)
                row += 1
    return kinds

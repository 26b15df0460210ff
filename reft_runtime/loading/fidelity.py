"""The check at load: a model as it will be served gives the logits that it gave before.

The rule is the model's own forward of a whole text, without a cache: that is what it was trained
with. Its logits are taken first, while nothing is replaced. When all is replaced, the same tokens
go through packed steps as in serving (`samples`): several sequences of different lengths in one
step, whole and in chunks, prompts beside decoding sequences, keys, values and states in the storage
that serves, in the dtype that serves. The two may be apart by a multiple of the model's own
rounding, which is mostly the distance between its two attention implementations.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from reft_runtime.base.model import LoadedModel, forward
from reft_runtime.base.probe import ProbedLayer
from reft_runtime.errors import UnsupportedModel
from reft_runtime.kv.choice import storage_for
from reft_runtime.loading.samples import Sample, samples_for
from reft_runtime.machine.dtypes import name_of
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.blocks import BLOCK_TOKENS, blocks_for
from reft_runtime.schedule.budget import BlockBudget
from reft_runtime.schedule.plan import Chunk
from reft_runtime.schedule.request import Request
from reft_runtime.schedule.sequence import Sequence

ROUNDINGS = 4
"""How many times the model's own rounding the engine's logits may be away from the model's."""

LEAST = {4: 2e-4, 2: 8}
"""Distances that are always allowed, by the dtype's bytes.

The one of float32 is a relative distance, the others are roundings (eps) of the dtype.
"""

MOVED = 0.25
"""Share of the numbers between layers that are moved: so logits move as far as from one attention
implementation to the other, in models that have both (by half to double, in most)."""

SHORT = 8
"""Prompts of up to so many tokens are padded to one length."""

MOST = 0.5
"""Relative distance from which logits say nothing; those of another model are 1.4 apart."""


@dataclass(frozen=True, slots=True)
class OwnLogits:
    """A model's own logits for its samples, each [tokens, vocabulary], and how far it rounds."""

    samples: tuple[Sample, ...]
    logits: tuple[Tensor, ...]
    rounding: Tensor
    """Relative distance of each token's logits between the model's two attention implementations.

    Where it has only one, or layers that do not attend, it is the distance to what it gives when
    numbers between its layers are moved by one rounding (`MOVED`). It is zero in float32, where
    rounding is far below what is allowed anyway.
    """


def own_logits(
    model: PreTrainedModel,
    layers: SequenceOf[nn.Module],
    probed: SequenceOf[ProbedLayer],
    max_tokens: int,
) -> OwnLogits:
    """Run samples through the model's own attention, before anything of the model is replaced.

    `layers` are its decoder layers, and `probed` is what they ask of attention.
    """
    samples = samples_for(model.config, _limits(probed), max_tokens)

    def run(implementation: str) -> tuple[Tensor, ...]:
        model.set_attn_implementation(implementation)
        found: dict[int, Tensor] = {}
        for batch in _batches(samples):
            # Padding comes after a row's tokens, which do not see it.
            ids = pad_sequence([samples[i].tokens for i in batch], batch_first=True)
            positions = torch.arange(ids.shape[1]) + samples[batch[0]].position
            logits = model(
                input_ids=ids.to(model.device),
                position_ids=positions.expand_as(ids).to(model.device),
                use_cache=False,
            ).logits
            found |= {
                i: rows[: len(samples[i].tokens)] for i, rows in zip(batch, logits, strict=True)
            }
        return tuple(found[i] for i in range(len(samples)))

    def otherwise() -> tuple[Tensor, ...]:
        if all(layer.heads for layer in probed):
            with suppress(ValueError, ImportError):  # some models have only one
                return run("sdpa")
        with _moved(layers):
            return run("eager")

    eager = run("eager")
    rounding = torch.zeros(sum(len(sample.tokens) for sample in samples))
    if model.dtype.itemsize < 4:
        rounding = _distances(otherwise(), eager)
    return OwnLogits(samples, eager, rounding)


@contextmanager
def _moved(layers: SequenceOf[nn.Module]) -> Iterator[None]:
    """Let a share of the numbers that layers return be the next larger ones in their dtype."""
    generator = torch.Generator().manual_seed(0)

    def move(_: nn.Module, args: Any, output: Any) -> Any:
        rows: Tensor = output[0] if isinstance(output, tuple) else output
        larger = (torch.rand(rows.shape, generator=generator) < MOVED).to(rows.device)
        rows = torch.where(larger, rows * (1 + torch.finfo(rows.dtype).eps), rows)
        return (rows, *output[1:]) if isinstance(output, tuple) else rows

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(move).remove)
        yield


def check(loaded: LoadedModel, own: OwnLogits, probed: SequenceOf[ProbedLayer]) -> float:
    """Largest relative distance of packed steps' logits from `own`.

    Raises `UnsupportedModel`, with a reason, if that is more than rounding.
    """
    dtype = name_of(loaded.dtype)
    if not all(bool(logits.isfinite().all()) for logits in own.logits):
        raise UnsupportedModel(f"its own logits are not finite in {dtype}; try another dtype")
    exact = loaded.dtype.itemsize == 4
    least = LEAST[4] if exact else LEAST[2] * torch.finfo(loaded.dtype).eps
    overall = float(own.rounding.quantile(0.75))
    if overall > MOST:
        raise _mostly_rounding(dtype, overall)
    distances = _distances(_packed_logits(loaded, own.samples), own.logits)
    for what, rows in _kinds(own.samples, min(_limits(probed), default=None)).items():
        rounding = max(overall, float(own.rounding[rows].quantile(0.75)))
        allowed = max(least, ROUNDINGS * rounding)
        found = distances[rows]
        # Rounding may change a router's choice for single tokens, though not in float32.
        far = float(found.max() if exact else found.median())
        if far <= min(allowed, MOST):
            continue
        if allowed > MOST:
            raise _mostly_rounding(dtype, rounding)
        raise UnsupportedModel(
            f"the engine's logits differ from its own {what}"
            f" (relative {far:.2g}, where {allowed:.2g} is rounding)"
        )
    return float(distances.max())


def _mostly_rounding(dtype: str, rounding: float) -> UnsupportedModel:
    return UnsupportedModel(
        f"in {dtype} its logits are mostly rounding (its own, computed in two ways, differ by"
        f" {rounding:.1g}); take float32"
    )


def _limits(probed: SequenceOf[ProbedLayer]) -> set[int]:
    """Windows and chunks of the layers, in tokens."""
    scorings = [layer.scoring for layer in probed]
    return {size for each in scorings for size in (each.window, each.chunk) if size is not None}


def _batches(samples: SequenceOf[Sample]) -> list[list[int]]:
    """Indices of samples that go through the model's own forward together.

    Of those that are longer than `SHORT` none is twice as long as another. One at other positions
    is alone: some models compute rotary angles by the largest position of a batch.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        key = sample.position, max(len(sample.tokens), SHORT).bit_length()
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _packed_logits(loaded: LoadedModel, samples: SequenceOf[Sample]) -> list[Tensor]:
    """Logits of all tokens by packed steps, which compute one chunk of each sample at a time."""
    sequences = [
        Sequence(Request(str(i), tuple(ids), SamplingParams(), seed=0), 0, i, ids)
        for i, ids in enumerate(sample.tokens.tolist() for sample in samples)
    ]
    given = dict(zip(sequences, samples, strict=True))
    blocks = sum(blocks_for(len(sequence.tokens)) for sequence in sequences)
    storage = storage_for(loaded, BlockBudget(blocks * BLOCK_TOKENS), len(sequences))
    found: dict[Sequence, list[Tensor]] = {sequence: [] for sequence in sequences}
    for turn in range(max(sample.over for sample in samples)):
        parts = {sequence: sample.chunks.get(turn) for sequence, sample in given.items()}
        chunks = storage.prepare(
            [Chunk(s, part[0], part[1] - part[0]) for s, part in parts.items() if part]
        )
        ids = [token for c in chunks for token in c.sequence.tokens[c.start : c.stop]]
        positions = [
            given[c.sequence].position + place for c in chunks for place in range(c.start, c.stop)
        ]
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
        storage.release([s for s, sample in given.items() if sample.over == turn + 1])
    return [torch.cat(parts) for parts in found.values()]


def _distances(given: SequenceOf[Tensor], wanted: SequenceOf[Tensor]) -> Tensor:
    """Relative distance of each row of logits, on the CPU, after each row's mean is removed."""
    found = []
    for one, other in zip(given, wanted, strict=True):
        a, b = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (one, other))
        size = b.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        found.append(((a - b).norm(dim=-1) / size).cpu())
    return torch.cat(found)


def _kinds(samples: SequenceOf[Sample], limit: int | None) -> dict[str, list[int]]:
    """Indices of rows by the way in which they are computed; each kind is judged by itself.

    A sample with a kind of its own is one. Rows behind the first `limit` tokens of others are past
    a window or chunk.
    """
    kinds: dict[str, list[int]] = {}
    row = 0
    for sample in samples:
        for start, stop in sample.chunks.values():
            what = "in decode steps" if stop - start == 1 else "in later chunks of a prompt"
            if start == 0 and stop > 1:
                what = "in prompts"
            for place in range(start, stop):
                past = ", past its window" if limit is not None and place >= limit else ""
                kinds.setdefault(sample.kind or what + past, []).append(row)
                row += 1
    return kinds

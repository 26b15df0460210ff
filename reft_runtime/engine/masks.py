"""The tokens that grammars allow next, as bits."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reft_runtime.engine.sampler import banned
from reft_runtime.grammar.state import allow_each
from reft_runtime.schedule.sequence import Sequence

Bits = NDArray[np.uint32]


def allowed(
    sequences: SequenceOf[Sequence], vocabulary: int, eos_ids: Collection[int]
) -> list[Tensor | None]:
    """The tokens that may come next in each answer: int32 [words] on the CPU, lowest bit first.

    None for an answer without a grammar. Before `min_tokens` the tokens that would end an answer
    are left out, as far as others are allowed.
    """
    found: list[Tensor | None] = [None] * len(sequences)
    states = {i: s.grammar for i, s in enumerate(sequences) if s.grammar is not None}
    if not states:
        return found
    answering = {i: state for i, state in states.items() if not state.thinks}
    masks = torch.zeros(len(answering), -(-vocabulary // 32), dtype=torch.int32)
    if answering:
        size, threads = masks[0].nbytes, torch.get_num_threads()
        allow_each([*answering.values()], masks.data_ptr(), size, threads)
    for (i, state), mask in zip(answering.items(), masks, strict=True):
        sequence, found[i] = sequences[i], mask
        bits = mask.numpy().view(np.uint32)
        if state.opens is not None:
            bits[state.opens // 32] |= np.uint32(1 << state.opens % 32)
        params = sequence.request.sampling
        if sequence.generated_length < params.min_tokens:
            rest = _without(bits, banned(params, eos_ids))
            if rest.any():
                bits[:] = rest
    for i in states.keys() - answering.keys():
        # What the model thinks ends with its mark: an answer of the form is to follow.
        found[i] = torch.from_numpy(_without(_all(vocabulary), eos_ids).view(np.int32))
    return found


def _all(vocabulary: int) -> Bits:
    bits = np.full(-(-vocabulary // 32), 2**32 - 1, dtype=np.uint32)
    if vocabulary % 32:
        bits[-1] = 2 ** (vocabulary % 32) - 1
    return bits


def _without(bits: Bits, tokens: Iterable[int]) -> Bits:
    """A copy in which the bits of `tokens` are not set."""
    rest = bits.copy()
    for token in tokens:
        rest[token // 32] &= ~np.uint32(1 << token % 32)
    return rest

"""The tokens that grammars allow next, as bits."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from reft_runtime.engine.sampler import banned
from reft_runtime.grammar.state import allow_each
from reft_runtime.schedule.sequence import Sequence


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
    masks = torch.zeros(len(states), -(-vocabulary // 32), dtype=torch.int32)
    allow_each([*states.values()], masks.data_ptr(), masks[0].nbytes, torch.get_num_threads())
    for i, mask in zip(states, masks, strict=True):
        sequence, found[i] = sequences[i], mask
        params = sequence.request.sampling
        if sequence.generated_length < params.min_tokens:
            rest = mask.numpy().view(np.uint32).copy()
            for token in banned(params, eos_ids):
                rest[token // 32] &= ~np.uint32(1 << token % 32)
            if rest.any():
                mask.copy_(torch.from_numpy(rest.view(np.int32)))
    return found

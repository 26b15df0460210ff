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
    formed = [sequence for sequence in sequences if sequence.grammar is not None]
    if not formed:
        return [None] * len(sequences)
    masks = torch.zeros(len(formed), -(-vocabulary // 32), dtype=torch.int32)
    states = [sequence.grammar for sequence in formed if sequence.grammar is not None]
    allow_each(states, masks.data_ptr(), masks[0].nbytes, torch.get_num_threads())
    for sequence, mask in zip(formed, masks, strict=True):
        params = sequence.request.sampling
        if sequence.generated_length < params.min_tokens:
            rest = mask.numpy().view(np.uint32).copy()
            for token in banned(params, eos_ids):
                rest[token // 32] &= ~np.uint32(1 << token % 32)
            if rest.any():
                mask.copy_(torch.from_numpy(rest.view(np.int32)))
    found = iter(masks)
    return [None if sequence.grammar is None else next(found) for sequence in sequences]

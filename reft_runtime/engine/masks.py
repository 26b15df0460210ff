"""The tokens that grammars allow next, as bits."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from reft_runtime.engine.sampler import banned
from reft_runtime.schedule.sequence import Sequence


def words(vocabulary: int) -> int:
    """Number of int32 words that hold one bit for each token id."""
    return -(-vocabulary // 32)


def allowed(sequence: Sequence, vocabulary: int, eos_ids: Collection[int]) -> Tensor | None:
    """The tokens that may come next in an answer: int32 [words] on the CPU, lowest bit first.

    None if the answer has no grammar. Before `min_tokens` the tokens that would end the answer are
    left out, as far as others are allowed.
    """
    if sequence.grammar is None:
        return None
    mask = torch.zeros(words(vocabulary), dtype=torch.int32)
    sequence.grammar.allow(mask.data_ptr(), mask.nbytes)
    params = sequence.request.sampling
    if sequence.generated_length < params.min_tokens:
        rest = mask.numpy().view(np.uint32).copy()
        for token in banned(params, eos_ids):
            rest[token // 32] &= ~np.uint32(1 << token % 32)
        if rest.any():
            return torch.from_numpy(rest.view(np.int32))
    return mask

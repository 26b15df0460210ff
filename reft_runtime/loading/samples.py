"""The prompts of the check at load, and the steps in which they are computed.

Their lengths lie around every size at which a model may begin to compute something else: the
windows and chunks of its attention, the numbers of its experts, the ends of its blocks of keys. A
size that is too large for a prompt is left to what is known without one: windows and chunks are
read from masks at full length (`AskedMask`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

PROMPTS = ((12, 22, 23, 24), (5, 7, 8), (1, 2))
"""Where the chunks of prompts end that are computed together, in tokens.

First all prompts, then chunks beside decoding, then decoding sequences alone. There are a long one
of more than a block, short ones, and one of a single token.
"""

FAR = (5,)
"""The same of a sequence at the last positions that are served, beside others at the first."""

LATER = ((2, 3), (1, 2))
"""The same of sequences that begin when others are over, in memory that was theirs.

They go on from less than a convolution of a recurrent layer looks back.
"""

BEGIN_FAR, BEGIN_LATER = 1, 2
"""The steps in which those begin: the latter when the shortest prompt and the far one are over."""

LARGEST_WINDOW = 64
"""Largest window or chunk of attention, in tokens, that prompts are made to exceed."""

LARGEST_ROUTING = 64, 512
"""Up to the first, steps of one token less and one more than a routing size are computed alone.

Up to the second, only one of one more.
"""

_ROUTING = ("expert", "top_k", "topk", "moe_k", "capacity")
_NO_ROUTING = ("size", "dim", "period", "offset", "index", "centroid")


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt: its tokens, the ends of the chunks in which it is computed, and when and where.

    `kind` says what is special about it, empty if nothing is. `turn` is the step of its first
    chunk, and `position` that of its first token.
    """

    kind: str
    tokens: Tensor
    ends: tuple[int, ...]
    turn: int = 0
    position: int = 0

    @property
    def chunks(self) -> dict[int, tuple[int, int]]:
        """By step: the chunk [start, stop) that it computes."""
        return dict(enumerate(pairwise((0, *self.ends)), self.turn))

    @property
    def over(self) -> int:
        """The first step after its last."""
        return self.turn + len(self.ends)


def samples_for(
    config: PretrainedConfig, limits: Iterable[int], max_tokens: int
) -> tuple[Sample, ...]:
    """The samples of a model whose attention has windows and chunks of `limits` tokens."""
    generator = torch.Generator().manual_seed(0)
    # The first and the last ids are left out: special tokens, bytes and padding are there.
    first, stop = config.vocab_size // 8, max(config.vocab_size // 2, 1)
    found: list[Sample] = []

    def add(kind: str, ends: Iterable[int], turn: int, *, far: bool = False) -> None:
        cut = sorted({min(end, max_tokens) for end in ends} - {0})
        tokens = torch.randint(first, stop, (cut[-1],), generator=generator)
        found.append(Sample(kind, tokens, tuple(cut), turn, max_tokens - cut[-1] if far else 0))

    for ends in PROMPTS:
        add("", ends, 0)
    add("at the last positions", FAR, BEGIN_FAR, far=True)
    for ends in LATER:
        add("in a later sequence", ends, BEGIN_LATER)
    for limit in sorted(set(limits)):
        if limit <= LARGEST_WINDOW:
            add("", (limit - 1, limit, limit + 1, 2 * limit + 3), 0)
            add("", (2 * limit + 3,), 0)
    exact, most = LARGEST_ROUTING
    for size in routing_sizes(config):
        turn = max(sample.over for sample in found)
        if size <= exact:
            add("in steps as large as its routing", (size - 1, 2 * size - 1, 3 * size), turn)
        elif size <= most:
            add("in steps as large as its routing", (size + 1,), turn)
    return tuple(found)


def routing_sizes(config: PretrainedConfig) -> list[int]:
    """How many experts a configuration says there are, how many a token gets, and the like."""
    values: dict[str, Any] = config.to_dict()
    return sorted(
        {
            value
            for name, value in values.items()
            if type(value) is int
            and value > 1
            and any(word in name for word in _ROUTING)
            and not any(word in name for word in _NO_ROUTING)
        }
    )

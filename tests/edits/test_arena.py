"""Parts of one piece of memory: none overlaps another, and all of it comes back."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from reft_runtime.edits.arena import Arena


def test_parts_do_not_overlap_and_all_comes_back() -> None:
    rng = random.Random(0)
    arena = Arena(64 * 256, torch.device("cpu"))
    held: list[Tensor] = []
    refused = 0
    for number in range(2000):
        if held and rng.random() < 0.5:
            part = held.pop(rng.randrange(len(held)))
            assert len(set(part.tolist())) == 1  # nobody else wrote there
            arena.give_back(part)
            continue
        taken = arena.take(rng.randrange(1, 3000))
        if taken is None:
            refused += 1
            continue
        held.append(taken.fill_(number % 251))
    assert refused
    for part in held:
        arena.give_back(part)
    assert arena.take(64 * 256 + 1) is None
    whole = arena.take(64 * 256)
    assert whole is not None
    assert arena.take(1) is None


def test_an_empty_one() -> None:
    assert Arena(0, torch.device("cpu")).take(1) is None

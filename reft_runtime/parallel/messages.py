"""What rank 0 tells the other ranks, as small objects: numbers stand for sequences and versions."""

from __future__ import annotations

from dataclasses import dataclass

from reft_runtime.engine.sizing import Limits
from reft_runtime.schedule.request import AppliedIntervention


@dataclass(frozen=True, slots=True)
class Setup:
    """What a rank needs to load its shard and to keep as much as the others.

    `store` is host and port at which the ranks meet. The other fields are those of `Engine`;
    `device` is the kind of device, `devices` the number of each rank's, and `threads` the CPU
    threads of one rank.
    """

    store: tuple[str, int]
    ranks: int
    model: str
    device: str
    devices: tuple[int, ...]
    dtype: str
    limits: Limits
    threads: int


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that no step had before: its prompt, and versions with strengths, in order."""

    number: int
    prompt: tuple[int, ...]
    uses: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class ToldChunk:
    """A `Chunk`: sequences by number, kept blocks as (block of the sequence, place)."""

    sequence: int
    start: int
    length: int
    reused: tuple[tuple[int, int], ...]
    forks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A packed step: chunks in their order, and the rows whose logits are wanted.

    `versions` are the interventions that are new, by number, with their tensors; the strength is
    that of a use. Those in `dropped` are needed no more. Before the step, sequences get the
    `tokens` that are new to them, by number, and the numbers of tokens `computed`. `freed` and
    `vacant` are what rank 0's storage has read of the prefix cache since the last step.
    """

    sequences: tuple[NewSequence, ...]
    versions: dict[int, AppliedIntervention]
    dropped: tuple[int, ...]
    tokens: dict[int, tuple[int, ...]]
    computed: dict[int, int]
    chunks: tuple[ToldChunk, ...]
    rows: tuple[int, ...]
    freed: frozenset[int]
    vacant: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Keep:
    """Blocks to keep, as (sequence, block, place); the sequences in `left` do not run any more."""

    copies: tuple[tuple[int, int, int], ...]
    left: frozenset[int]


@dataclass(frozen=True, slots=True)
class Release:
    """Sequences that have ended or were preempted."""

    sequences: tuple[int, ...]


Message = Setup | Step | Keep | Release

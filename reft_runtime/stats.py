"""What an engine tells of itself: its model and memory, its load, and its counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The model that is loaded, and its memory.

    `memory_bytes` is the most that the process means to take beside `intervention_bytes` (on a
    device: the most that weights, keys and values take). `kv_bytes` is its part for keys and
    values, which holds those of `kv_tokens` tokens, and `recurrent_bytes` its part for the states
    of recurrent layers, of running sequences and kept ones.
    """

    model: str
    architecture: str
    dtype: str
    device: str
    threads: int
    max_model_len: int
    max_running: int
    vocab_size: int
    parameters: int
    memory_bytes: int
    intervention_bytes: int
    kv_bytes: int
    kv_tokens: int
    recurrent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotStats:
    """Recurrent states that are kept for reuse: `kept` now, in at most `places`.

    `hits` counts how often a prompt went on from one since the start, and `evictions` those that
    were evicted for others.
    """

    kept: int
    places: int
    hits: int
    evictions: int


@dataclass(frozen=True, slots=True)
class PrefixCacheStats:
    """Reuse of keys and values, by kind of block: the base model's ("base"), or edited ("own").

    `queries` and `hits` count tokens since the start: those that were looked for (all whole blocks
    of every sequence that may read the cache), and those that were found. `blocks` counts the
    blocks kept now; `evictions` counts the blocks that were evicted to make room for others.
    """

    queries: Mapping[str, int]
    hits: Mapping[str, int]
    blocks: Mapping[str, int]
    evictions: int
    snapshots: SnapshotStats | None = None
    """None unless the model has recurrent layers."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's load and its counters since the start."""

    running: int
    waiting: int
    kv_usage: float
    """Share of the budget of keys and values that is held, 0 to 1."""
    steps: int
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    heartbeat_age: float
    """Seconds since the engine's loop last turned, less what its step in progress may take.

    An idle loop turns at least once a second.
    """
    prefix_cache: PrefixCacheStats | None = None
    """None where there is no prefix cache."""
    waiting_by_tenant: Mapping[str, int] = field(default_factory=dict)
    """Waiting requests of each tenant that has any."""

"""How much memory keys, values and recurrent states may take, and what a start reports of it."""

from __future__ import annotations

import mmap

import psutil
import torch

from reft_runtime.base.model import LoadedModel
from reft_runtime.edits.step import MOVED_BYTES
from reft_runtime.edits.tables import table_bytes
from reft_runtime.engine.device_sampler import sampling_bytes
from reft_runtime.errors import ConfigError
from reft_runtime.kv.slabs import rounding_bytes
from reft_runtime.machine.memory import check_room, free_memory
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.scheduler import MAX_SCORED_TOKENS

KV_SHARE_OF_FREE_MEMORY = 0.3
KV_SHARE_OF_DEVICE = 0.9
DEVICE_MARGIN = 2 << 30
"""Least bytes of a device's memory that are left to steps, and to edits that the tables lack."""

LEAST_SNAPSHOT_BYTES = 64 << 20
"""Kept recurrent states may take this much, or as much as those of the running sequences."""

SNAPSHOT_SHARE_OF_FREE_MEMORY = 0.1

WORKING_BYTES = 256 << 20
"""Bytes on a CPU for requests and answers in progress, and for code generated for new shapes."""


def snapshot_places(loaded: LoadedModel, max_running: int) -> int:
    """How many recurrent states are kept for reuse: as many as their own budget has room for."""
    if not loaded.state_bytes:
        return 0
    most = max(LEAST_SNAPSHOT_BYTES, max_running * loaded.state_bytes)
    share = SNAPSHOT_SHARE_OF_FREE_MEMORY * free_memory(loaded.device)
    return int(min(most, share)) // loaded.state_bytes


def recurrent_bytes(loaded: LoadedModel, max_running: int, snapshots: int) -> int:
    """The bytes that the recurrent states of running sequences, and the kept ones, take."""
    return (max_running + snapshots) * loaded.state_bytes


def step_bytes(loaded: LoadedModel, max_running: int, max_step_tokens: int) -> int:
    """The bytes that the largest step works with: its activations, and rows of logits."""
    config = loaded.model.config
    inner = getattr(config, "intermediate_size", None) or 4 * loaded.hidden_size
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # one for each layer
    numbers = max_step_tokens * (3 * inner + 8 * loaded.hidden_size)
    # A row of logits is held in the model's dtype, in float32, and as logarithms.
    scored = (max_running + MAX_SCORED_TOKENS) * loaded.vocab_size
    return numbers * loaded.dtype.itemsize + scored * (loaded.dtype.itemsize + 8)


def kv_budget(
    loaded: LoadedModel,
    max_running: int,
    max_step_tokens: int,
    wanted: int | None,
    snapshots: int = 0,
) -> int:
    """The number of tokens whose keys and values are held: `wanted`, or what memory allows.

    Without `wanted` it is `max_running` answers at full length, within a share of the memory that
    is free beside the recurrent states, of which `snapshots` are kept ones.
    The number covers the KV rows of a CPU, or the pages of a device, and the kept blocks together;
    what KV rows lose by taking whole pages of memory is reserved, too. Ranks share a CPU's memory,
    and each is on a CUDA device of its own. Raises `ConfigError` if
    `wanted` or a CUDA device's memory is too small for one answer, or `wanted` too large for it.
    """
    longest = loaded.max_model_len + BLOCK_TOKENS
    per_token = max(1, loaded.kv_bytes_per_token)  # 0 where every layer is recurrent
    states = recurrent_bytes(loaded, max_running, snapshots)
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()  # what is cached after the load fits nothing
    free = free_memory(loaded.device)
    if states > free:
        raise ConfigError(
            f"max_running: the recurrent states of {max_running} sequences take"
            f" {states / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free. Take fewer.",
            param="max_running",
        )
    if wanted is not None and wanted < longest:
        raise ConfigError(
            f"kv_tokens must be at least max_model_len + {BLOCK_TOKENS} ({longest}), not {wanted}.",
            param="kv_tokens",
        )
    if loaded.device.type == "cuda":
        held = states + sampling_bytes(loaded.vocab_size, max_running)
        held += table_bytes(len(loaded.layers), loaded.hidden_size, max_running)
        if wanted is not None and wanted * per_token <= free - held:
            return wanted
        working = max(DEVICE_MARGIN, MOVED_BYTES + step_bytes(loaded, max_running, max_step_tokens))
        affordable = int((KV_SHARE_OF_DEVICE * free - held - working) / per_token)
        if affordable < longest:
            raise ConfigError(
                f"device: after the model {free / 2**30:.1f} GiB are free, too little for one"
                f" answer of {loaded.max_model_len} tokens beside {(held + working) / 2**30:.1f}"
                " GiB to work with. Take a smaller max_model_len, max_running or max_step_tokens,"
                " or another dtype.",
                param="device",
            )
        if wanted is not None:
            raise ConfigError(
                f"kv_tokens: keys and values of {wanted} tokens take"
                f" {wanted * per_token / 2**30:.1f} GiB, and after the model {free / 2**30:.1f} GiB"
                f" of the device are free. There is room for {affordable} beside what steps need.",
                param="kv_tokens",
            )
    elif wanted is not None:
        try:
            check_room(wanted * per_token)
        except MemoryError as error:
            raise ConfigError(
                f"kv_tokens: keys and values of {wanted} tokens take"
                f" {wanted * per_token / 2**30:.1f} GiB, more than this system lets a process have;"
                f" {free / 2**30:.1f} GiB are free.",
                param="kv_tokens",
            ) from error
        return wanted
    else:
        share = KV_SHARE_OF_FREE_MEMORY * (free - states) / loaded.ranks
        rounding = max_running * rounding_bytes(loaded.shapes, mmap.PAGESIZE)
        affordable = int((share - rounding) / per_token)
    return max(longest, min(max_running * longest, affordable))


def kv_bytes(loaded: LoadedModel, kv_tokens: int, max_running: int) -> int:
    """The most bytes that the keys and values of running sequences and kept blocks take."""
    taken = kv_tokens * loaded.kv_bytes_per_token
    if loaded.device.type == "cuda":
        return taken
    return taken + max_running * rounding_bytes(loaded.shapes, mmap.PAGESIZE)


def memory_bytes(
    loaded: LoadedModel,
    kv_tokens: int,
    max_running: int,
    max_step_tokens: int,
    snapshots: int = 0,
) -> int:
    """The most bytes that serving takes where the model is.

    On a CUDA device these are the weights, keys, values and recurrent states. On a CPU it is the
    whole process: what it takes now, with the model loaded, plus these and the largest step. The
    processes of several ranks count together on a CPU; on CUDA devices it is what one of them has.
    """
    held = kv_bytes(loaded, kv_tokens, max_running)
    held += recurrent_bytes(loaded, max_running, snapshots)
    if loaded.device.type == "cuda":
        return loaded.weight_bytes + held
    step = step_bytes(loaded, max_running, max_step_tokens)
    one = int(psutil.Process().memory_info().rss) + held + step + WORKING_BYTES
    return one * loaded.ranks

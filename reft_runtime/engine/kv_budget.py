"""How much memory keys and values may take, and the figures of memory that a start reports."""

from __future__ import annotations

import mmap

import psutil
import torch

from reft_runtime.base.model import LoadedModel
from reft_runtime.edits.tables import table_bytes
from reft_runtime.engine.device_sampler import sampling_bytes
from reft_runtime.errors import ConfigError
from reft_runtime.kv.slabs import rounding_bytes
from reft_runtime.machine.memory import free_memory
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.scheduler import MAX_SCORED_TOKENS

KV_SHARE_OF_FREE_MEMORY = 0.3
KV_SHARE_OF_DEVICE = 0.9
DEVICE_MARGIN = 2 << 30
"""Bytes of a device's memory that are left to the activations of the largest step."""

WORKING_BYTES = 256 << 20
"""Bytes on a CPU for requests and answers in progress, and for code generated for new shapes."""


def kv_budget(loaded: LoadedModel, max_running: int, wanted: int | None) -> int:
    """The number of tokens whose keys and values are held: `wanted`, or what memory allows.

    Without `wanted` it is `max_running` answers at full length, within a share of the free memory.
    The number covers the KV rows of a CPU, or the pages of a device, and the kept blocks together;
    what KV rows lose by taking whole pages of memory is reserved, too. Raises `ConfigError` if
    `wanted` or a CUDA device's memory is too small for one answer.
    """
    longest = loaded.max_model_len + BLOCK_TOKENS
    if wanted is not None:
        if wanted < longest:
            raise ConfigError(
                f"kv_tokens must be at least max_model_len + {BLOCK_TOKENS} ({longest}), "
                f"not {wanted}.",
                param="kv_tokens",
            )
        return wanted
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()  # what is cached after the load fits nothing
        free = free_memory(loaded.device)
        reserve = DEVICE_MARGIN + sampling_bytes(loaded.vocab_size, max_running)
        reserve += table_bytes(len(loaded.layers), loaded.hidden_size, max_running)
        affordable = (KV_SHARE_OF_DEVICE * free - reserve) / loaded.kv_bytes_per_token
        if affordable < longest:
            raise ConfigError(
                f"device: after the model {free / 2**30:.1f} GiB are free, too little for one"
                f" answer of {loaded.max_model_len} tokens beside {reserve / 2**30:.1f} GiB to"
                " work with. Take a smaller max_model_len or max_running, or another dtype.",
                param="device",
            )
    else:
        share = KV_SHARE_OF_FREE_MEMORY * free_memory(loaded.device)
        rounding = max_running * rounding_bytes(loaded.shapes, mmap.PAGESIZE)
        affordable = (share - rounding) / loaded.kv_bytes_per_token
    return max(longest, min(max_running * longest, int(affordable)))


def kv_bytes(loaded: LoadedModel, kv_tokens: int, max_running: int) -> int:
    """The most bytes that the keys and values of running sequences and kept blocks take."""
    taken = kv_tokens * loaded.kv_bytes_per_token
    if loaded.device.type == "cuda":
        return taken
    return taken + max_running * rounding_bytes(loaded.shapes, mmap.PAGESIZE)


def memory_bytes(
    loaded: LoadedModel, kv_tokens: int, max_running: int, max_step_tokens: int
) -> int:
    """The most bytes that serving takes where the model is.

    On a CUDA device these are the weights, and keys and values. On a CPU it is the whole process:
    what it takes now, with the model loaded, plus keys and values and the largest step.
    """
    held = kv_bytes(loaded, kv_tokens, max_running)
    if loaded.device.type == "cuda":
        return loaded.weight_bytes + held
    config = loaded.model.config
    inner = getattr(config, "intermediate_size", None) or 4 * loaded.hidden_size
    numbers = max_step_tokens * (3 * inner + 8 * loaded.hidden_size)
    # A row of logits is held in the model's dtype, in float32, and as logarithms.
    scored = (max_running + MAX_SCORED_TOKENS) * loaded.vocab_size
    step = numbers * loaded.dtype.itemsize + scored * (loaded.dtype.itemsize + 8)
    return int(psutil.Process().memory_info().rss) + held + step + WORKING_BYTES

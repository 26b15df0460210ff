"""What happens once, at the start: find the base model, load it, size its memory."""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.demo import locate
from reft_runtime.base.loader import adopt_model, load_model
from reft_runtime.base.model import LoadedModel
from reft_runtime.base.pretrained import read_config, read_tokenizer
from reft_runtime.base.stages import stage
from reft_runtime.base.support import check_config, chosen_length
from reft_runtime.edits.tables import table_bytes
from reft_runtime.engine.device_sampler import sampling_bytes
from reft_runtime.errors import ConfigError
from reft_runtime.interventions import BaseShape
from reft_runtime.kv.rows import rounding_bytes
from reft_runtime.machine.cores import usable_cores
from reft_runtime.schedule.blocks import BLOCK_TOKENS
from reft_runtime.schedule.scheduler import MAX_SCORED_TOKENS
from reft_runtime.text import Tokenizer

KV_SHARE_OF_FREE_MEMORY = 0.3
KV_SHARE_OF_DEVICE = 0.9
DEVICE_MARGIN = 2 << 30
"""Bytes of a device's memory that are left to the activations of the largest step."""

WORKING_BYTES = 256 << 20
"""On a CPU, for requests and answers on their way, and code that is generated for new shapes."""

# glibc's mallopt: sizes from which memory is mapped by itself, and above which it is given back.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def use_threads(threads: int | None) -> None:
    """Compute with so many threads, or with one for each core that this process may use.

    Raises `ConfigError`.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}.", param="threads")
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))


def load_base(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    max_model_len: int | None,
    *,
    device: str = "cpu",
    differentiable: bool = False,
) -> tuple[str, LoadedModel, PreTrainedTokenizerBase]:
    """Name, model and tokenizer of "demo", a hub id, a folder, or a model in memory.

    A model in memory stays on its device. `device` and `differentiable` as in `load_model`.
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ConfigError("tokenizer: give that of the model in memory.", param="tokenizer")
        name = Path(model.name_or_path or "").name or type(model).__name__
        loaded = adopt_model(
            model, max_model_len, tokenizer=tokenizer, differentiable=differentiable
        )
    else:
        with stage("Finding the model"):
            path, name = locate(str(model))
            check_config(read_config(path))
            # The tokenizer before the weights: what is wrong with it is told at once.
            tokenizer = tokenizer or read_tokenizer(path)
        loaded = load_model(
            path,
            dtype,
            max_model_len,
            tokenizer=tokenizer,
            device=device,
            differentiable=differentiable,
        )
    keep_freed_memory()
    return name, loaded, tokenizer


def read_words(model: str | Path) -> Tokenizer:
    """The tokenizer of "demo", a hub id or a folder, without its weights."""
    path, _ = locate(str(model))
    config = read_config(path)
    check_config(config)
    return Tokenizer(read_tokenizer(path), chosen_length(config, None))


def shape_of(name: str, loaded: LoadedModel) -> BaseShape:
    """What interventions are checked against."""
    return BaseShape(
        model=name,
        architecture=loaded.architecture,
        hidden_size=loaded.hidden_size,
        num_layers=len(loaded.layers),
        vocab_size=loaded.vocab_size,
    )


def keep_freed_memory() -> None:
    """Let the allocator keep what a step frees, up to 1 GiB, for the next step.

    Giving it back costs a page fault for every 4 KiB taken again: 13 % of a 2,048-token step. What
    the load has freed is given back first. Nothing happens where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    mallopt = getattr(library, "mallopt", None)
    if mallopt is not None:
        gc.collect()
        library.malloc_trim(0)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def kv_budget(loaded: LoadedModel, max_running: int, wanted: int | None) -> int:
    """Tokens whose keys and values are held: `wanted`, or what running answers and memory allow.

    All running answers at full length, but only a share of the free memory. It is all that rows,
    or pages on a device, and kept blocks take together; rows take whole pages of memory too.
    Raises `ConfigError` where one answer would not fit.
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
    """Most bytes that keys and values take, running or kept."""
    taken = kv_tokens * loaded.kv_bytes_per_token
    if loaded.device.type == "cuda":
        return taken
    return taken + max_running * rounding_bytes(loaded.shapes, mmap.PAGESIZE)


def memory_bytes(
    loaded: LoadedModel, kv_tokens: int, max_running: int, max_step_tokens: int
) -> int:
    """Most bytes that the model takes where it is, with keys and values and the largest step.

    On a CPU this is the whole process: what it takes now, with the model loaded, and what it will.
    """
    held = kv_bytes(loaded, kv_tokens, max_running)
    if loaded.device.type == "cuda":
        return loaded.weight_bytes + held
    config = loaded.model.config
    inner = getattr(config, "intermediate_size", None) or 4 * loaded.hidden_size
    numbers = max_step_tokens * (3 * inner + 8 * loaded.hidden_size)
    # Of the rows of logits: as they come, in float32, and their logarithms.
    scored = (max_running + MAX_SCORED_TOKENS) * loaded.vocab_size
    step = numbers * loaded.dtype.itemsize + scored * (loaded.dtype.itemsize + 8)
    return int(psutil.Process().memory_info().rss) + held + step + WORKING_BYTES


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken: a device's; of a CPU less where there is a limit.

    That of a container, or of the process's address space.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        free = min(free, limit - int((group / "memory.current").read_text()))
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        free = min(free, max(0, space - psutil.Process().memory_info().vms))
    return free

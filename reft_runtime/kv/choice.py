"""Which storage of keys and values, and which attention over it, suits a device."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Protocol

import torch

from reft_runtime.base.attention import NO_ATTENTION
from reft_runtime.base.model import LoadedModel
from reft_runtime.kernels.operators import cpu_operators, has_triton
from reft_runtime.kv.hybrid import HybridStorage
from reft_runtime.kv.page_attention import GatheredAttention, PageKernel
from reft_runtime.kv.pages import PageStorage
from reft_runtime.kv.rows import RowStorage
from reft_runtime.kv.states import StateStorage
from reft_runtime.kv.storage import KVStorage
from reft_runtime.schedule.budget import BlockBudget

if TYPE_CHECKING:
    from reft_runtime.kv.triton_attention import Tiles

_log = logging.getLogger(__name__)


class Places(Protocol):
    """What a storage asks of a prefix cache: which of its places hold no block any more."""

    def take_freed(self) -> Collection[int]:
        """Places that came free since the last call, and are still free."""

    def vacant(self) -> Iterable[int]:
        """Places that hold no kept block."""


def storage_for(
    loaded: LoadedModel, budget: BlockBudget, max_running: int, places: Places | None = None
) -> KVStorage:
    """The storage that suits the model's device, with room for the budget's blocks and states.

    `places` are those of the prefix cache, None if nothing is kept.
    """
    kv = _kv_storage_for(loaded, budget.total, max_running, places)
    return with_states(kv, loaded, budget, max_running)


def with_states(
    storage: KVStorage, loaded: LoadedModel, budget: BlockBudget, max_running: int
) -> KVStorage:
    """A storage of keys and values, with one of recurrent states beside it if the model has any."""
    if not loaded.mixers:
        return storage
    places = 0 if budget.snapshots is None else budget.snapshots.places
    return HybridStorage(storage, StateStorage(loaded.states, loaded.device, max_running, places))


def _kv_storage_for(
    loaded: LoadedModel, blocks: int, max_running: int, places: Places | None
) -> KVStorage:
    if loaded.device.type == "cpu":
        rows = loaded.shapes, loaded.dtype, loaded.max_model_len
        return RowStorage(*rows) if places is None else RowStorage(*rows, blocks, places.take_freed)
    return PageStorage(
        loaded.shapes,
        loaded.dtype,
        loaded.device,
        blocks,
        max_running,
        loaded.max_model_len,
        kernel=page_kernel(loaded.device, loaded.group, loaded.dtype, _widest(loaded)),
        vacant=tuple if places is None else places.vacant,
    )


def page_kernel(device: torch.device, group: int, dtype: torch.dtype, dim: int) -> PageKernel:
    """Attention over pages: by Triton where it runs, else by torch's own operators.

    `group` is the most query heads that share a head of keys, `dim` the width of the widest head.
    """
    tiles = _tiles_for(device, group, dtype, dim)
    if tiles is None:
        if has_triton(device):
            _log.warning(
                "Attention is torch's own operators, which are slower: heads %d wide, %d to a head"
                " of keys, do not fit this device's kernels",
                dim,
                group,
            )
        return GatheredAttention()
    from reft_runtime.kv.triton_attention import TritonAttention

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return TritonAttention(group, processors, tiles)


def attends_by_kernels(loaded: LoadedModel) -> tuple[bool, bool]:
    """Whether C++ or Triton kernels compute attention: of decoding tokens, and of prompts."""
    if loaded.device.type != "cpu":
        tiles = _tiles_for(loaded.device, loaded.group, loaded.dtype, _widest(loaded))
        return (tiles is not None,) * 2
    operators = cpu_operators()
    if operators is None:
        return False, False
    decodes = prompts = True
    for shape in set(loaded.shapes) - {NO_ATTENTION}:
        key = torch.empty(1, shape.kv_heads, shape.key_dim, dtype=loaded.dtype)
        value = key.new_empty(1, shape.kv_heads, shape.value_dim)
        decodes = decodes and operators.attends(key, key, value)
        inside = shape.values_in_keys
        prompts = (
            prompts and decodes and operators.attends_prompts(key, value, values_in_keys=inside)
        )
    return decodes, prompts


def _tiles_for(device: torch.device, group: int, dtype: torch.dtype, dim: int) -> Tiles | None:
    """The tiles with which Triton's kernel attends; None where it cannot."""
    if not has_triton(device):
        return None
    from reft_runtime.kv.triton_attention import WIDEST, Tiles

    told = torch.cuda.get_device_properties(device)
    # What a program may ask for; torch's stubs do not know it, nor its builds for other makers.
    shared_bytes = getattr(told, "shared_memory_per_block_optin", told.shared_memory_per_block)
    return Tiles.of(dtype, dim, group, shared_bytes) if dim <= WIDEST else None


def _widest(loaded: LoadedModel) -> int:
    return max(max(shape.key_dim, shape.value_dim) for shape in loaded.shapes)

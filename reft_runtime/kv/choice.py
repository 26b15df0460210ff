"""Which storage of keys and values, and which attention over it, suits a device."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

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
    if not _by_triton(device, dim):
        return GatheredAttention()
    from reft_runtime.kv.triton_attention import Tiles, TritonAttention

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return TritonAttention(group, processors, Tiles.of(dtype, dim))


def attends_by_kernels(loaded: LoadedModel) -> tuple[bool, bool]:
    """Whether C++ or Triton kernels compute attention: of decoding tokens, and of prompts."""
    if loaded.device.type != "cpu":
        return (_by_triton(loaded.device, _widest(loaded)),) * 2
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


def _by_triton(device: torch.device, dim: int) -> bool:
    if not has_triton(device):
        return False
    from reft_runtime.kv.triton_attention import WIDEST

    return dim <= WIDEST


def _widest(loaded: LoadedModel) -> int:
    return max(max(shape.key_dim, shape.value_dim) for shape in loaded.shapes)

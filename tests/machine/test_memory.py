"""The allocator: what it keeps for the next step, and what it says when there is nothing left."""

from __future__ import annotations

import copy
import ctypes
import gc
import subprocess
import sys
from weakref import ref

import pytest
import torch
from torch import Tensor

from reft_runtime.machine import memory
from reft_runtime.machine.memory import MappedMemory, in_large_pages, is_out_of_memory

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")

KEPT = """
import psutil, torch
from reft_runtime.machine.memory import keep_freed_memory

keep_freed_memory()
before = psutil.Process().memory_info().rss
held = [torch.ones(20 << 20, dtype=torch.uint8) for _ in range(8)]
del held
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """By glibc's mallopt: the allocator would else give 160 MiB back at once."""
    made = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert int(made.stdout) > 100


def test_the_allocators_own_message_is_known() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert is_out_of_memory(refused.value)


def some_tensors() -> list[Tensor]:
    torch.manual_seed(0)
    small = torch.randn(3, 5)
    return [
        small,
        small.bfloat16().T,
        torch.arange(7),
        torch.tensor(2.0),
        torch.randn(9 << 20),
        torch.randn(20 << 20)[::2],
    ]


def test_copies_in_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, each at the beginning of a cache's line, and larger than a shared mapping."""
    monkeypatch.setattr(memory, "_shared", None)
    monkeypatch.setattr(memory, "_SHARED_BYTES", 1 << 20)
    advised: list[int] = []
    advise = MappedMemory._advise

    def seen(self: MappedMemory, what: int, start: int, length: int) -> None:
        advised.append(what)
        advise(self, what, start, length)

    monkeypatch.setattr(MappedMemory, "_advise", seen)
    tensors = some_tensors()
    kept = [in_large_pages(tensor) for tensor in tensors]
    for found, wanted in zip(kept, tensors, strict=True):
        assert torch.equal(found, wanted)
        assert found.dtype == wanted.dtype
        assert found.is_contiguous()
        assert found.data_ptr() % 64 == 0
        assert found.untyped_storage().nbytes() == found.nbytes
    assert kept[0].data_ptr() % (2 << 20) == 0, "where a large page begins"
    assert set(advised) == {memory._LARGE_PAGES} - {None}
    kept[0].fill_(0)
    assert torch.equal(kept[2], tensors[2]), "copies do not overlap"
    assert torch.equal(copy.deepcopy(kept[5]), tensors[5])


def test_large_pages_are_freed_with_the_last_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_shared", None)
    first = in_large_pages(torch.ones(5))
    shared = memory._shared
    assert shared is not None
    second = in_large_pages(torch.ones(6))
    assert memory._shared is shared, "both are in one mapping"
    del first
    gc.collect()
    assert shared.memory() is not None
    del second
    gc.collect()
    assert shared.memory() is None
    assert in_large_pages(torch.ones(2)).tolist() == [1, 1], "and then there is a new one"


def test_a_mapping_lives_as_long_as_its_tensors() -> None:
    made = MappedMemory(8, torch.float32)
    numbers, mapping = made.numbers[2:4], ref(made.mapping)
    del made
    gc.collect()
    assert mapping() is not None
    assert numbers.tolist() == [0, 0]

"""Memory: how much is free, what the allocator keeps, how to tell that it ran out, and mappings.

Memory from the allocator may stay with the process when it is freed, and growing it copies it. A
mapping takes memory page by page as it is written, so that a buffer may be larger than what it
holds, and gives it back at once. Pages are small, or large for what is read often.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import ref

import psutil
import torch
from torch import Tensor

_PRIVATE: dict[str, Any] = {
    "flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
}
_GIVE_BACK: int | None = getattr(mmap, "MADV_DONTNEED", None)
_SMALL_PAGES: int | None = getattr(mmap, "MADV_NOHUGEPAGE", None)
_LARGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_LARGE_PAGE, _SHARED_BYTES, _LINE = 2 << 20, 64 << 20, 64

# glibc's mallopt: the size from which an allocation is a mapping of its own, and the free memory
# above which it is given back.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1

_MESSAGES = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "out of memory",
    "can't start new thread",
    # oneDNN says no more than this; what it cannot do at all shows when the model is tried at the
    # start.
    "could not create a",
    "could not execute a primitive",
    "could not reorder",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out.

    Some allocators, oneDNN, cuBLAS and the driver raise a RuntimeError, told by its message.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MESSAGES)


CODE_ROOM = 64 << 20
"""Bytes that must be free before oneDNN generates code for shapes that are new to it: it takes up
to some MiB for each product, and if it gets none it may write to memory that is not mapped."""


def is_spoiling(error: BaseException) -> bool:
    """Whether an error says that oneDNN could not generate code.

    A thread in which that happened once can never generate code again: its generator keeps the
    error.
    """
    return isinstance(error, RuntimeError) and "could not create a primitive" in str(error)


def check_room(size: int) -> None:
    """Raise `MemoryError` unless `size` bytes could be mapped now."""
    MappedMemory(size, torch.uint8)


class MappedMemory:
    """A mapping that holds `numbers` [size] of one dtype, zero until they are written.

    With `large_pages` it takes memory by 2 MiB, where the system has pages of that size. Raises
    `MemoryError` if the system gives no more address space. The mapping lives as long as tensors of
    it do.
    """

    def __init__(self, size: int, dtype: torch.dtype, *, large_pages: bool = False) -> None:
        try:
            self.mapping = mmap.mmap(-1, max(1, size) * dtype.itemsize, **_PRIVATE)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"no memory for {size * dtype.itemsize} bytes: {error}") from error
        # Without advice one written number takes 2 MiB where the system makes huge pages unasked.
        pages = _LARGE_PAGES if large_pages else _SMALL_PAGES
        if pages is not None:
            self._advise(pages, 0, len(self.mapping))
        self.numbers: Tensor = torch.frombuffer(self.mapping, dtype=dtype)

    def drop(self, start: int, stop: int) -> None:
        """Free the whole pages within the numbers [start, stop); what they held is lost."""
        if _GIVE_BACK is None:
            return
        size, page = self.numbers.itemsize, mmap.PAGESIZE
        first, last = -(-start * size // page) * page, stop * size // page * page
        if first < last:
            self._advise(_GIVE_BACK, first, last - first)

    def _advise(self, what: int, start: int, length: int) -> None:
        with suppress(OSError):  # a hint: nothing is wrong without it
            self.mapping.madvise(what, start, length)


@dataclass(slots=True)
class _SharedMapping:
    """Large pages for several tensors, which alone hold them, and the bytes used so far."""

    memory: ref[mmap.mmap]
    used: int


_shared: _SharedMapping | None = None
_sharing = threading.Lock()


def in_large_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor on a CPU beside other such copies, in large pages.

    The tensor must not be empty. On a virtual machine, where finding a page takes long, products of
    weights that lie there are 1.05 to 1.5 times as fast. Memory is freed with the last copy that
    lies in it. Raises `MemoryError`.
    """
    global _shared
    size = -(-tensor.nbytes // _LINE) * _LINE
    with _sharing:
        memory = None if _shared is None else _shared.memory()
        if _shared is None or memory is None or _shared.used + size > len(memory):
            made = MappedMemory(
                max(size, _SHARED_BYTES) + _LARGE_PAGE, torch.uint8, large_pages=True
            )
            memory, first = made.mapping, -made.numbers.data_ptr() % _LARGE_PAGE
            _shared = _SharedMapping(ref(memory), first)
        start = _shared.used
        _shared.used += size
    kept = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return kept.view(tensor.shape).copy_(tensor)


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


def free_memory(device: torch.device) -> int:
    """Bytes of a device's memory that may still be taken.

    On a CPU the limits of a container and of the process's address space are taken into account.
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

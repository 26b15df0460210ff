"""The allocator: what it keeps for the next step, and what it says when there is nothing left."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from reft_runtime.machine.memory import is_out_of_memory

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

"""How many cores this process may use, and how the engine's thread has them for itself."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil
import torch

from reft_runtime.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

_OMP_PAUSE_SOFT = 1

MOST_THREADS = 1024
"""Threads are started as they are first needed, each with memory of its own."""


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores that affinity and the CPU quota leave, at least 1.

    Threads of one core share its arithmetic units, so that one thread per core is fastest. Only the
    whole cores of a quota count: with more threads the kernel would stop a step in the middle.
    The files under `root` are Linux's: sysfs (Documentation/ABI/stable/sysfs-devices-system-cpu)
    and version 2 of control groups (Documentation/admin-guide/cgroup-v2.rst).
    """
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows: neither limit is there
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    cores = _physical(root, os.sched_getaffinity(0))
    return max(1, min([cores, *_quotas(root)]))


def use_threads(threads: int | None, ranks: int = 1) -> None:
    """Compute with `threads` threads; None is one for each core that this process may use.

    Where `ranks` processes compute together, each takes its part of them, at least one. Raises
    `ConfigError` if `threads` is less than 1, or more than any machine needs.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}.", param="threads")
    if threads is not None and threads > MOST_THREADS:
        raise ConfigError(
            f"threads must be at most {MOST_THREADS}, not {threads}.", param="threads"
        )
    threads = threads or min(torch.get_num_threads(), usable_cores())
    torch.set_num_threads(max(1, threads // ranks))


def release_workers() -> None:
    """End the OpenMP workers that this thread has started, if it has any.

    Every thread that runs parallel operators gets workers of its own. Once there are more threads
    with work than cores, GNU's runtime (libgomp) lets all workers sleep as soon as they wait, and
    waking them costs the engine 50 microseconds an operator: a step takes 1.2 to 1.5 times as long.
    So code that computes outside of the engine's thread calls this. It does nothing with other
    runtimes.
    """
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):
        return
    pause(_OMP_PAUSE_SOFT)


def releasing_workers(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that computes outside of the engine's thread with `release_workers`."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        finally:
            release_workers()

    return wrapper


def _physical(root: Path, cpus: Collection[int]) -> int:
    """Cores that these logical CPUs belong to; all of them where sysfs does not say."""
    topology = root / "sys/devices/system/cpu"
    siblings = set()
    for cpu in cpus:
        try:
            path = topology / f"cpu{cpu}/topology/thread_siblings_list"
            siblings.add(path.read_text())
        except OSError:
            return len(cpus)
    return len(siblings)


def _quotas(root: Path) -> list[int]:
    """Whole cores allowed by the process's control group and by those around it."""
    found = []
    with suppress(OSError):
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        own = next((g.removeprefix("0::/") for g in groups if g.startswith("0::/")), None)
        if own is not None:
            top = root / "sys/fs/cgroup"
            for group in (top / own, *(top / own).parents):
                if group == top.parent:
                    break
                # The topmost group of a machine has no quota; "max" stands for none.
                with suppress(OSError, ValueError):
                    quota, period = map(int, (group / "cpu.max").read_text().split())
                    found.append(quota // period)
    return found

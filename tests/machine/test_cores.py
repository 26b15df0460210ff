"""The number of cores that a process may use, from faked Linux files."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from reft_runtime.loading.loader import choose_dtype
from reft_runtime.machine.cores import release_workers, releasing_workers, usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight logical CPUs, two a core, of which all may be used; no control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for cpu in range(8):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    return tmp_path


def limit(machine: Path, quotas: dict[str, str], own: str) -> None:
    (machine / "proc/self").mkdir(parents=True)
    (machine / "proc/self/cgroup").write_text(f"1:cpu:/elsewhere\n0::{own}\n")
    for group, quota in quotas.items():
        folder = machine / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{quota}\n")


def test_two_threads_of_a_core_count_once(machine: Path) -> None:
    assert usable_cores(machine) == 4


@pytest.mark.parametrize(("cpus", "cores"), [({0, 4}, 1), ({0, 1}, 2), ({1, 2, 5}, 2)])
def test_affinity(
    machine: Path, monkeypatch: pytest.MonkeyPatch, cpus: set[int], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cpus)
    assert usable_cores(machine) == cores


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 4),
        ("200000 100000", 2),
        ("350000 100000", 3),
        ("50000 100000", 1),
        ("1600000 100000", 4),
        ("", 4),
    ],
)
def test_quota_of_a_container(machine: Path, quota: str, cores: int) -> None:
    limit(machine, {"": quota}, own="/")
    assert usable_cores(machine) == cores


@pytest.mark.parametrize(("outer", "inner"), [("max 100000", "200000 100000"), ("20 10", "30 10")])
def test_the_tightest_of_nested_groups_counts(machine: Path, outer: str, inner: str) -> None:
    limit(machine, {"outer": outer, "outer/inner": inner}, own="/outer/inner")
    assert usable_cores(machine) == 2


def test_without_any_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert usable_cores(tmp_path) == 3


def test_without_affinity_the_physical_cores_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 6)
    assert usable_cores(tmp_path) == 6


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": False}, torch.float32),
    ],
)
def test_auto_dtype_is_what_the_cpu_multiplies_natively(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype("auto", torch.device("cpu")) is dtype


def multiply() -> None:
    torch.mm(torch.ones(512, 512), torch.ones(512, 512)).exp_()


def test_workers_end_with_what_started_them() -> None:
    own = psutil.Process()
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        release_workers()
        before = own.num_threads()
        multiply()
        assert own.num_threads() > before
        release_workers()
        assert own.num_threads() == before
        releasing_workers(multiply)()
        assert own.num_threads() == before
        multiply()  # they come back when they are wanted
    finally:
        release_workers()
        torch.set_num_threads(threads)

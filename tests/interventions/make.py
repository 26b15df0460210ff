"""Small random interventions for the tests, and what tests of the registry do with their files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from reft_runtime.interventions import (
    BaseShape,
    Edit,
    Intervention,
    Registry,
    Version,
    serialise,
)
from reft_runtime.interventions.format.canonical import memory_of
from reft_runtime.interventions.format.file import parse, write_atomic
from reft_runtime.interventions.format.header import header_of

BASE = BaseShape(
    model="tiny", architecture="LlamaForCausalLM", hidden_size=16, num_layers=4, vocab_size=64
)


def loreft_tensors(seed: int = 0, d: int = 16, r: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    R, _ = torch.linalg.qr(torch.randn(d, r, generator=generator))
    return {
        "W": torch.randn(r, d, generator=generator),
        "R": R.contiguous(),
        "b": torch.randn(r, generator=generator),
    }


def intervention(
    seed: int = 0, *, base: BaseShape = BASE, positions: str = "l1", description: str = ""
) -> Intervention:
    tensors = loreft_tensors(seed, d=base.hidden_size)
    return Intervention.build(base, [Edit(1, positions, tensors)], description=description)


def file_bytes(seed: int = 0, *, base: BaseShape = BASE, description: str = "") -> bytes:
    return serialise(intervention(seed, base=base, description=description))


ONE, TWO, THREE = file_bytes(1), file_bytes(2), file_bytes(3)
FOREIGN = file_bytes(1, base=BASE.model_copy(update={"vocab_size": 65}))


def ready(registry: Registry, ref: str) -> Version:
    """A version that was acquired, and let go."""
    holding = registry.acquire([ref])
    try:
        holding.ready.result(60)
        return holding.versions[0]
    finally:
        holding.release()


def digest(data: bytes) -> str:
    return header_of(data).digest


def damaged(data: bytes) -> bytes:
    """A sound header, and data that is not what it says."""
    return data[:-1] + bytes([data[-1] ^ 1])


def place(folder: Path, name: str, data: bytes) -> Path:
    path = folder / f"{name}.safetensors"
    write_atomic(path, data)
    return path


def names(registry: Registry) -> list[str]:
    return [entry.name for entry in registry.entries()]


def only_problem(registry: Registry) -> str:
    (reason,) = registry.problems().values()
    return reason


def edit_bytes(data: bytes) -> int:
    return memory_of(parse(data).canonical())


def fixed(count: int) -> int:
    """Memory of so many uploads, their tensors aside."""
    registry = Registry(BASE)
    registry.put("a", ONE)
    found = count * registry.resolve("a").fixed_bytes
    registry.close()
    return found

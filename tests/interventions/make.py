"""Small random interventions for the tests."""

from __future__ import annotations

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


def ready(registry: Registry, ref: str) -> Version:
    """A version that was acquired, and let go."""
    holding = registry.acquire([ref])
    try:
        holding.ready.result(60)
        return holding.versions[0]
    finally:
        holding.release()

"""Which weights this machine's torch packs: without AVX-512 none of bfloat16."""

from __future__ import annotations

import pytest
import torch

from reft_runtime.base import linears


def needs_packing(dtype: torch.dtype) -> None:
    """Skip the test where there are no products with packed weights of `dtype`."""
    if linears._packing(dtype) is None:
        pytest.skip(f"on this CPU torch packs no weights of {dtype}")

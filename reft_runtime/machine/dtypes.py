"""Dtypes by the names that options, answers and logs use."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that models are served in, by name."""


def name_of(dtype: torch.dtype) -> str:
    """The name of any dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")

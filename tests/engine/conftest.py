"""Both kinds of storage; Triton's kernels in its interpreter where there is no CUDA device."""

from __future__ import annotations

import os

import torch

from tests.helpers.pages import storages as storages

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

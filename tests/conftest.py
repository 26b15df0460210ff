"""Triton's kernels run in its interpreter where there is no CUDA device."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    # Before anything imports Triton, as transformers does where it is installed.
    os.environ["TRITON_INTERPRET"] = "1"

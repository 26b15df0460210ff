"""The start says in one line which of the fast ways are taken."""

from __future__ import annotations

import logging

import pytest
import torch

from reft_runtime.loading.loader import adopt_model
from tests.helpers.models import make_core, tiny

TORCH = "torch's own operators"
DECODES = f"kernels, that of prompts by {TORCH}"


@pytest.mark.parametrize(
    ("model_type", "width", "dtype", "compiler", "wanted", "attention"),
    [
        (
            "llama",
            16,
            torch.float32,
            True,
            "4 of 4 layers fused, 29 linear layers packed, C++ kernels (",
            "kernels",
        ),
        (
            "qwen3",
            8,
            torch.float32,
            True,
            "0 of 3 layers fused and parts of 3 more, 22 linear layers packed, C++ kernels (",
            DECODES,
        ),
        (
            "gpt2",
            8,
            torch.float32,
            True,
            "0 of 3 layers fused, 1 linear layers packed, C++ kernels (",
            DECODES,
        ),
        (
            "llama",
            16,
            torch.float32,
            False,
            f"0 of 4 layers fused, 29 linear layers packed, {TORCH}, ",
            TORCH,
        ),
        (
            "llama",
            16,
            torch.float16,
            True,
            "0 of 4 layers fused, 0 linear layers packed, C++ kernels (",
            TORCH,
        ),
    ],
)
def test_what_is_active(
    model_type: str,
    width: int,
    dtype: torch.dtype,
    compiler: bool,
    wanted: str,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not compiler:
        monkeypatch.setattr("reft_runtime.kernels.operators.kernels", lambda: None)
    model = tiny(model_type, head_dim=width) if model_type == "llama" else tiny(model_type)
    model.to(dtype)  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO, "reft_runtime.base.stages"):
        make_core(adopt_model(model))
    (line,) = [text for text in caplog.messages if text.startswith("Active: ")]
    assert line.startswith(f"Active: {wanted}")
    assert line.endswith(f"attention by {attention}")

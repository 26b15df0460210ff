"""Models and devices that several ranks cannot have are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from reft_runtime import Engine
from reft_runtime.errors import ConfigError
from reft_runtime.parallel.refusals import check_devices, check_shards
from tests.helpers.models import tiny
from tests.helpers.tokenizer import tiny_tokenizer


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}, "num_key_value_heads"),
        ("llama", {"hidden_size": 96, "num_attention_heads": 3}, "num_attention_heads"),
        ("qwen3_5_text", {}, "recurrent layers"),
        ("mamba2", {}, "recurrent layers"),
        ("deepseek_v3", {}, "latents"),
        ("gpt_neo", {}, "no plan"),
        ("gpt_oss", {"num_hidden_layers": 2}, "no plan for its layers"),  # but for its embeddings
    ],
)
def test_models(model_type: str, changes: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(model_type, **changes)
    with pytest.raises(ConfigError, match=reason) as error:
        check_shards(config, 2)
    assert error.value.param == "tensor_parallel"


def test_a_quantised_base() -> None:
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "torchao"})
    with pytest.raises(ConfigError, match="quantised"):
        check_shards(config, 2)


def test_a_model_that_can_be_split() -> None:
    check_shards(AutoConfig.for_model("llama", num_hidden_layers=2), 4)


@pytest.mark.parametrize(
    ("device", "there", "reason"),
    [
        ("cuda", 1, "torch sees 1"),
        ("cuda:1", 4, "give --device cuda"),
        ("cpu", 2, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, device: str, there: int, reason: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(ConfigError, match=reason):
        check_devices(device, 2)


def test_a_model_object() -> None:
    with pytest.raises(ConfigError, match="an object is in one process"):
        Engine(tiny("llama"), tokenizer=tiny_tokenizer(), tensor_parallel=2)

"""Checkpoints of shapes, tiny ones: written once, and anew when a shape has changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import shapes
from tests.helpers.tokenizer import tiny_tokenizer

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16} | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
}


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_checkpoint_is_a_model_of_its_shape(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(shapes, "demo_model", lambda: tmp_path)
    monkeypatch.setattr(shapes, "read_tokenizer", lambda _: tiny_tokenizer())
    known = {key: value for key, value in shapes.SHAPES[name].items() if key != "rope_parameters"}
    monkeypatch.setitem(shapes.SHAPES, name, known | TINY)
    folder = shapes.checkpoint(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert model.dtype == torch.bfloat16
    assert (model.config.model_type, model.config.eos_token_id) == (known["model_type"], 2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights = (folder / "model.safetensors").stat()
    assert shapes.checkpoint(name) == folder
    assert (folder / "model.safetensors").stat() == weights

    monkeypatch.setitem(shapes.SHAPES, name, known | TINY | {"hidden_size": 64})
    assert AutoConfig.from_pretrained(shapes.checkpoint(name)).hidden_size == 64


def test_the_real_shapes_have_their_parameters() -> None:
    counts = {}
    for name, shape in shapes.SHAPES.items():
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                AutoConfig.for_model(**shape)
            )
        counts[name] = sum(weight.numel() for weight in model.parameters())
    assert counts == {
        "qwen2.5-0.5b": 494_032_768,
        "llama-3.2-1b": 1_235_814_400,
        "qwen3.5-0.8b": 752_393_024,
    }


def test_other_models_are_named_by_their_folder() -> None:
    assert shapes.checkpoint("some/folder") == Path("some/folder")

"""Checkpoints with the shapes of models that people run, and random weights.

Speed does not depend on what the weights are, so no model hub is needed. Such a folder is made once
in the cache and is an ordinary model folder, which every engine loads. Its tokenizer is the demo
model's and knows fewer tokens than the model: requests are token ids.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from reft_runtime.base.demo import demo_model
from reft_runtime.base.pretrained import read_tokenizer
from reft_runtime.machine.cache import cache_folder

LONGEST = 8192
"""Longest sequence: engines reserve memory for one of the model's length at least."""

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2",  # with biases of queries, keys and values
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": LONGEST,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "max_position_embeddings": LONGEST,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
    },
    "qwen3.5-0.8b": {
        "model_type": "qwen3_5_text",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,  # three of the gated delta rule, then one of attention
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 248_320,
        "max_position_embeddings": LONGEST,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
    },
}
"""Configurations by name. The last has 0.5 billion parameters beside 0.25 billion of embeddings."""


def checkpoint(model: str) -> Path:
    """The folder of `demo`, of a shape by its name, or of any other model by its path.

    A shape's folder lies in the cache, `shapes/NAME`, in bfloat16. It is made anew when its
    configuration has changed since.
    """
    if model == "demo":
        return demo_model()
    if model not in SHAPES:
        return Path(model)
    folder = cache_folder() / "shapes" / model
    if not _holds(folder, SHAPES[model]):
        build(folder, SHAPES[model], read_tokenizer(str(demo_model())))
    return folder


def build(folder: Path, shape: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a model of this shape with random weights, equal every time, and a tokenizer."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = AutoConfig.for_model(**shape, **ids)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.bfloat16, trust_remote_code=False
    )
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / _SHAPE).write_text(json.dumps(shape))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


_SHAPE = "shape.json"
"""What a folder was made from."""


def _holds(folder: Path, shape: Mapping[str, Any]) -> bool:
    file = folder / _SHAPE
    return file.exists() and json.loads(file.read_text()) == shape

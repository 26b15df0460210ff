"""A tiny Llama whose weights are the same numbers in every environment: none has to be kept."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, WIDTH, HEADS, HEAD_WIDTH = 4, 16, 4, 8
PROMPT = tuple(np.random.default_rng(7).integers(3, 64, 9).tolist())


def numbered_llama() -> LlamaForCausalLM:
    """The model, in float32; its greedy answers vary."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_WIDTH,
        vocab_size=64,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    numbers = np.random.default_rng(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            values = torch.from_numpy(numbers.normal(size=tuple(weight.shape))).float()
            weight.copy_(1 + 0.1 * values if "norm" in name else 0.4 * values)
    return model

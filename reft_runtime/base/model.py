"""A base model as the engine runs it, and one packed step through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_runtime.base.attention import LayerShape
from reft_runtime.base.fused import Fused
from reft_runtime.base.linears import Packed
from reft_runtime.base.ownership import ModelState, release


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model, ready to run packed steps.

    `layers` are the decoder layers in order, `shapes` their cache shapes, `group` the most heads
    of queries that share one of keys; `eos_ids` end an answer. `weight_bytes` is the memory of the
    weights, `fused` and `packed` say what was replaced, and `before` what the model was.
    """

    model: PreTrainedModel
    architecture: str
    layers: tuple[nn.Module, ...]
    shapes: tuple[LayerShape, ...]
    group: int
    eos_ids: frozenset[int]
    hidden_size: int
    vocab_size: int
    max_model_len: int
    weight_bytes: int
    fused: Fused
    packed: Packed
    before: ModelState

    def give_back(self) -> None:
        """Make the model what it was before it was loaded or handed in; nobody may use this then.

        Calling it again is fine.
        """
        self.before.restore()
        release(self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and keys and values."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of keys and values."""
        return self.model.dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one token's keys and values in all layers."""
        numbers = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in self.shapes)
        return numbers * self.dtype.itemsize


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, keep: Tensor, step: Any) -> Any:
    """Run a packed step [T] through the model; logits [len(keep), vocabulary] of the rows kept."""
    return model(
        input_ids=ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=keep,
        step=step,
    ).logits[0]

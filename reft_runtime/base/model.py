"""A base model as the engine runs it, and one packed step through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_runtime.base.attention import AttentionStep, LayerShape, running
from reft_runtime.base.fused import Fused
from reft_runtime.base.linears import Packed
from reft_runtime.base.ownership import ModelState, release
from reft_runtime.base.recurrent import MixerStates


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model, ready to run packed steps.

    `layers` are the decoder layers in order, and `shapes` their cache shapes. `group` is the
    largest number of query heads that share one key head. `mixers` are the modules with recurrent
    states, and `states` what each keeps of a sequence. `eos_ids` end an answer. `weight_bytes`
    is the memory of the weights, `fused` and `packed` say what was replaced, and `before` is the
    model's state before that. `distance` is the largest relative distance of the logits from the
    model's own that the check at load found. If several `ranks` compute the model, a process each,
    heads and bytes are those of this rank's shard.
    """

    model: PreTrainedModel
    architecture: str
    layers: tuple[nn.Module, ...]
    shapes: tuple[LayerShape, ...]
    group: int
    mixers: tuple[nn.Module, ...]
    states: tuple[MixerStates, ...]
    eos_ids: frozenset[int]
    hidden_size: int
    vocab_size: int
    max_model_len: int
    weight_bytes: int
    fused: Fused
    packed: Packed
    before: ModelState
    distance: float = 0.0
    ranks: int = 1

    def give_back(self) -> None:
        """Restore the model to what it was before it was loaded or handed in.

        Call it once; this object must not be used afterwards.
        """
        self.before.restore()
        release(self.model)

    def discard(self) -> None:
        """Free the weights of a model that nobody else has; then neither works any more."""
        self.before.discard()

    @property
    def device(self) -> torch.device:
        """Device of the weights, and of keys and values."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of keys and values."""
        return self.model.dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """Memory of one token's keys and values in all layers, in bytes."""
        return sum(shape.numbers for shape in self.shapes) * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Memory of one sequence's recurrent states, in bytes; 0 without recurrent layers."""
        return sum(shape.bytes for mixer in self.states for shape in mixer.shapes.values())


def forward(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, keep: Tensor, step: AttentionStep
) -> Any:
    """Run a packed step through the model; return logits [len(keep), vocabulary].

    `ids` and `positions` are [T]; `keep` are the indices of the rows whose logits are wanted.
    """
    with running(step):
        return model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=keep,
        ).logits[0]

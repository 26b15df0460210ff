"""Training by peers: PEFT's LoRA and pyreft's modules, both in one plain loop."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from reft_runtime.training.forward import Predictions
from reft_runtime.training.prompts import Example
from reft_runtime.training.trainer import WARMUP

LORA_RANK = 8


@dataclass
class Tuned:
    """A causal language model with something to be trained in it."""

    model: Any
    parameters: list[nn.Parameter]
    save: Callable[[Path], None]
    """Write what was trained into a folder."""
    last: list[int] = field(default_factory=list)
    """The place of the last prompt token in each row of the current batch."""

    @property
    def size_bytes(self) -> int:
        """The size of the largest file that what was trained is saved as."""
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder))
            return max(path.stat().st_size for path in Path(folder).iterdir())

    def predict(self, examples: Sequence[Example]) -> Predictions:
        """What `reft_runtime.training.forward.predict` gives, by rows padded on the right."""
        longest = max(len(example.tokens) for example in examples)
        ids = torch.tensor([[*e.tokens, *[0] * (longest - len(e.tokens))] for e in examples])
        mask = torch.tensor([[i < len(e.tokens) for i in range(longest)] for e in examples])
        self.last = [example.prompt_length - 1 for example in examples]
        rows = [
            (number, at)
            for number, e in enumerate(examples)
            for at in range(e.prompt_length - 1, len(e.tokens) - 1)
        ]
        hidden = self.model.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        numbers, places = map(list, zip(*rows, strict=True))
        targets = [token for example in examples for token in example.completion]
        return Predictions(
            self.model.lm_head(hidden[numbers, places]),
            torch.tensor(targets),
            tuple(len(example.completion) for example in examples),
        )


def with_lora(model: Any) -> Tuned:
    """PEFT's LoRA on all linear layers; its weights are float32 whatever the model's dtype is."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    tuned = get_peft_model(model, config).train()
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    return Tuned(model, parameters, lambda folder: tuned.save_pretrained(folder))


def with_pyreft(model: Any, rank: int) -> Tuned:
    """pyreft's LoReFT modules at the last prompt token of every layer."""
    from pyreft.interventions import LoreftIntervention

    model.requires_grad_(False)
    edits = nn.ModuleList(
        LoreftIntervention(
            embed_dim=model.config.hidden_size, low_rank_dimension=rank, dtype=torch.float32
        )
        for _ in model.model.layers
    )
    tuned = Tuned(
        model,
        list(edits.parameters()),
        # One by one: a LoreftIntervention's state_dict ignores its parent's.
        lambda folder: torch.save([edit.state_dict() for edit in edits], folder / "edits.pt"),
    )

    def hook(edit: nn.Module) -> Callable[..., Tensor]:
        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            rows = torch.arange(len(output)), torch.tensor(tuned.last)
            return output.index_put(rows, edit(output[rows]))

        return change

    for layer, edit in zip(model.model.layers, edits, strict=True):
        layer.register_forward_hook(hook(edit))
    return tuned


def fit(
    tuned: Tuned,
    examples: Sequence[Example],
    *,
    lr: float,
    epochs: float,
    batch_size: int,
    seed: int,
) -> None:
    """Train as `reft_runtime.training` does: AdamW, its schedule, gradients clipped at 1."""
    steps = math.ceil(epochs * len(examples) / batch_size)
    # Weight decay would end pyreft's training: torch's parametrisation of R takes int(diagonal),
    # which is -1, and 0 as soon as the diagonal shrinks.
    optimizer = torch.optim.AdamW(tuned.parameters, lr=lr, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(  # type: ignore[no-untyped-call]
        optimizer, math.ceil(WARMUP * steps), steps
    )
    batches: list[list[Example]] = []
    rng = random.Random(seed)
    for _ in range(steps):
        batches = batches or _batches(examples, batch_size, rng)
        made = tuned.predict(batches.pop())
        loss = made.loss() / len(made.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tuned.parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(tuned: Tuned, examples: Sequence[Example]) -> float:
    """Share of the examples whose label greedy decoding gives."""
    tuned.model.eval()
    right = 0
    for first in range(0, len(examples), 32):
        part = examples[first : first + 32]
        right += sum(tuned.predict(part).right(part))
    return right / len(examples)


def _batches(examples: Sequence[Example], size: int, rng: random.Random) -> list[list[Example]]:
    """The batches of an epoch, in random order; rows of a batch are of like length."""
    shuffled = rng.sample(examples, len(examples))
    batches: list[list[Example]] = []
    for first in range(0, len(shuffled), 16 * size):
        like = sorted(shuffled[first : first + 16 * size], key=lambda e: len(e.tokens))
        batches += [like[at : at + size] for at in range(0, len(like), size)]
    rng.shuffle(batches)
    return batches

"""transformers' Trainer for edits: batches, evaluation, checkpoints that can be trusted."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from reft_runtime.errors import ConfigError, TrainingFailed
from reft_runtime.training.forward import Base, EditedModel, predict
from reft_runtime.training.prompts import Example
from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.trainable import TrainableEdits

CHECKS = 5
"""How often a training is evaluated and saved."""

WARMUP = 0.06

COMPLETE = "complete"
"""Name of the file that marks a checkpoint as whole: it is written last."""


class Schedule(Dataset[Example]):
    """All examples of a training in the order of its steps, each pass shuffled anew.

    The order is a function of the seed alone: a training that is resumed goes on in it, whatever
    the random numbers of the process are.
    """

    def __init__(self, examples: Sequence[Example], length: int, seed: int) -> None:
        self._examples = examples
        generator = torch.Generator().manual_seed(seed)
        passes = math.ceil(length / len(examples))
        orders = [torch.randperm(len(examples), generator=generator) for _ in range(passes)]
        self._order: list[int] = torch.cat(orders)[:length].tolist()

    @property
    def used(self) -> list[Example]:
        """The examples that occur in it, each once."""
        return [self._examples[index] for index in sorted(set(self._order))]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example:
        return self._examples[self._order[index]]


def collate(examples: list[Example]) -> dict[str, Any]:
    """A batch; `labels` tells the Trainer the number of tokens that are learned."""
    labels = [token for example in examples for token in example.completion]
    return {"examples": examples, "labels": torch.tensor(labels)}


def scores(base: Base, edits: TrainableEdits, examples: Sequence[Example], batch: int) -> Tensor:
    """Sums over examples [4]: loss in nats, tokens, examples right, examples."""
    totals = torch.zeros(4, dtype=torch.float64)
    canonical = edits.canonical()
    for first in range(0, len(examples), batch):
        part = examples[first : first + batch]
        made = predict(base, canonical, part)
        totals += torch.tensor(
            [float(made.loss()), len(made.targets), sum(made.right(part)), len(part)],
            dtype=torch.float64,
        )
    return totals


def as_metrics(totals: Tensor, *, labelled: bool) -> dict[str, float]:
    """Loss a token, perplexity, and accuracy where rows have labels, from sums over examples."""
    loss, tokens, right, count = totals.tolist()
    mean = loss / tokens
    metrics = {"loss": mean, "perplexity": math.exp(min(mean, 700))}
    return {"accuracy": right / count, **metrics} if labelled else metrics


class EditTrainer(Trainer):
    """Trains an `EditedModel`.

    A loss that is not finite ends the training with `TrainingFailed`. The edits of the newest
    checkpoint whose values are finite are kept in `last_good`.
    """

    def __init__(
        self,
        model: EditedModel,
        args: TrainingArguments,
        train: Sequence[Example],
        evaluation: Sequence[Example],
        batch_size: int,
    ) -> None:
        self.schedule = Schedule(train, args.max_steps * batch_size, args.seed)
        self.last_good: dict[str, Tensor] | None = None
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.schedule,
            eval_dataset=list(evaluation) or None,
            data_collator=collate,
            callbacks=[_Checkpoints(self)],
        )
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(_Progress())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.schedule)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, which must be finite."""
        loss: Tensor
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if not bool(loss.isfinite()):
            raise TrainingFailed(
                f"The loss is {float(loss.detach())} at step {self.state.global_step + 1}. A lower"
                f" learning rate (lr, it was {self.args.learning_rate:g}) usually helps."
            )
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The metrics of the held-out examples, shared among the processes."""
        model: Any = self.model
        held_out: Any = self.eval_dataset
        share = held_out[self.args.process_index :: self.args.world_size]
        totals = scores(model.base, model.edits, share, self.args.eval_batch_size)
        totals = self.accelerator.reduce(totals.to(self.args.device)).cpu()
        labelled = all(example.label_length is not None for example in held_out)
        found = as_metrics(totals, labelled=labelled)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class _Checkpoints(TrainerCallback):
    """Marks checkpoints as whole, and remembers the last good edits."""

    def __init__(self, trainer: EditTrainer) -> None:
        self._trainer = trainer

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        model: Any = self._trainer.model
        values = {name: t.detach().cpu().clone() for name, t in model.edits.state_dict().items()}
        if all(bool(value.isfinite().all()) for value in values.values()):
            self._trainer.last_good = values
        if args.should_save:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class _Progress(ProgressCallback):
    """A bar with the newest figures beside it, instead of a line for each report."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {
                name: f"{value:.3g}"
                for name, value in logs.items()
                if name in ("loss", "eval_loss", "eval_accuracy")
            }
            if shown:
                self._shown = {**getattr(self, "_shown", {}), **shown}
                self.training_bar.set_postfix(self._shown)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; those that a crash left incomplete are removed."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).exists():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def arguments(
    settings: TrainSettings,
    folder: Path,
    rows: int,
    *,
    accuracy: bool | None,
    device: torch.device,
    progress: bool,
) -> TrainingArguments:
    """The Trainer's settings. `accuracy` says by what the best checkpoint is chosen, else by loss.

    It is None where there is nothing to evaluate on: then the last one is taken.
    """
    steps = settings.steps or math.ceil((settings.epochs or 0) * rows / settings.batch_size)
    parts = settings.accumulate * int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets it
    if settings.batch_size % parts:
        raise ConfigError(
            f"batch_size: {settings.batch_size} rows of a step cannot be shared by {parts} parts.",
            param="batch_size",
        )
    every = max(1, math.ceil(steps / CHECKS))
    evaluates = accuracy is not None
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size // parts,
        per_device_eval_batch_size=2 * settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr or 0.0,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(WARMUP * steps),
        weight_decay=0.0,
        seed=settings.seed,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every if evaluates else None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=evaluates,
        metric_for_best_model=("eval_accuracy" if accuracy else "eval_loss") if evaluates else None,
        greater_is_better=bool(accuracy) if evaluates else None,
        logging_steps=every,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=not progress,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs: one process each, by torchrun
    return args

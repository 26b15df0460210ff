"""transformers' Trainer for edits: batches, evaluation, checkpoints that can be trusted."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
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
    TrainingArguments,
)

from reft_runtime.errors import ConfigError, TrainingFailed
from reft_runtime.progress import bar
from reft_runtime.training.callbacks import Complete, Progress
from reft_runtime.training.forward import Base, EditedModel, predict
from reft_runtime.training.prompts import Example
from reft_runtime.training.settings import CHECKS, TrainSettings
from reft_runtime.training.signals import HeldSignals
from reft_runtime.training.trainable import TrainableEdits
from reft_runtime.training.work import COMPLETE

WARMUP = 0.06

LOGS = 50
"""The loss of a training is logged this many times."""

MERIT = "eval_merit"
"""The figure by which the best checkpoint is chosen."""


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
        """The examples that the steps go over, each once."""
        return [self._examples[index] for index in sorted(set(self._order))]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example:
        return self._examples[self._order[index]]


def collate(examples: list[Example]) -> dict[str, Any]:
    """A batch; `labels` tells the Trainer the number of tokens that are learned."""
    labels = [token for example in examples for token in example.completion]
    return {"examples": examples, "labels": torch.tensor(labels)}


class Interrupted(Exception):
    """An evaluation ended before its time, because a signal waits."""


def scores(
    base: Base,
    edits: TrainableEdits,
    examples: Sequence[Example],
    batch: int,
    *,
    progress: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Sums over examples [4]: loss in nats, tokens, examples right, examples.

    Raises `Interrupted` between two batches where `interrupted` says so.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    canonical = edits.canonical()
    firsts = range(0, len(examples), batch)
    shown = bar(firsts, desc="Evaluating", leave=False, disable=not progress, delay=1)
    with shown:
        for first in shown:
            if interrupted():
                raise Interrupted
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


def merit(totals: Tensor, *, labelled: bool) -> float:
    """A figure that is highest for the best checkpoint: most rows right, then least loss."""
    loss, tokens, right, _ = totals.tolist()
    mean = loss / tokens
    return float((right if labelled else 0) - mean / (1 + mean))


class EditTrainer(Trainer):
    """Trains an `EditedModel`.

    A loss that is not finite ends the training with `TrainingFailed`. The edits of the newest
    checkpoint whose values are finite are kept in `last_good`. Where one of `signals` waits, the
    training ends with a checkpoint of the step that it has just made.
    """

    def __init__(
        self,
        model: EditedModel,
        args: TrainingArguments,
        train: Sequence[Example],
        evaluation: Sequence[Example],
        batch_size: int,
        signals: HeldSignals,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.schedule = Schedule(train, args.max_steps * batch_size, args.seed)
        self.last_good: dict[str, Tensor] | None = None
        self._signals = signals
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.schedule,
            eval_dataset=list(evaluation) or None,
            data_collator=collate,
            callbacks=[_Kept(self), Complete(), *callbacks],
        )
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(Progress())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.schedule)

    @property
    def _checkpoint(self) -> Path:
        """Where the checkpoint of this step is, or will be."""
        return Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        if not self.control.should_training_stop:  # a resumed training may have been over
            super()._run_epoch(*arguments, **options)  # type: ignore[no-untyped-call]

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """Log, evaluate and save where it is due; where a signal waits, save and end.

        An evaluation that was due and is not made is made by the training that is resumed.
        """
        try:
            if not self._signals.waiting:
                super()._maybe_log_save_evaluate(*arguments, **options)
        except Interrupted:
            pass
        if not self._signals.waiting:
            return
        if not (self._checkpoint / COMPLETE).exists():
            self._save_checkpoint(self.model, None)  # type: ignore[arg-type]
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.control.should_training_stop = True

    def evaluate_what_is_due(self) -> None:
        """Make the evaluation of the checkpoint that a signal kept an earlier training from."""
        step, args = self.state.global_step, self.args
        if not step or args.eval_strategy == "no":
            return
        due = step % int(args.eval_steps or 1) == 0 or step == self.state.max_steps
        made = any(
            entry["step"] == step and "eval_loss" in entry for entry in self.state.log_history
        )
        if made or not due:
            return
        try:
            metrics = self._evaluate(None, None)
        except Interrupted:
            self.control.should_training_stop = True
            return
        if self._determine_best_metric(metrics, None):
            self.state.best_model_checkpoint = str(self._checkpoint)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; raises `TrainingFailed` where it is not finite."""
        loss: Tensor
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if not bool(loss.isfinite()):
            raise self._diverged(
                f"The loss is {float(loss.detach())} at step {self.state.global_step + 1}."
            )
        return (loss, outputs) if return_outputs else loss

    def check_edits(self) -> None:
        """Raise `TrainingFailed` where the edits that came out are not finite."""
        model: Any = self.model
        with torch.no_grad():
            values = [value for edit in model.edits for value in edit.stored().values()]
        if not all(bool(value.isfinite().all()) for value in values):
            raise self._diverged(f"The edits are not finite after step {self.state.global_step}.")

    def _diverged(self, what: str) -> TrainingFailed:
        rate = f"(lr, it was {self.args.learning_rate:g})"
        return TrainingFailed(f"{what} A lower learning rate {rate} usually helps.")

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The metrics of the held-out examples, shared among the processes."""
        model: Any = self.model
        held_out: Any = self.eval_dataset
        share = held_out[self.args.process_index :: self.args.world_size]
        totals = scores(
            model.base,
            model.edits,
            share,
            self.args.eval_batch_size,
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            interrupted=lambda: self._signals.waiting,
        )
        totals = self.accelerator.reduce(totals.to(self.args.device)).cpu()
        labelled = all(example.label_length is not None for example in held_out)
        found = as_metrics(totals, labelled=labelled)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(metrics)
        metrics[MERIT] = merit(totals, labelled=labelled)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class _Kept(TrainerCallback):
    """Remembers the last good edits, and makes up for an evaluation that a signal cut off."""

    def __init__(self, trainer: EditTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.evaluate_what_is_due()

    def on_save(self, *_: Any, **__: Any) -> None:
        model: Any = self._trainer.model
        values = {name: t.detach().cpu().clone() for name, t in model.edits.state_dict().items()}
        if all(bool(value.isfinite().all()) for value in values.values()):
            self._trainer.last_good = values


def arguments(
    settings: TrainSettings,
    folder: Path,
    rows: int,
    *,
    evaluates: bool,
    device: torch.device,
    progress: bool,
) -> TrainingArguments:
    """The Trainer's settings. Where it `evaluates` the best checkpoint is taken, else the last."""
    steps = settings.steps_over(rows)
    parts = settings.accumulate * int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets it
    if settings.batch_size % parts:
        raise ConfigError(
            f"batch_size: {settings.batch_size} rows of a step cannot be shared by {parts} parts.",
            param="batch_size",
        )
    every = max(1, math.ceil(steps / CHECKS))
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size // parts,
        per_device_eval_batch_size=2 * settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr or 0.0,
        lr_scheduler_type="linear",
        # The first step of a warm-up has a rate of 0: a training of one step would learn nothing.
        warmup_steps=min(math.ceil(WARMUP * steps), steps - 1),
        weight_decay=0.0,
        seed=settings.seed,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every if evaluates else None,
        save_strategy="steps",
        save_steps=every,
        load_best_model_at_end=evaluates,
        metric_for_best_model=MERIT if evaluates else None,
        greater_is_better=True if evaluates else None,
        logging_steps=math.ceil(steps / LOGS),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=not progress,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs: one process each, by torchrun
    return args

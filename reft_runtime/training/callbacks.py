"""What happens beside the steps of a training: checkpoints, an early end, what is shown."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from reft_runtime.progress import bar
from reft_runtime.training.settings import CHECKS
from reft_runtime.training.wording import counted, duration
from reft_runtime.training.work import COMPLETE

PACE_STEPS = 10
"""After this many steps it is told how long all will take. The first, slow one does not count."""

Say = Callable[[str], None]
"""A function that is given what a training tells, line by line."""


class Complete(TrainerCallback):
    """Marks checkpoints as whole, and removes those that are neither the newest nor the best."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called when a checkpoint is written."""
        if not args.should_save:
            return
        folder = Path(str(args.output_dir))
        newest, best = (
            f"checkpoint-{step}" for step in (state.global_step, state.best_global_step)
        )
        (folder / newest / COMPLETE).touch()
        for other in folder.glob("checkpoint-*"):
            if other.name not in (newest, best):
                shutil.rmtree(other, ignore_errors=True)


class Patience(TrainerCallback):
    """Ends a training after so many evaluations without an improvement.

    It counts them in what was logged, so that a resumed training ends at the same step.
    """

    def __init__(self, evaluations: int) -> None:
        self._evaluations = evaluations

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called before the first step, also where a training that was over is resumed."""
        self._end(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after every evaluation, since each is followed by a checkpoint."""
        self._end(state, control)

    def _end(self, state: TrainerState, control: TrainerControl) -> None:
        if evaluations_since_best(state) >= self._evaluations:
            control.should_training_stop = True


def evaluations_since_best(state: TrainerState) -> int:
    """How many evaluations were made after the best one."""
    best = state.best_global_step
    if best is None:
        return 0
    return sum("eval_loss" in entry and entry["step"] > best for entry in state.log_history)


class Pace(TrainerCallback):
    """Says once how long the training will take, with the evaluations on `rows` rows."""

    def __init__(self, say: Say, batch_size: int, rows: int) -> None:
        self._say = say
        # Rows that are evaluated take a third of the time of those that are trained on.
        self._evaluating = CHECKS * rows / (3 * batch_size)
        self._first = 0
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called before the first step, which may be a resumed one."""
        self._first = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after every optimiser step."""
        done, steps = state.global_step - self._first, state.max_steps - self._first
        if done == 1:
            self._began = time.monotonic()
        if done == PACE_STEPS < steps and state.is_world_process_zero:
            step = (time.monotonic() - self._began) / (PACE_STEPS - 1)
            share = steps / state.max_steps
            expected = step * (steps + share * self._evaluating)
            with tqdm.external_write_mode(file=sys.stderr):
                self._say(f"about {duration(expected)} for {counted(steps, 'step')}")


class Progress(TrainerCallback):
    """Shows a bar of the steps, with the newest figures beside it."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._figures: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called before the first step, which may be a resumed one."""
        if state.is_world_process_zero:
            self._bar = bar(
                total=state.max_steps,
                initial=state.global_step,
                desc="Training",
                unit="step",
                dynamic_ncols=True,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after every optimiser step."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called with the figures that are logged."""
        names = {"loss": "loss", "eval_loss": "eval loss", "eval_accuracy": "accuracy"}
        found = {
            names[name]: f"{value:.3g}" for name, value in (logs or {}).items() if name in names
        }
        if self._bar is not None and found:
            self._figures |= found
            self._bar.set_postfix(self._figures, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after the last step."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

"""From rows to an intervention file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from reft_runtime.display.plots import check_plot
from reft_runtime.interventions import Intervention
from reft_runtime.interventions.format.manifest import SystemTurn
from reft_runtime.loading.base import load_base
from reft_runtime.machine.cores import use_threads
from reft_runtime.training.callbacks import Pace, Patience, Say
from reft_runtime.training.curves import check_tensorboard, write_plot
from reft_runtime.training.curves import tensorboard as tensorboard_callback
from reft_runtime.training.draft import Draft, Examples
from reft_runtime.training.material import prepare
from reft_runtime.training.record import extent_of, taken_of
from reft_runtime.training.rows import Rows
from reft_runtime.training.run import TrainingRun
from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.sources import Data
from reft_runtime.training.target import check_target
from reft_runtime.training.trainer import arguments
from reft_runtime.training.work import WorkFolder


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What came out of a training: the file's path and content, and how long it took.

    `held_out` are the rows that chose the checkpoint and measured it, None where there were none.
    `model` and `tokenizer` are the base that it was trained on, as it was before; their memory is
    free again when nobody has them. `evaluate([trained.held_out], [str(trained.path)],
    model=trained.model, tokenizer=trained.tokenizer)` loads it no second time.
    """

    path: Path
    intervention: Intervention
    seconds: float
    held_out: Rows | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def metrics(self) -> Mapping[str, JsonValue]:
        """What the manifest says of its quality: that of the checkpoint that was taken."""
        return self.intervention.manifest.metrics


def train(
    data: Data,
    out: str | Path,
    *,
    model: str | Path | PreTrainedModel = "demo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    evaluation: Data | None = None,
    settings: TrainSettings | None = None,
    description: str = "",
    license: str | None = None,
    system: SystemTurn | None = None,
    text: str | None = None,
    label: str | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Say = _silent,
    threads: int | None = None,
    plot: str | Path | None = None,
    tensorboard: str | Path | None = None,
) -> Trained:
    """Train edits on rows and write them to `out`, one `NAME.safetensors`.

    `data` is a file's name, `hf:NAME`, a list of dicts or a DataFrame; `text` and `label` name
    its columns, where it has no `prompt` and `completion`, and usual names are found without.
    `model` and `tokenizer` are as for `Engine`; `evaluation` are rows by which the best of several
    checkpoints is chosen; without them `settings.hold_out` says which rows of the data are, and
    where there are none the last checkpoint is taken. `system` is what a template that is a
    text does with a system turn of a chat, by default "prepend". Checkpoints are kept beside `out`
    until it is written; with `resume` a training that was cut off goes on from the newest and, in
    float32 on a CPU, ends with the weights it would have had. `say` is given, line by line, what
    was found in the data, what is trained, and how long it will take. `plot` is a picture of the
    losses to draw, `tensorboard` a folder to log to. `threads` is by default one a core that this
    process may use.
    Raises `ConfigError` for mistakes in rows and settings, before anything is computed, `TypeError`
    for data that are no rows and other values of a wrong type, and `TrainingFailed` where the loss
    is no longer finite: the edits of the last good checkpoint are written then. After
    `KeyboardInterrupt` the step that was being made is kept as a checkpoint; the exception's note
    says so.
    """
    _check_types(model, settings)
    use_threads(threads)
    target = check_target(out)
    picture = None if plot is None else check_plot(plot)
    board = None if tensorboard is None else check_tensorboard(tensorboard)
    work = WorkFolder(target)
    work.check(resume=resume)
    if target.exists():
        say(f"{target} is there; it will be replaced when the training has ended")
    with work.guarded(), ExitStack() as ends:
        material = prepare(
            data,
            evaluation,
            settings or TrainSettings(),
            model=model,
            tokenizer=tokenizer,
            system=system,
            text=text,
            label=label,
            say=say,
        )
        name, loaded, own_tokenizer = load_base(
            model, tokenizer, material.settings.dtype, None, differentiable=True
        )
        ends.callback(loaded.give_back)
        draft = Draft(material, name, loaded, own_tokenizer, description, license)
        draft.build()  # what the file's format refuses, such as too long a description, is told now
        examples = draft.examples()
        say(extent_of(examples.learned, draft.edits, draft.settings))
        args = arguments(
            draft.settings,
            work.path,
            len(examples.learned),
            evaluates=material.held_out is not None,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            progress=progress,
        )
        work.begin(draft.note, resume=resume, writes=args.process_index == 0)
        if resume:
            say(f"goes on from {work.progress(args.max_steps)}")
        run = TrainingRun(
            draft, examples, loaded, args, _callbacks(draft.settings, examples, args, board, say)
        )
        made = run.train(target, work, progress=progress)
        if material.held_out is not None:
            say(taken_of(run.state))
        if run.writes:
            work.remove()
            if picture is not None:
                write_plot(picture, run.state.log_history, run.state.best_global_step)
        return Trained(target, made, run.seconds, material.held_out, loaded.model, own_tokenizer)


def _check_types(model: object, settings: object) -> None:
    if not isinstance(model, str | os.PathLike | PreTrainedModel):
        raise TypeError(
            "model: give demo, a folder, a Hugging Face id or a transformers model, not"
            f" {type(model).__name__}."
        )
    if not isinstance(settings, TrainSettings | None):
        raise TypeError(f"settings: give a TrainSettings, not {type(settings).__name__}.")


def _callbacks(
    settings: TrainSettings,
    examples: Examples,
    args: TrainingArguments,
    board: Path | None,
    say: Say,
) -> list[TrainerCallback]:
    """What happens beside the steps, apart from what every training does."""
    found: list[TrainerCallback] = [Pace(say, settings.batch_size, len(examples.held_out))]
    if settings.patience is not None:
        found.append(Patience(settings.patience))
    if board is not None and args.process_index == 0:
        found.append(tensorboard_callback(board))
    return found

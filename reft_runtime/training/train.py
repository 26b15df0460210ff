"""From rows to an intervention file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from reft_runtime.base.shape import shape_of
from reft_runtime.display.plots import check_plot
from reft_runtime.errors import ConfigError, TrainingFailed
from reft_runtime.interventions import Intervention, write
from reft_runtime.interventions.format.manifest import SystemTurn
from reft_runtime.loading.base import load_base, read_words
from reft_runtime.machine.cores import use_threads
from reft_runtime.machine.memory import free_memory
from reft_runtime.text import Tokenizer
from reft_runtime.training.callbacks import Pace, Patience, Say
from reft_runtime.training.check import check_data, measure_of
from reft_runtime.training.curves import check_tensorboard, write_plot
from reft_runtime.training.curves import tensorboard as tensorboard_callback
from reft_runtime.training.forward import Base, EditedModel, first_edited
from reft_runtime.training.hold_out import split
from reft_runtime.training.join import choose_prefix
from reft_runtime.training.layout import CHAT, Layout, choose_template
from reft_runtime.training.prompts import Example, Formatter, make_examples
from reft_runtime.training.record import about, extent_of, metrics_of, taken_of
from reft_runtime.training.rows import Rows, read_rows
from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.signals import HeldSignals
from reft_runtime.training.sources import Data
from reft_runtime.training.target import check_target
from reft_runtime.training.trainable import TrainableEdits, new_edits
from reft_runtime.training.trainer import EditTrainer, arguments
from reft_runtime.training.wording import counted
from reft_runtime.training.work import WorkFolder, progress_of

PREFIX_SHARE_OF_FREE_MEMORY = 0.3


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What came out of a training: the file's path and content, and how long it took.

    `held_out` are the rows that chose the checkpoint and measured it, None where there were none.
    `model` and `tokenizer` are the base that it was trained on, whose memory is free again when
    nobody has them; `evaluate([trained.held_out], [str(trained.path)], model=trained.model,
    tokenizer=trained.tokenizer)` loads it no second time.
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
    settings = settings or TrainSettings()
    picture = None if plot is None else check_plot(plot)
    board = None if tensorboard is None else check_tensorboard(tensorboard)
    work = WorkFolder(target)
    work.check(resume=resume)
    if target.exists():
        say(f"{target} is there; it will be replaced when the training has ended")
    with work.guarded():
        rows = read_rows(data, text=text, label=label, lenient=True)
        held_out = None
        if evaluation is not None:
            held_out = read_rows(evaluation, text=text, label=label, lenient=True)
        given = None if isinstance(model, PreTrainedModel) else read_words(model)
        if system is None:
            settings = _with_template(settings, rows, given, tokenizer)
        layout = Layout(settings.template, rows.rows[0])
        system = _system(system, layout.served_template)
        _check_rows(rows, held_out, given, layout, settings, say)
        if held_out is None:
            rows, held_out = _held_out(rows, layout, settings, say)
        elif settings.hold_out:
            raise ConfigError(
                "hold_out: there are other rows to evaluate on; give one of the two.",
                param="hold_out",
            )
        if settings.patience is not None and held_out is None:
            raise ConfigError(
                "patience: there are no rows to evaluate on; give them with --eval (in Python"
                " evaluation=), or hold some out with --hold-out 0.1 (hold_out=0.1).",
                param="patience",
            )
        name, loaded, own_tokenizer = load_base(
            model, tokenizer, settings.dtype, None, differentiable=True
        )
        shape = shape_of(name, loaded)
        settings = settings.complete(shape, len(rows.rows))
        edits = new_edits(shape, settings)
        words = Tokenizer(own_tokenizer, loaded.max_model_len)
        prefix = choose_prefix(rows.rows, layout, words)

        def built(**figures: Any) -> Intervention:
            return Intervention.build(
                shape,
                edits.export(),
                template=layout.served_template,
                system=system,
                completion_prefix=prefix,
                texts=layout.texts,
                description=description,
                license=license,
                **figures,
            )

        built()  # what the file's format refuses, such as too long a description, is told now
        formatter = Formatter(layout, words, loaded.eos_ids, completion_prefix=prefix)
        longest = min(settings.max_length or loaded.max_model_len, loaded.max_model_len)
        examples = make_examples(rows, formatter, longest, truncate=settings.truncate)
        tests = []
        if held_out is not None:
            tests = make_examples(held_out, formatter, longest, truncate=settings.truncate)
        _check_edited(examples, edits)
        say(extent_of(examples, edits, settings))
        what = about(rows, held_out, settings, str(loaded.dtype).removeprefix("torch."))
        args = arguments(
            settings,
            work.path,
            len(examples),
            evaluates=held_out is not None,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            progress=progress,
        )
        note = {"base": shape.model_dump(), "completion_prefix": prefix, **what}
        work.begin(note, resume=resume, writes=args.process_index == 0)
        checkpoint = work.newest
        if resume:
            nothing = f"step 0 of {args.max_steps}: none was kept"
            say(f"goes on from {progress_of(checkpoint) if checkpoint else nothing}")
        base = Base(loaded)
        base.to(args.device)
        callbacks: list[TrainerCallback] = [Pace(say, settings.batch_size, len(tests))]
        if settings.patience is not None:
            callbacks.append(Patience(settings.patience))
        if board is not None and args.process_index == 0:
            callbacks.append(tensorboard_callback(board))
        signals = HeldSignals()
        trainer = EditTrainer(
            EditedModel(base, edits), args, examples, tests, settings.batch_size, signals, callbacks
        )
        begun = time.monotonic()
        canonical = [edit.canonical() for edit in edits]
        base.keep(
            (
                example.tokens[: first_edited(canonical, example)]
                for example in [*trainer.schedule.used, *tests]
            ),
            _prefix_bytes(args.device),
            progress=progress,
        )

        def finish() -> Trained:
            seconds = round(time.monotonic() - begun, 1)
            made = built(
                metrics=metrics_of(trainer.state),
                training={**what, "steps": trainer.state.global_step, "seconds": seconds},
            )
            if trainer.is_world_process_zero():
                write(target, made)
            base.forget()
            return Trained(target, made, seconds, held_out, loaded.model, own_tokenizer)

        try:
            with signals:
                trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
            trained = finish()
        except TrainingFailed as error:
            failed = _failed(error, trainer, edits, finish, target)
            if trainer.is_world_process_zero():
                work.remove()
            raise failed from None
        except (OSError, SafetensorError) as error:
            raise _unwritten(target, work, error) from error
        except RuntimeError as error:
            if "PytorchStreamWriter" not in str(error):
                raise
            raise _unwritten(target, work, error) from error
        if held_out is not None:
            say(taken_of(trainer.state))
        if trainer.is_world_process_zero():
            work.remove()
            if picture is not None:
                write_plot(picture, trainer.state.log_history, trainer.state.best_global_step)
        return trained


def _check_types(model: object, settings: object) -> None:
    if not isinstance(model, str | os.PathLike | PreTrainedModel):
        raise TypeError(
            "model: give demo, a folder, a Hugging Face id or a transformers model, not"
            f" {type(model).__name__}."
        )
    if not isinstance(settings, TrainSettings | None):
        raise TypeError(f"settings: give a TrainSettings, not {type(settings).__name__}.")


def _with_template(
    settings: TrainSettings,
    rows: Rows,
    words: Tokenizer | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> TrainSettings:
    """The same with a template, where rows are to be asked by one and nobody says by which."""
    if settings.template is not None:
        return settings
    chats = words.knows_chats if words else tokenizer is not None and bool(tokenizer.chat_template)
    return replace(settings, template=choose_template(rows, chats=chats))


def _check_rows(
    rows: Rows,
    held_out: Rows | None,
    words: Tokenizer | None,
    layout: Layout,
    settings: TrainSettings,
    say: Say,
) -> None:
    """Say what is in the rows; raises `ConfigError` where they cannot be trained on."""
    measure = None
    if not settings.truncate and words is not None:
        measure = measure_of(words, layout, settings.max_length)
    checks = check_data(rows, held_out, settings.template, measure)
    for check in checks:
        check.raise_errors()
        say(str(check))
    if layout.texts and layout.served_template == CHAT:
        say("texts are asked as what a user says in a chat; --template '{prompt}' leaves them bare")


def _held_out(
    rows: Rows, layout: Layout, settings: TrainSettings, say: Say
) -> tuple[Rows, Rows | None]:
    kept, held_out = split(rows, settings.hold_out, layout, settings.seed)
    if held_out is not None:
        say(
            f"{len(held_out.rows):,} of {counted(len(rows.rows), 'row')} are held out to measure"
            " it; --hold-out 0 trains on all"
        )
    return kept, held_out


def _system(system: SystemTurn | None, template: str) -> SystemTurn | None:
    """What the manifest says of system turns; the model's own template takes them anyway."""
    if system not in (None, "prepend", "drop", "refuse"):
        raise ConfigError(f"system: write prepend, drop or refuse, not {system!r}.", param="system")
    if template != CHAT:
        return system or "prepend"
    if system is not None:
        raise ConfigError(
            "system: chats are written by the model's own template, which takes system turns;"
            " leave it out, or give a template that is a text.",
            param="system",
        )
    return None


def _check_edited(examples: Sequence[Example], edits: TrainableEdits) -> None:
    for example in examples:
        n = example.prompt_length
        if not any(e.spec.positions.offsets(n, 0, len(example.tokens) - 1) for e in edits):
            positions = next(iter(edits)).spec.positions
            raise ConfigError(
                f"{example.where}: positions {positions} edit nothing in its prompt of {n}"
                " tokens; leave such rows out, or choose other positions.",
                param="positions",
            )


def _prefix_bytes(device: torch.device) -> int:
    return int(PREFIX_SHARE_OF_FREE_MEMORY * free_memory(device))


def _failed(
    error: TrainingFailed, trainer: EditTrainer, edits: TrainableEdits, finish: Any, target: Path
) -> TrainingFailed:
    if trainer.last_good is None:
        return TrainingFailed(f"{error.message} Nothing was written.")
    edits.load_state_dict(trainer.last_good)
    finish()
    return TrainingFailed(f"{error.message} The last good edits are in {target}.")


def _unwritten(target: Path, work: WorkFolder, error: Exception) -> ConfigError:
    again = "start it again" if work.newest is None else "go on with --resume"
    return ConfigError(
        f"out: {target} or its checkpoints in {work.path} cannot be written: {error}. When there is"
        f" room, {again}.",
        param="out",
    )

"""The steps of a training: the base with its edits in the trainer, and what comes out of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState, TrainingArguments

from reft_runtime.base.model import LoadedModel
from reft_runtime.errors import ConfigError, TrainingFailed
from reft_runtime.interventions import Intervention, write
from reft_runtime.machine.memory import free_memory
from reft_runtime.training.draft import Draft, Examples
from reft_runtime.training.forward import Base, EditedModel
from reft_runtime.training.signals import HeldSignals
from reft_runtime.training.trainer import EditTrainer
from reft_runtime.training.work import WorkFolder

PREFIX_SHARE_OF_FREE_MEMORY = 0.3
"""The prefixes that the base keeps may take this share of the free memory."""


class TrainingRun:
    """A training that is ready: its draft, its examples, and the trainer that will go over them."""

    def __init__(
        self,
        draft: Draft,
        examples: Examples,
        loaded: LoadedModel,
        args: TrainingArguments,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self._draft = draft
        self._examples = examples
        self._signals = HeldSignals()
        self._base = Base(loaded)
        self._base.to(args.device)
        self._base.check(draft.edits.canonical())
        self._trainer = EditTrainer(
            EditedModel(self._base, draft.edits),
            args,
            examples.learned,
            examples.held_out,
            draft.settings.batch_size,
            self._signals,
            callbacks,
        )
        self.seconds = 0.0

    @property
    def state(self) -> TrainerState:
        """How far the trainer is, and all that it logged."""
        return self._trainer.state

    @property
    def writes(self) -> bool:
        """Whether this process, of those that train together, writes the files."""
        return bool(self._trainer.is_world_process_zero())

    def train(self, target: Path, work: WorkFolder, *, progress: bool) -> Intervention:
        """Train from the newest checkpoint of `work`, or from the start, and write `target`.

        Raises `TrainingFailed` where loss or edits are no longer finite; the last good edits are
        written then. Raises `ConfigError` where files cannot be written.
        """
        begun = time.monotonic()
        checkpoint = work.newest
        self._keep_prefixes(progress=progress)
        try:
            with self._signals:
                self._trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
            self._trainer.check_edits()
            return self._write(target, begun)
        except TrainingFailed as error:
            failed = self._failed(error, target, begun)
            if self.writes:
                work.remove()
            raise failed from None
        except (OSError, SafetensorError) as error:
            raise _unwritten(target, work, error) from error
        except RuntimeError as error:
            if "inline_container" not in str(error):  # torch's writer of files
                raise
            raise _unwritten(target, work, error) from error

    def _keep_prefixes(self, *, progress: bool) -> None:
        """Let the base keep the prefix of each example that lies before its first edit."""
        edits = self._draft.edits.canonical()
        examples = [*self._trainer.schedule.used, *self._examples.held_out]
        self._base.keep(
            (example.tokens[: self._base.start(edits, example)] for example in examples),
            int(PREFIX_SHARE_OF_FREE_MEMORY * free_memory(self._trainer.args.device)),
            progress=progress,
        )

    def _write(self, target: Path, begun: float) -> Intervention:
        self.seconds = round(time.monotonic() - begun, 1)
        made = self._draft.finished(self.state, self.seconds)
        if self.writes:
            write(target, made)
        self._base.forget()
        return made

    def _failed(self, error: TrainingFailed, target: Path, begun: float) -> TrainingFailed:
        if self._trainer.last_good is None:
            return TrainingFailed(f"{error.message} Nothing was written.")
        self._draft.edits.load_state_dict(self._trainer.last_good)
        self._write(target, begun)
        return TrainingFailed(f"{error.message} The last good edits are in {target}.")


def _unwritten(target: Path, work: WorkFolder, error: Exception) -> ConfigError:
    again = "start it again" if work.newest is None else "go on with --resume"
    return ConfigError(
        f"out: {target} or its checkpoints in {work.path} cannot be written: {error}. When there is"
        f" room, {again}.",
        param="out",
    )

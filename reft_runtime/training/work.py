"""The folder beside a training's file, with its checkpoints: begun, resumed, left behind or not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reft_runtime.errors import ConfigError
from reft_runtime.interventions.format.file import write_atomic

COMPLETE = "complete"
"""Name of the file that marks a checkpoint as whole: it is written last."""

_NOTE = "training.json"
"""Name of the file that says what a training is, beside its checkpoints."""

_STATE = "trainer_state.json"
"""Name of the file that says how far a checkpoint is, written by the Trainer."""


class WorkFolder:
    """Where the checkpoints of the training that writes `target` are kept until it is written."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f".{target.stem}.training")
        self._target = target
        self._begun = False
        self._lock: int | None = None

    @property
    def newest(self) -> Path | None:
        """The newest whole checkpoint; those that a crash left incomplete are removed."""
        whole = []
        for checkpoint in self.path.glob("checkpoint-*"):
            if (checkpoint / COMPLETE).exists():
                whole.append(checkpoint)
            else:
                shutil.rmtree(checkpoint, ignore_errors=True)
        return max(whole, key=_step, default=None)

    def check(self, *, resume: bool) -> None:
        """Raise `ConfigError` where a training would be overwritten, or none can be resumed."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: {self.path} is in the way; remove it.", param="out")
        if self.path.is_dir():
            self._take(fcntl.LOCK_SH)
            self._release()
        if resume:
            if not (self.path / _NOTE).exists():
                raise ConfigError(
                    f"resume: there is nothing to resume in {self.path}; leave --resume out.",
                    param="resume",
                )
        elif self.newest is not None:
            raise ConfigError(
                f"resume: {self.path} holds a training that was cut off. Go on with --resume, or"
                " remove that folder to begin again.",
                param="resume",
            )

    def begin(self, note: Mapping[str, Any], *, resume: bool, writes: bool) -> None:
        """Make the folder, without what a crash left, or see that what is resumed is this training.

        Of several processes one `writes`.
        """
        text = json.dumps(note, indent=1, sort_keys=True)
        if resume:
            before = json.loads((self.path / _NOTE).read_text())
            differs = sorted(
                key for key in {*note, *before} if before.get(key) != json.loads(text).get(key)
            )
            if differs:
                raise ConfigError(
                    f"resume: the training that was cut off differs in {', '.join(differs)}; give"
                    f" the same data and options, or remove {self.path} to begin again.",
                    param="resume",
                )
        if not writes:
            return
        if self.path.is_dir():
            self._take(fcntl.LOCK_EX)
        self._begun = True
        for stray in self._target.parent.glob(f".{self._target.name}.*.tmp"):
            stray.unlink(missing_ok=True)
        if not resume:
            self.remove()
            self.path.mkdir()
            self._take(fcntl.LOCK_EX)
            write_atomic(self.path / _NOTE, text.encode())

    def remove(self) -> None:
        """Remove the folder, if it is there."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.path)

    def progress(self, steps: int) -> str:
        """How far a training of so many steps is: `step 120 of 375`."""
        newest = self.newest
        return f"step 0 of {steps}: none was kept" if newest is None else _progress(newest)

    def kept(self) -> str:
        """Which step is kept and how to go on from it, in words; or that none is."""
        newest = self.newest
        if newest is None:
            return "No step is kept, and nothing is left behind: start it again."
        return (
            f"{_progress(newest).capitalize()} is kept in {self.path}. The same command with"
            " --resume (in Python resume=True) goes on from there."
        )

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Go around a training: where it fails before a checkpoint, the folder is removed.

        `KeyboardInterrupt` gets what `kept` says as a note.
        """
        try:
            yield
        except BaseException as error:
            if self._begun and self.newest is None:
                self.remove()
            if isinstance(error, KeyboardInterrupt):
                error.add_note(self.kept())
            raise
        finally:
            self._release()

    def _take(self, how: int) -> None:
        """Lock the folder; raises `ConfigError` where another training has it."""
        lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(
                f"out: another training of {self._target} is running; wait for its end, or name"
                " another file.",
                param="out",
            ) from None
        except OSError:
            pass  # a file system without locks
        self._release()
        self._lock = lock

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _progress(checkpoint: Path) -> str:
    """How far a checkpoint is: `step 120 of 375`."""
    steps = json.loads((checkpoint / _STATE).read_text())["max_steps"]
    return f"step {_step(checkpoint)} of {steps}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])

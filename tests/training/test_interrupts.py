"""Ctrl-C, SIGTERM and early ends: what is kept, what is said, and how it goes on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from reft_runtime.errors import ConfigError
from reft_runtime.training import Trained, TrainSettings
from reft_runtime.training import trainer as trainer_module
from reft_runtime.training.forward import Base
from reft_runtime.training.trainer import EditTrainer, Interrupted
from server.cli.training import app
from tests.helpers.forked import Forked, reft
from tests.training.make import ROWS, folder, jsonl
from tests.training.test_train import run

At = Callable[..., None]


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> At:
    """Send this process a signal in a step of the training, or in the evaluation behind one."""

    def send(step: int, *, evaluating: bool = False, times: int = 1) -> None:
        name = "evaluate" if evaluating else "training_step"
        original = getattr(EditTrainer, name)
        left = [times]

        def patched(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.state.global_step == (step if evaluating else step - 1):
                while left[0]:
                    left[0] -= 1
                    signal.raise_signal(signal.SIGINT)
            return original(self, *arguments, **options)

        monkeypatch.setattr(EditTrainer, name, patched)

    return send


def same(one: Trained, other: Trained) -> bool:
    a, b = one.intervention, other.intervention
    assert a.manifest.metrics == b.manifest.metrics
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A training that nobody interrupted."""
    return run(tmp_path_factory.mktemp("whole") / "x.safetensors", evaluation=ROWS[:8])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("step", "evaluating"), [(7, False), (8, True), (20, True)])
def test_ctrl_c_keeps_the_step_and_resuming_ends_as_if_there_had_been_none(
    tmp_path: Path, whole: Trained, signal_at: At, step: int, evaluating: bool
) -> None:
    out = tmp_path / "cut.safetensors"
    signal_at(step, evaluating=evaluating)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(out, evaluation=ROWS[:8])
    kept = tmp_path / ".cut.training"
    assert stopped.value.__notes__ == [
        f"Step {step} of 20 is kept in {kept}. The same command with --resume (in Python"
        " resume=True) goes on from there."
    ]
    assert (kept / f"checkpoint-{step}" / "complete").exists()
    said: list[str] = []
    resumed = run(out, evaluation=ROWS[:8], resume=True, say=said.append)
    assert f"goes on from step {step} of 20" in said
    assert same(whole, resumed)
    assert not kept.exists()


def test_before_the_training_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Base, "_compute", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(tmp_path / "x.safetensors")
    assert stopped.value.__notes__ == [
        "No step is kept, and nothing is left behind: start it again."
    ]
    assert list(tmp_path.iterdir()) == []


def test_the_second_ctrl_c_does_not_wait(tmp_path: Path, signal_at: At) -> None:
    signal_at(7, times=2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(tmp_path / "x.safetensors")
    assert stopped.value.__notes__[0].startswith("Step 4 of 20 is kept")  # saved before


def test_a_thread_trains_without_handling_signals(tmp_path: Path) -> None:
    made: list[Trained] = []
    thread = threading.Thread(target=lambda: made.append(run(tmp_path / "x.safetensors")))
    thread.start()
    thread.join()
    assert made


def test_what_a_crash_left_is_no_hindrance(tmp_path: Path) -> None:
    work = tmp_path / ".x.training"
    (work / "checkpoint-4").mkdir(parents=True)  # not whole
    (work / "training.json").write_text("")
    (tmp_path / ".x.safetensors.0123456789abcdef.tmp").touch()
    out = tmp_path / "x.safetensors"
    run(out)
    assert list(tmp_path.iterdir()) == [out]
    work.touch()
    with pytest.raises(ConfigError, match=r"out: .*x.training is in the way"):
        run(out)


def test_killed_before_the_first_checkpoint_it_is_resumed_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "x.safetensors", list[str]()
    with monkeypatch.context() as patch:
        patch.setattr("reft_runtime.training.work.WorkFolder.remove", lambda _: None)
        patch.setattr(EditTrainer, "train", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(out)
    run(out, resume=True, say=said.append)
    assert "goes on from step 0 of 20: none was kept" in said


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EditTrainer, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def best_at_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations get worse from step 8 on."""
    merits = iter([1.0, 3.0, 2.0, 1.0, 0.0] * 9)
    monkeypatch.setattr(trainer_module, "merit", lambda *_, **__: next(merits))


def test_patience(tmp_path: Path, best_at_8: None) -> None:
    said: list[str] = []
    settings = TrainSettings(steps=20, batch_size=8, lr=2e-2, dtype="float32", patience=2)
    trained = run(
        tmp_path / "x.safetensors", evaluation=ROWS[:8], settings=settings, say=said.append
    )
    assert trained.intervention.manifest.training["steps"] == 16
    assert said[-1] == (
        "stopped at step 16, after 2 evaluations without an improvement; step 8 of 20 is taken"
    )
    with pytest.raises(ConfigError, match="patience: there are no rows to evaluate on"):
        run(tmp_path / "y.safetensors", settings=settings)


def test_a_resumed_training_stops_at_the_same_step(
    tmp_path: Path, best_at_8: None, signal_at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainSettings(steps=20, batch_size=8, lr=2e-2, dtype="float32", patience=1)
    out = tmp_path / "x.safetensors"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # as if killed while the file is written
        patch.setattr(sys.modules["reft_runtime.training.run"], "write", stop)
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(out, evaluation=ROWS[:8], settings=settings)
    assert stopped.value.__notes__[0].startswith("Step 12 of 20 is kept")
    trained = run(out, evaluation=ROWS[:8], settings=settings, resume=True)
    assert trained.intervention.manifest.training["steps"] == 12


def test_an_evaluation_ends_between_two_batches(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trainer_module.scores(None, _NoEdits(), [None], 1, interrupted=lambda: True)  # type: ignore[arg-type, list-item]


class _NoEdits:
    def canonical(self) -> list[Any]:
        return []


def test_the_command_ends_with_the_signals_status(
    tmp_path: Path, signal_at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, base = jsonl(tmp_path / "data.jsonl", ROWS), folder(tmp_path / "model")
    signal_at(3)
    arguments = ["train", str(data), "--model", str(base), "--steps", "9", "--dtype", "float32"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 130
    assert done.stdout == ""
    assert "reft: stopped.\nStep 3 of 9 is kept in .data.training. The same" in done.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    done = CliRunner().invoke(app, [*arguments, "--resume"])
    assert done.exit_code == 0
    assert "goes on from step 3 of 9" in done.stderr
    assert "Loading the weights: " in done.stderr


def test_sigterm_of_a_process(tmp_path: Path) -> None:
    data, base = jsonl(tmp_path / "data.jsonl", ROWS), folder(tmp_path / "model")
    (out := tmp_path / "out").touch()
    arguments = ["train", str(data), "--model", str(base), "--steps", "100000"]
    process = Forked(reft, str(tmp_path), *arguments, stdout=str(out))
    err = ""
    while "about " not in err:  # told after ten steps
        err += (part := process.output.read(1))
        assert part, err
    process.send_signal(signal.SIGTERM)
    err += process.output.read()
    assert process.end() == 143, err
    assert out.read_text() == ""
    assert "of 100000 is kept in .data.training" in err
    assert "Traceback" not in err

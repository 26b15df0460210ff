"""`--threads` of the commands that compute, and who looks whether the threads get their cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from reft_runtime.engine.loop import EngineLoop
from reft_runtime.errors import ConfigError
from reft_runtime.machine.cores import use_threads
from reft_runtime.training.forward import predict
from server.cli.main import app
from tests.helpers.models import make_core, request
from tests.training.make import base, examples


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ["rows.jsonl", "--out", "a.safetensors"]),
        ("eval", ["rows.jsonl"]),
        ("direction", ["a.txt", "b.txt", "--layer", "1", "--out", "a.safetensors"]),
        ("generate", ["Hello"]),
    ],
)
def test_every_command_that_computes_takes_threads(
    command: str, options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Any] = []

    def record(*_: Any, threads: Any, **__: Any) -> None:
        given.append(threads)
        raise ConfigError("enough")

    for name in ("train", "evaluate", "direction"):
        monkeypatch.setattr(f"reft_runtime.training.{name}", record)
    monkeypatch.setattr("reft_runtime.front.engine.Engine", record)
    monkeypatch.chdir(tmp_path)
    for file in ("a.txt", "b.txt", "rows.jsonl"):
        (tmp_path / file).write_text("A text.\n")
    ended = CliRunner().invoke(app, [command, *options, "--threads", "3"])
    assert given == [3], ended.output
    assert CliRunner().invoke(app, [command, *options, "--threads", "0"]).exit_code != 0


def test_threads_are_used() -> None:
    use_threads(1)
    assert torch.get_num_threads() == 1
    use_threads(2)
    assert torch.get_num_threads() == 2
    with pytest.raises(ConfigError, match="threads must be at least 1, not 0"):
        use_threads(0)
    with pytest.raises(ConfigError, match="threads must be at most 1024, not 1000000"):
        use_threads(10**6)


class Counter:
    """Stands for the watch over steps."""

    steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        yield
        self.steps += 1


def test_the_engines_steps_are_watched() -> None:
    loop = EngineLoop(make_core(), 8, 1000)
    loop.watch = watch = Counter()  # type: ignore[assignment]
    loop.submit(request("1", [1, 2, 3], max_tokens=4), lambda events: None)
    loop.wait_empty()
    loop.close()
    assert watch.steps >= 4


def test_the_steps_of_a_training_are_watched() -> None:
    made = base()
    made.watch = watch = Counter()  # type: ignore[assignment]
    predict(made, [], examples())
    assert watch.steps >= 1

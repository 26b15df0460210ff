"""Steps that wait for cores: said once, with what to do, and never where nobody waits."""

from __future__ import annotations

import logging

import pytest

from reft_runtime.machine.contention import WINDOW_SECONDS, StepWatch


class Clocks:
    """Two clocks that a test turns."""

    wall = cpu = 0.0

    def watch(self, threads: int) -> StepWatch:
        return StepWatch(threads, lambda: self.wall, lambda: self.cpu)

    def steps(self, watch: StepWatch, computed: float, windows: int = 1) -> None:
        """Steps of a second each, of which the thread computes a part."""
        for _ in range(windows * int(WINDOW_SECONDS)):
            with watch.step():
                self.wall += 1
                self.cpu += computed


@pytest.mark.parametrize(
    ("threads", "computed", "warnings"),
    [(2, 0.5, 1), (16, 0.1, 1), (2, 0.85, 0), (2, 1.0, 0), (1, 0.1, 0)],
)
def test_it_is_said_once(
    threads: int, computed: float, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    clocks = Clocks()
    clocks.steps(clocks.watch(threads), computed, windows=3)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == warnings
    assert all(f"--threads {threads // 2}" in line for line in told)


def test_one_slow_step_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clocks = Clocks()
    watch = clocks.watch(2)
    with watch.step():
        clocks.wall += WINDOW_SECONDS / 4  # nothing computed
    clocks.steps(watch, 1.0, windows=2)
    assert not caplog.records


def test_a_step_that_fails_fails() -> None:
    watch = Clocks().watch(2)
    with pytest.raises(ValueError, match="broken"), watch.step():
        raise ValueError("broken")

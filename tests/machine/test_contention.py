"""Steps that wait for cores: said once, fewer threads meanwhile, and never where nobody waits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise

import pytest

from reft_runtime.machine.contention import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    WINDOW_SECONDS,
    StepWatch,
)

STEP = WINDOW_SECONDS / 4


class Clocks:
    """Two clocks that a test turns."""

    wall = cpu = 0.0

    def watch(self, threads: int, use: Callable[[int], None] | None = None) -> StepWatch:
        return StepWatch(threads, use, lambda: self.wall, lambda: self.cpu)

    def steps(self, watch: StepWatch, computed: float, windows: float = 1) -> None:
        """Steps of which the thread computes a part."""
        for _ in range(int(4 * windows)):
            with watch.step():
                self.wall += STEP
                self.cpu += computed * STEP


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


def test_fewer_threads_while_others_want_the_cores(caplog: pytest.LogCaptureFixture) -> None:
    clocks, used = Clocks(), list[int]()
    watch = clocks.watch(4, used.append)
    clocks.steps(watch, 1.0, windows=3)
    assert used == []
    clocks.steps(watch, 0.5)
    assert used == [2]
    clocks.steps(watch, 0.5, FIRST_PAUSE / WINDOW_SECONDS)
    assert used[:2] == [2, 1]
    clocks.steps(watch, 1.0, FIRST_PAUSE / WINDOW_SECONDS)
    assert used == [2, 1, 4]  # and the others are gone
    clocks.steps(watch, 1.0, windows=50)
    assert used == [2, 1, 4]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "from now on 2 compute, and all 4 are tried again" in caplog.text


def test_all_are_tried_more_and_more_seldom() -> None:
    clocks, tried = Clocks(), list[float]()

    def use(threads: int) -> None:
        if threads == 2:
            tried.append(clocks.wall)

    watch = clocks.watch(2, use)
    while clocks.wall < 10 * LONGEST_PAUSE:
        clocks.steps(watch, 0.5, 1 / 4)
    gaps = [b - a - WINDOW_SECONDS for a, b in pairwise(tried)]
    assert gaps[0] == pytest.approx(2 * FIRST_PAUSE, abs=WINDOW_SECONDS)
    assert gaps[-1] == pytest.approx(LONGEST_PAUSE, abs=WINDOW_SECONDS)
    clocks.steps(watch, 1.0, LONGEST_PAUSE)  # they are gone, and come again
    count = len(tried)
    clocks.steps(watch, 0.5, 1 + 1.5 * FIRST_PAUSE / WINDOW_SECONDS)
    assert len(tried) == count + 1


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

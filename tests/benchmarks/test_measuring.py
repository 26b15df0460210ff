from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.measuring import (
    SECONDS,
    Case,
    Figures,
    Ratio,
    interval,
    measure,
    median,
    recorded,
    speed_ratio,
    table,
    timed,
)

SETTING: dict[str, str | int] = {"dtype": "float32", "n": 8}


def cases_of(log: list[tuple[str, int]], *labels: str) -> dict[str, Case]:
    """Cases that write down when they ran; the one at place i takes (i + 1) * round seconds."""

    def make(place: int, label: str) -> Callable[[int], Figures]:
        def case(number: int) -> Figures:
            log.append((label, number))
            return {SECONDS: float((place + 1) * number)}

        return case

    return {label: make(place, label) for place, label in enumerate(labels)}


def test_every_round_has_every_case_in_an_order_of_its_own() -> None:
    log: list[tuple[str, int]] = []
    measure(cases_of(log, "a", "b", "c"), 12, SETTING)
    orders = ["".join(label for label, number in log if number == n) for n in range(13)]
    assert orders[0] == "abc"
    assert {"".join(sorted(order)) for order in orders} == {"abc"}
    assert len(set(orders[1:])) > 3


def test_median_and_ratio_within_the_round() -> None:
    rounds = measure(cases_of([], "a", "b"), 3, SETTING)
    assert [r["b"][SECONDS] for r in rounds] == [2, 4, 6]
    assert median(rounds, "b") == 4
    assert speed_ratio(rounds, "b", "a") == Ratio(0.5, 0.5, 0.5)


def test_an_interrupted_run_continues_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    log: list[tuple[str, int]] = []
    found = cases_of(log, "a", "b")

    def interrupted(number: int) -> Figures:
        if number == 3:
            raise KeyboardInterrupt
        return {SECONDS: 1.0}

    with pytest.raises(KeyboardInterrupt):
        measure({**found, "b": interrupted}, 5, SETTING, path)
    assert len(recorded(path, SETTING, ["a", "b"])) == 2
    log.clear()
    rounds = measure(found, 4, SETTING, path)
    assert [number for label, number in log if label == "a"] == [0, 3, 4]
    assert [r["b"][SECONDS] for r in rounds] == [1, 1, 6, 8]
    log.clear()
    assert measure(found, 4, SETTING, path) == rounds
    assert log == []


def test_another_setting_or_case_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    measure(cases_of([], "a", "b"), 2, SETTING, path)
    assert recorded(path, {**SETTING, "n": 9}, ["a"]) == []
    assert recorded(path, SETTING, ["a", "c"]) == []
    measure(cases_of([], "a"), 1, {**SETTING, "n": 9}, path)
    assert len(recorded(path, SETTING, ["a"])) == 2
    assert len(recorded(path, {**SETTING, "n": 9}, ["a"])) == 1


def test_the_interval_holds_the_median_and_knows_the_spread() -> None:
    near = interval([1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0])
    far = interval([1.0, 1.5, 0.5, 1.0, 1.8, 0.2, 1.0])
    assert near.low <= near.median <= near.high
    assert near.high - near.low < 0.1 < far.high - far.low
    assert interval([2.0, 3.0, 5.0]) == interval([2.0, 3.0, 5.0])


def test_timed_takes_time() -> None:
    seen: list[int] = []
    assert timed(seen.append)(3)[SECONDS] > 0
    assert seen == [3]


def test_table_is_markdown() -> None:
    assert table(["case", "tokens/s"], [["base", 100], ["a longer name", 7]]) == (
        "| case          | tokens/s |\n"
        "| ------------- | -------: |\n"
        "| base          |      100 |\n"
        "| a longer name |        7 |"
    )

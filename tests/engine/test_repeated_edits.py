"""Where the same sequences decode again, what edits them is not looked for again."""

from __future__ import annotations

from typing import Any

import pytest

from reft_runtime.edits.step import StepEdits
from tests.helpers.models import applied, loreft, make_core, request


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each step whose edits were looked for, how many sequences it had."""
    asked: list[int] = []
    own = StepEdits.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[StepEdits], chunks: Any, *rest: Any) -> StepEdits:
        asked.append(len(chunks))
        made: StepEdits = own(cls, chunks, *rest)
        return made

    monkeypatch.setattr(StepEdits, "of", classmethod(of))
    return asked


def test_found_once_and_again_when_a_sequence_comes_or_leaves(asked: list[int]) -> None:
    core = make_core()

    def step(times: int) -> list[int]:
        asked.clear()
        for _ in range(times):
            core.step()
        return asked.copy()

    everywhere = applied(loreft(1, "all"))
    core.add(request("a", [1, 2, 3], everywhere, max_tokens=30))
    core.add(request("b", [4, 5, 6], everywhere, max_tokens=30))
    assert step(1) == [2]  # the prompts
    assert step(6) == [2]
    core.add(request("c", [7, 8], max_tokens=30))
    assert step(2) == [3, 3]  # its prompt, then all decode
    assert step(2) == []
    core.abort("a")
    assert step(2) == [2]
    while not core.idle:
        core.step()
    core.check_integrity()


def test_found_again_where_others_begin_to_act(asked: list[int]) -> None:
    core = make_core()
    window = applied(loreft(1, "decode[2:4]+decode[7:]"))
    core.add(request("a", [1, 2, 3], window, max_tokens=12))
    core.add(request("b", [4, 5, 6], applied(loreft(1, "all")), max_tokens=12))
    looked = []
    while not core.idle:
        asked.clear()
        core.step()
        looked.append(len(asked))
    # The prompts, then the generated tokens 0 to 10; the last one is not run through the model.
    assert looked == [1, *(int(index in (0, 2, 4, 7)) for index in range(11))]

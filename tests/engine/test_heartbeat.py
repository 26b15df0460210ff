"""An engine in a step that may take long is live; one that is stuck is not."""

import threading
from typing import Any

import pytest

from reft_runtime.engine.core import SLOWER, SLOWEST
from reft_runtime.engine.loop import EngineLoop
from tests.helpers.models import make_core, prompt, request, run

HUGE = 70_000_000_000


def age(monkeypatch: pytest.MonkeyPatch, core: Any, seconds: float) -> float:
    """Heartbeat's age in the middle of a step that lasts so long already."""
    inside, go = threading.Event(), threading.Event()
    real = core.runner.run

    def slow(chunks: Any) -> Any:
        inside.set()
        assert go.wait(60)
        return real(chunks)

    monkeypatch.setattr(core.runner, "run", slow)
    loop = EngineLoop(core, 10, 10_000)
    try:
        loop.submit(request("a", prompt(100), max_tokens=1), lambda _: None)
        assert inside.wait(60)
        beat = loop._beat
        with monkeypatch.context() as patch:
            patch.setattr("reft_runtime.engine.loop.time.monotonic", lambda: beat + seconds)
            found = loop.stats().heartbeat_age
        go.set()
        loop.wait_empty()
        loop.check_integrity()
        assert core.allowance == 0
    finally:
        go.set()
        loop.close()
    return found


def test_a_first_step_may_take_what_its_size_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    core._parameters = HUGE
    allowed = 100 * 2 * HUGE / SLOWEST
    assert age(monkeypatch, core, allowed - 1) == 0
    core = make_core()
    core._parameters = HUGE
    assert age(monkeypatch, core, allowed + 11) == pytest.approx(11)


def test_a_small_models_step_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert age(monkeypatch, make_core(), 11) == pytest.approx(11, abs=0.1)


def test_a_step_like_others_may_take_some_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(prefix_cache=False)
    core._parameters = HUGE
    run(core, [request("a", prompt(100), max_tokens=1)])
    core.scheduler.pacer.record(0, 100, 3.0)
    expected = core.scheduler.pacer.expected(0, 100)
    assert expected is not None
    assert age(monkeypatch, core, SLOWER * expected + 7) == pytest.approx(7)


def test_a_step_that_hangs_does_not_keep_an_engine_from_closing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core, told = make_core(), list[Any]()
    inside, go = threading.Event(), threading.Event()

    def hang(chunks: Any) -> None:
        inside.set()
        go.wait(60)

    monkeypatch.setattr(core.runner, "run", hang)
    monkeypatch.setattr("reft_runtime.engine.loop.LEAVE_SECONDS", 0.01)
    monkeypatch.setattr("reft_runtime.engine.loop.HUNG_SECONDS", -1.0)  # as if it hung for long
    loop = EngineLoop(core, 10, 10_000)
    loop.submit(request("a", prompt(9)), told.extend)
    closing = threading.Thread(target=loop.close, daemon=True)
    try:
        assert inside.wait(60)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()
        assert [event.reason for event in told] == ["a step does not end"]
    finally:
        go.set()
        loop._thread.join(60)

import sys
import threading
import time

import pytest

from reft_runtime.text import time_limit as module
from reft_runtime.text.time_limit import TookTooLong, time_limit


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "_watch", module._Watch())  # the other may sleep


def run(seconds: float) -> None:
    """Steps of Python that take so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_each_thread_has_its_own_time() -> None:
    ended: list[str] = []

    def one(name: str, limit: float) -> None:
        try:
            with time_limit(limit):
                run(0.3)
        except TookTooLong:
            name += " late"
        ended.append(name)

    threads = [threading.Thread(target=one, args=each) for each in (("a", 0.02), ("b", 30))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == ["a late", "b"]


def test_what_is_done_in_time_is_left_alone() -> None:
    threads: set[threading.Thread | None] = set()
    for _ in range(3):
        with time_limit(0.02):
            threads.add(module._watch._thread)
        run(0.04)
    assert len(threads) == 1
    end = time.monotonic() + 10
    while module._watch._any.is_set():  # then it sleeps
        assert time.monotonic() < end


def test_a_fork_forgets_the_threads_that_are_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """New ones would get their numbers, the one that looks first of all."""
    interrupted: list[int] = []
    monkeypatch.setattr(module, "_interrupt", interrupted.append)
    module._watch._ends[1] = 0  # its thread, and the one that looks, are not in the fork
    with time_limit(30):
        run(0.04)
    assert not interrupted


def test_an_error_of_the_block_is_its_own() -> None:
    with pytest.raises(KeyError), time_limit(30):
        raise KeyError
    with pytest.raises(TookTooLong), time_limit(0.02):
        run(2)


def test_the_interpreter_has_nothing_left_to_look_for() -> None:
    """Where it had, a traced function of CPython 3.11 would never begin."""

    def traced() -> None:
        sys.settrace(lambda *_: None)
        run(0)
        sys.settrace(None)

    with time_limit(30):
        pass
    thread = threading.Thread(target=traced, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()

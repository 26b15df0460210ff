"""The lock of a tokenizer."""

from __future__ import annotations

import threading
import time

from reft_runtime.text.fifo import FifoLock


def test_who_asks_again_does_not_go_ahead() -> None:
    lock, order = FifoLock(), list[int]()

    def take(number: int) -> None:
        with lock:
            order.append(number)

    def begun(number: int) -> threading.Thread:
        thread = threading.Thread(target=take, args=[number])
        thread.start()
        while len(lock._waiting) < number:
            time.sleep(0.001)
        return thread

    for _ in range(3):
        order.clear()
        with lock:
            threads = [begun(number) for number in (1, 2, 3)]
        with lock:
            order.append(4)
        for thread in threads:
            thread.join()
        assert order == [1, 2, 3, 4]
    assert not lock._taken

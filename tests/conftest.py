"""What all tests need: Triton's interpreter, own cores for workers, a Ctrl-C that counts."""

import os
import signal
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    # Before anything imports Triton, as transformers does where it is installed.
    os.environ["TRITON_INTERPRET"] = "1"

worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if worker and workers and hasattr(os, "sched_setaffinity"):
    # Two processes with two threads each would wait for each other: each has its share of cores.
    cores = sorted(os.sched_getaffinity(0))
    own = cores[int(worker.removeprefix("gw")) :: int(workers)]
    os.sched_setaffinity(0, own or cores)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has it ignored, by all that they start, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

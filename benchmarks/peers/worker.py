"""What a peer's process does: load once, then run jobs that arrive as JSON lines.

Standard library only, because every peer has an environment of its own. The first argument is the
peer's configuration as JSON, the second the file descriptor that answers go to (libraries print to
standard output): one line when the peer is ready, and one for each job.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, TypedDict


class Job(TypedDict):
    """Requests as token ids; request i is answered by exactly `answers[i]` tokens, greedily.

    Adapter i, where the peer has any, goes with request i (modulo their number). `arrivals` are
    seconds from the start of the job; without them all requests are there at once.
    """

    prompts: list[list[int]]
    answers: list[int]
    arrivals: NotRequired[list[float]]


class Result(TypedDict):
    """Seconds until all were answered, the first answer's tokens (a check that it is sane), and,
    from a peer that streams, the seconds of every token since its request's arrival."""

    seconds: float
    tokens: list[int]
    stamps: NotRequired[list[list[float]]]


Run = Callable[[Job], Result]


def serve(load: Callable[[Mapping[str, Any]], Run]) -> None:
    """Load by the configuration, then answer jobs until standard input ends."""
    config, answers = json.loads(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(answers, False)
    with os.fdopen(answers, "w", buffering=1) as out:
        run = load(config)
        print(json.dumps({"ready": True}), file=out)
        for line in sys.stdin:
            try:
                answer: Mapping[str, Any] = run(json.loads(line))
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=out)

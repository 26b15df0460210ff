"""Who is measured, on how many requests at once, and what each of them loads for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import ours
from benchmarks.measuring import SECONDS, Case, Figures
from benchmarks.peers.worker import Run
from benchmarks.stage import Stage
from benchmarks.workload import (
    ANSWER_TOKENS,
    DECODE,
    F3L3,
    L1,
    MIXED_REQUESTS,
    PAPER,
    closed,
    figures,
    mixed,
)

BASE = "base"
FLOOR = "floor: linear layers alone"
VLLM = "vLLM: base"

WARM_UP_TOKENS = 8
WARM_UP_REQUESTS = 4


class Contender(NamedTuple):
    """One line of a table: how it starts for n requests, and the n it is measured for.

    `environment` names the one that a peer needs beside ours: `vllm` or `peers`.
    """

    label: str
    start: Callable[[Stage, str, int], Case]
    least: int = 1
    most: int | None = None
    environment: str | None = None

    @property
    def ours(self) -> bool:
        """Whether this project answers the requests."""
        return self.label.startswith((BASE, "n tasks"))


def _closed(start: Callable[[Stage], Run], at_most: int | None = None) -> Callable[..., Case]:
    """n requests at once; where `at_most` are run, the time is scaled to n."""

    def build(stage: Stage, label: str, n: int) -> Case:
        run, asked = start(stage), min(n, at_most or n)

        def case(number: int) -> Figures:
            answer = ANSWER_TOKENS if number else WARM_UP_TOKENS
            seed = f"{label} {n} {number}"
            job = closed(stage.engine.info.vocab_size, asked, seed, answer)
            return {SECONDS: run(job)["seconds"] * n / asked}

        return case

    return build


def _mixed(start: Callable[[Stage], Run]) -> Callable[..., Case]:
    def build(stage: Stage, label: str, _: int) -> Case:
        run = start(stage)

        def case(number: int) -> Figures:
            requests = MIXED_REQUESTS if number else WARM_UP_REQUESTS
            return figures(run(mixed(stage.engine.info.vocab_size, f"{label} {number}", requests)))

        return case

    return build


def _tasks(setting: str) -> Callable[..., Case]:
    return _closed(lambda stage: ours.at_once(stage.engine, stage.names(setting)))


def _http(setting: str | None) -> Callable[..., Case]:
    return _closed(
        lambda stage: ours.over_http(
            stage.port, stage.engine.info.model, stage.names(setting) if setting else ()
        )
    )


def _peer(name: str, loras: int = 0, at_most: int | None = None) -> Callable[..., Case]:
    return _closed(lambda stage: stage.peer(name, loras).run, at_most)


CLOSED = [
    Contender(BASE, _closed(lambda stage: ours.at_once(stage.engine, ()))),
    Contender(L1, _tasks(L1), least=32),
    Contender(F3L3, _tasks(F3L3), least=32),
    Contender(PAPER, _tasks(PAPER)),
    Contender(DECODE, _tasks(DECODE), least=32),
    Contender(f"{BASE}, over HTTP", _http(None)),
    Contender(f"{PAPER}, over HTTP", _http(PAPER), least=32),
    Contender(FLOOR, _peer("linear_floor")),
    Contender("transformers: generate, static batch", _peer("transformers_generate")),
    Contender("transformers: continuous batching", _peer("transformers_continuous"), least=8),
    Contender(VLLM, _peer("vllm_cpu"), environment="vllm"),
    Contender("vLLM: 8 LoRAs", _peer("vllm_cpu", 8), least=32, environment="vllm"),
    Contender("vLLM: 32 LoRAs", _peer("vllm_cpu", 32), least=32, environment="vllm"),
    Contender(
        "PEFT: n LoRAs, static batch", _peer("peft_lora", 8), least=8, most=8, environment="peers"
    ),
    Contender("pyreft, one after another", _peer("pyreft_serial", at_most=1), environment="peers"),
]
"""n requests at once. What says nothing new at an n is left out there: seven rounds take long."""

MIXED = [
    Contender(BASE, _mixed(lambda stage: ours.streamed(stage.engine, ()))),
    Contender(PAPER, _mixed(lambda stage: ours.streamed(stage.engine, stage.names(PAPER)))),
    Contender(VLLM, _mixed(lambda stage: stage.peer("vllm_cpu").run), environment="vllm"),
]
"""Requests of all lengths that arrive one by one."""

"""The lines of the throughput tables: which engine answers, and for how many requests at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import reft_runs
from benchmarks.measuring import SECONDS, Case, Figures
from benchmarks.peers.worker import Run
from benchmarks.testbed import MAX_TASKS, Testbed
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
    patterns,
    schemas,
)
from reft_runtime.sampling import Grammar

BASE = "base"
SCHEMAS = "base, each JSON of its own schema"
PATTERNS = "base, each of its own pattern"
FLOOR = "floor: linear layers alone"
VLLM = "vLLM: base"

WARM_UP_TOKENS = 8
WARM_UP_REQUESTS = 4


class ThroughputCase(NamedTuple):
    """One line of a table: how it starts for n requests, and the numbers n it is measured for.

    `environment` names the Python environment that a peer needs: `vllm`, `peers`, or None for
    this one.
    """

    label: str
    start: Callable[[Testbed, str, int], Case]
    least: int = 1
    most: int | None = None
    environment: str | None = None

    @property
    def ours(self) -> bool:
        """Whether this project answers the requests."""
        return self.label.startswith((BASE, "n tasks"))


def _closed(start: Callable[[Testbed], Run], at_most: int | None = None) -> Callable[..., Case]:
    """Cases of n requests at once; of more than `at_most` only those run, and time is scaled."""

    def build(testbed: Testbed, label: str, n: int) -> Case:
        run, asked = start(testbed), min(n, at_most or n)

        def case(number: int) -> Figures:
            answer = ANSWER_TOKENS if number else WARM_UP_TOKENS
            seed = f"{label} {n} {number}"
            job = closed(testbed.engine.info.vocab_size, asked, seed, answer)
            return {SECONDS: run(job)["seconds"] * n / asked}

        return case

    return build


def _mixed(start: Callable[[Testbed], Run]) -> Callable[..., Case]:
    def build(testbed: Testbed, label: str, _: int) -> Case:
        run = start(testbed)

        def case(number: int) -> Figures:
            requests = MIXED_REQUESTS if number else WARM_UP_REQUESTS
            return figures(
                run(mixed(testbed.engine.info.vocab_size, f"{label} {number}", requests))
            )

        return case

    return build


def _tasks(setting: str) -> Callable[..., Case]:
    return _closed(lambda testbed: reft_runs.at_once(testbed.engine, testbed.names(setting)))


def _formed(grammars: Callable[[int], list[Grammar]]) -> Callable[..., Case]:
    return _closed(lambda testbed: reft_runs.at_once(testbed.engine, (), grammars(MAX_TASKS)))


def _http(setting: str | None) -> Callable[..., Case]:
    return _closed(
        lambda testbed: reft_runs.over_http(
            testbed.port, testbed.engine.info.model, testbed.names(setting) if setting else ()
        )
    )


def _peer(name: str, loras: int = 0, at_most: int | None = None) -> Callable[..., Case]:
    return _closed(lambda testbed: testbed.peer(name, loras).run, at_most)


CLOSED = [
    ThroughputCase(BASE, _closed(lambda testbed: reft_runs.at_once(testbed.engine, ()))),
    ThroughputCase(L1, _tasks(L1), least=32),
    ThroughputCase(F3L3, _tasks(F3L3), least=32),
    ThroughputCase(PAPER, _tasks(PAPER)),
    ThroughputCase(DECODE, _tasks(DECODE), least=32),
    ThroughputCase(SCHEMAS, _formed(schemas), least=32),
    ThroughputCase(PATTERNS, _formed(patterns), least=32),
    ThroughputCase(f"{BASE}, over HTTP", _http(None)),
    ThroughputCase(f"{PAPER}, over HTTP", _http(PAPER), least=32),
    ThroughputCase(FLOOR, _peer("linear_floor")),
    ThroughputCase("transformers: generate, static batch", _peer("transformers_generate")),
    ThroughputCase("transformers: continuous batching", _peer("transformers_continuous"), least=8),
    ThroughputCase(VLLM, _peer("vllm_cpu"), environment="vllm"),
    ThroughputCase("vLLM: 8 LoRAs", _peer("vllm_cpu", 8), least=32, environment="vllm"),
    ThroughputCase("vLLM: 32 LoRAs", _peer("vllm_cpu", 32), least=32, environment="vllm"),
    ThroughputCase(
        "PEFT: n LoRAs, static batch", _peer("peft_lora", 8), least=8, most=8, environment="peers"
    ),
    ThroughputCase(
        "pyreft, one after another", _peer("pyreft_serial", at_most=1), environment="peers"
    ),
]
"""n requests at once. What says nothing new at an n is left out there: seven rounds take long."""

MIXED = [
    ThroughputCase(BASE, _mixed(lambda testbed: reft_runs.streamed(testbed.engine, ()))),
    ThroughputCase(
        PAPER, _mixed(lambda testbed: reft_runs.streamed(testbed.engine, testbed.names(PAPER)))
    ),
    ThroughputCase(VLLM, _mixed(lambda testbed: testbed.peer("vllm_cpu").run), environment="vllm"),
]
"""Requests of all lengths that arrive one by one."""

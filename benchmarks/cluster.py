"""A cluster of two replicas beside two servers by themselves, all with one thread, on one machine.

First 100 requests, ten prompts to each of ten interventions, to the cluster and to one server:
whether the answers are equal, and how many requests after an intervention's first one met the
replica that had it. Then, in alternating rounds, streams at the cluster's address, and at the two
servers, each with the interventions that one of the replicas has.

    python -m benchmarks.cluster --rounds 5 --out docs/measurements/cluster.json
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml

from benchmarks.measuring import SECONDS, Case, Figures, measure, median, speed_ratio, table
from benchmarks.serving import ask_all, request_bytes, served
from benchmarks.workload import random_tokens

NAMES = 10
PROMPTS = 10
PROMPT_TOKENS, ANSWER_TOKENS = 32, 64
STREAMS = 16
"""Streams at the same time: half of them at each server."""

REQUESTS = 64
VOCABULARY = 49_000

CLUSTER, SERVERS = "cluster", "two servers"
FIRST = "first"
"""Seconds until an answer of one token is whole, with nothing else under way."""


@contextmanager
def running(settings: dict[str, Any], place: Path) -> Iterator[str]:
    """The address of a cluster of two replicas, for the time of the block."""
    config, log = place / "cluster.yaml", place / "cluster.log"
    shared = {**settings, "state_dir": str(place / "state"), "port": 0}
    config.write_text(yaml.safe_dump({"settings": shared, "replicas": 2}))
    command = [sys.executable, "-m", "server.cli.main", "cluster", "up", str(config)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        while not (found := re.search(r"Serving at (\S+)", log.read_text())):
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.2)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def answers(url: str, names: list[str]) -> list[str]:
    """The texts that an address answers: ten prompts to each name, some at the same time."""
    prompts = [f"{number}. Tell me about the sea." for number in range(PROMPTS)]
    asked = [(name, prompt) for prompt in prompts for name in names]
    with httpx.Client(base_url=url, timeout=600) as client:

        def ask(pair: tuple[str, str]) -> str:
            message = {"role": "user", "content": pair[1]}
            body = {"model": pair[0], "temperature": 0, "max_tokens": 24, "messages": [message]}
            answer = client.post("/v1/chat/completions", json=body).raise_for_status()
            text: str = answer.json()["choices"][0]["message"]["content"]
            return text

        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(ask, asked))


def by_replica(url: str) -> dict[str, dict[str, int]]:
    """How many requests each replica had, by intervention."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("reft:intervention_requests_total{"):
            labels, _, value = line.rpartition(" ")
            name, replica = re.findall(r'="([^"]*)"', labels)
            found[name][replica] = int(float(value))
    return found


def requests(names: list[str], number: int) -> list[bytes]:
    """Streamed requests of one round, to the names in turn."""
    rng = random.Random(number)
    return [
        request_bytes(
            names[i % len(names)],
            random_tokens(rng, VOCABULARY, PROMPT_TOKENS),
            stream=True,
            answer=ANSWER_TOKENS,
        )
        for i in range(REQUESTS)
    ]


def one_token(port: int, name: str, number: int) -> float:
    """The median of the seconds that an answer of one token takes."""
    rng, taken = random.Random(number), []
    for _ in range(15):
        prompt = random_tokens(rng, VOCABULARY, 4)
        start = time.perf_counter()
        ask_all(port, [request_bytes(name, prompt, stream=False, answer=1)], 1)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def case(places: list[tuple[int, list[str]]]) -> Case:
    """A case that sends streams to some ports at the same time, to each those of its names."""

    def run(number: int) -> Figures:
        def ask(place: tuple[int, list[str]]) -> list[bytes]:
            port, names = place
            share = REQUESTS // len(places)
            return ask_all(port, requests(names, number)[:share], STREAMS // len(places))

        start = time.perf_counter()
        with ThreadPoolExecutor(len(places)) as threads:
            answered = [one for all_ in threads.map(ask, places) for one in all_]
        seconds = time.perf_counter() - start
        expected = b'"completion_tokens":%d' % ANSWER_TOKENS
        assert all(expected in one for one in answered), answered[0][:500]
        return {SECONDS: seconds, FIRST: one_token(places[0][0], places[0][1][0], number)}

    return run


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Keep the raw figures in this file.")] = None,
) -> None:
    """Print what was equal, what met its replica, and throughputs with their ratio."""
    place = Path(tempfile.mkdtemp())
    files = place / "interventions"
    files.mkdir()
    shipped = sorted(Path("interventions").glob("*.safetensors"))
    names = [f"task{number}" for number in range(NAMES)]
    for number, name in enumerate(names):
        shutil.copy(shipped[number % len(shipped)], files / f"{name}.safetensors")
    settings = {"interventions": str(files), "threads": 1, "max_model_len": 512, "kv_tokens": 8192}
    options = {**settings, "interventions": [str(files)], "model": "demo", "dtype": "float32"}
    try:
        with (
            served("demo", "float32", settings) as one,
            served("demo", "float32", settings) as two,
            running(options, place) as url,
        ):
            equal = answers(one.url, names) == answers(url, names)
            met = by_replica(url)
            again = sum(sum(had.values()) - 1 for had in met.values())
            own = sum(max(had.values()) - 1 for had in met.values())
            print(f"answers equal: {equal}; met their replica: {own} of {again}")
            groups: dict[str, list[str]] = defaultdict(list)
            for name, had in met.items():
                groups[max(had, key=lambda replica: had[replica])].append(name)
            least = min(len(group) for group in groups.values())
            assert len(groups) == 2, "all interventions met one replica: run it again"
            here, there = (group[:least] for group in groups.values())
            paired = [name for pair in zip(here, there, strict=True) for name in pair]
            port = int(url.rpartition(":")[2])
            cases = {
                CLUSTER: case([(port, paired)]),
                SERVERS: case([(one.port, here), (two.port, there)]),
            }
            setting: dict[str, str | int] = {
                "benchmark": "cluster",
                "model": "SmolLM2-135M-Instruct",
                "dtype": "float32",
                "streams": STREAMS,
                "equal": str(equal),
                "met": f"{own} of {again}",
            }
            taken = measure(cases, rounds, setting, out)
    finally:
        shutil.rmtree(place)
    rows = [
        (
            label,
            round(REQUESTS * ANSWER_TOKENS / median(taken, label)),
            "" if label == SERVERS else speed_ratio(taken, label, SERVERS),
            round(1000 * median(taken, label, FIRST), 1),
        )
        for label in cases
    ]
    print(table(("", "tokens/s", "ratio", "one token, ms"), rows))
    print(json.dumps(setting))


if __name__ == "__main__":
    typer.run(main)

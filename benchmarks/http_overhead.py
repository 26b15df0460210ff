"""What HTTP costs: `reft serve` in a process of its own beside the engine used in process.

Every round runs requests of 64 random prompt tokens and 64 answered ones, n at any time (a closed
loop: who has its answer sends its next request), at least 96 in all: through `Engine.generate`,
then over HTTP as server-sent events and as whole answers. The ratio is that of throughputs, whole
run with prefill. The client shares the machine's cores with the server, so it does no more than
read sockets, every 5 ms; answers are checked after the clock has stopped.

    python -m benchmarks.http_overhead --concurrency 32,256 --rounds 7
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.device import name_of
from benchmarks.measuring import SECONDS, Case, Figures, measure, median, speed_ratio, table, timed
from benchmarks.serving import Served, ask_all, request_bytes, served
from benchmarks.workload import random_tokens
from reft_runtime import Engine, SamplingParams

PROMPT_TOKENS = 64
ANSWER_TOKENS = 64
MAX_MODEL_LEN = 512
REQUESTS = 96
"""A run has at least this many requests, and as many for one client as for another."""

IN_PROCESS, STREAMED, WHOLE = "in process", "HTTP, streamed", "HTTP, whole"
CLIENT, SERVER, LOOP = "client CPU", "server CPU", "event loop CPU per token"


def over_http(server: Served, clients: int, requests_of: Callable[[int], list[bytes]]) -> Case:
    """A case whose figures are seconds, the cores that client and server kept busy, and `LOOP`."""

    def case(number: int) -> Figures:
        requests = requests_of(number)
        before, loop = server.process.cpu_times(), loop_seconds(server)
        own, start = time.process_time(), time.perf_counter()
        answers = ask_all(server.port, requests, clients)
        seconds = time.perf_counter() - start
        own = time.process_time() - own
        after = server.process.cpu_times()
        busy = after.user + after.system - before.user - before.system
        expected = b'"completion_tokens":%d' % ANSWER_TOKENS
        assert all(expected in answer for answer in answers), answers[0][:500]
        loop = (loop_seconds(server) - loop) / (len(requests) * ANSWER_TOKENS)
        return {SECONDS: seconds, CLIENT: own / seconds, SERVER: busy / seconds, LOOP: loop}

    return case


def loop_seconds(server: Served) -> float:
    """Seconds that the server's event loop, its main thread, was on a core so far."""
    main = next(one for one in server.process.threads() if one.id == server.process.pid)
    return float(main.user_time + main.system_time)


def rows_of(
    model: str, device: str, dtype: str, n: int, rounds: int, out: Path | None
) -> list[tuple[object, ...]]:
    """The lines of the table for one dtype and n requests at a time."""
    count = n * math.ceil(REQUESTS / n)
    tokens = max(n * (PROMPT_TOKENS + ANSWER_TOKENS + 32), 2 * MAX_MODEL_LEN)
    limits = {
        "device": device,
        "max_running": n,
        "max_model_len": MAX_MODEL_LEN,
        "kv_tokens": tokens,
    }
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    with (
        Engine(
            model,
            device=device,
            dtype=dtype,
            max_running=n,
            max_model_len=MAX_MODEL_LEN,
            kv_tokens=tokens,
        ) as engine,
        served(model, dtype, limits) as server,
    ):
        name, vocabulary = engine.info.model, engine.info.vocab_size

        def prompts(label: str, number: int) -> list[list[int]]:
            rng = random.Random(f"{label} {number}")  # new to every prefix cache
            return [random_tokens(rng, vocabulary, PROMPT_TOKENS) for _ in range(count)]

        def requests(label: str) -> Callable[[int], list[bytes]]:
            return lambda number: [
                request_bytes(name, prompt, stream=label == STREAMED, answer=ANSWER_TOKENS)
                for prompt in prompts(label, number)
            ]

        def in_process(number: int) -> None:
            answers = engine.generate(prompts(IN_PROCESS, number), sampling, progress=False)
            assert all(len(answer.tokens) == ANSWER_TOKENS for answer in answers)

        cases = {
            IN_PROCESS: timed(in_process),
            STREAMED: over_http(server, n, requests(STREAMED)),
            WHOLE: over_http(server, n, requests(WHOLE)),
        }
        setting: dict[str, str | int] = {
            "benchmark": "http",
            "model": name,
            "dtype": dtype,
            "n": n,
        }
        if device != "cpu":
            setting["device"] = name_of(torch.device(device))
        taken = measure(cases, rounds, setting, out)
    lines: list[tuple[object, ...]] = []
    for label in cases:
        rate = round(count * ANSWER_TOKENS / median(taken, label))
        ratio: object = "" if label == IN_PROCESS else speed_ratio(taken, label, IN_PROCESS)
        cores: list[object] = ["", "", ""]
        if label != IN_PROCESS:
            cores = [f"{median(taken, label, figure):.2f}" for figure in (SERVER, CLIENT)]
            cores.append(round(1e6 * median(taken, label, LOOP)))
        lines.append((dtype, n, label, rate, ratio, *cores))
    return lines


def main(
    model: Annotated[str, typer.Option(help="demo, a folder, or a hub id.")] = "demo",
    device: Annotated[str, typer.Option(help="As for `reft serve`.")] = "cpu",
    dtypes: Annotated[
        str, typer.Option(help="Number formats, comma-separated.")
    ] = "float32,bfloat16",
    concurrency: Annotated[
        str, typer.Option(help="Numbers of requests at a time, comma-separated.")
    ] = "32,256",
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[
        Path | None, typer.Option(help="Keep the raw figures in this JSON file.")
    ] = None,
) -> None:
    """Print medians in generated tokens per second, and ratios to in-process of the same round."""
    lines = []
    for dtype in dtypes.split(","):
        for n in map(int, concurrency.split(",")):
            lines += rows_of(model, device, dtype, n, rounds, out)
    header: tuple[str, ...] = ("dtype", "n", "case", "tokens/s", "over in process")
    header += ("server cores", "client cores", "event loop, us/token")
    print(f"{os.cpu_count()} cores, {rounds} rounds")
    print(table(header, lines))


if __name__ == "__main__":
    typer.run(main)

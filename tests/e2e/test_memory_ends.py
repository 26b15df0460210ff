"""A real server whose address space ends while it is at work: `prlimit --as`, not a patch."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.helpers.forked import Forked, reft
from tests.helpers.models import tiny
from tests.helpers.tokenizer import tiny_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")

LONGEST = 4096
MIB = 2**20
STREAMS = 4
MORE = {"float32": (1, 16, 100), "bfloat16": (16,)}
"""MiB that a server may still map, one case after the other, by the model's dtype."""
ANSWER = 100


@pytest.fixture(params=MORE)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int, str]]:
    """Address, process id and dtype of a random model's server.

    Its tokens take 16 KiB in float32.
    """
    folder = tmp_path_factory.mktemp("model")
    model = tiny(
        "llama",
        vocab_size=320,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=LONGEST,
    )
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["serve", "--model", str(folder)]
    command += ["--interventions", str(tmp_path_factory.mktemp("none"))]
    command += ["--port", str(port), "--kv-tokens", "32768", "--threads", "1"]
    command += ["--dtype", request.param, "--first-token-timeout", "60"]
    process = Forked(reft, str(folder), *command)
    process.read_on()
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.pid:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield url, process.pid, request.param
        assert process.pid, process.log[-40:]
    finally:
        process.send_signal(signal.SIGTERM)
        process.end()


def limit(pid: int, more: int | None) -> None:
    """Let the process map `more` bytes beyond what it has now; None: as much as it likes."""
    endless = resource.RLIM_INFINITY
    soft = endless if more is None else psutil.Process(pid).memory_info().vms + more
    resource.prlimit(pid, resource.RLIMIT_AS, (soft, endless))


def body(tokens: int, max_tokens: int, **fields: Any) -> dict[str, Any]:
    prompt = [3 + (7 * i + tokens) % 300 for i in range(tokens)]
    common = {"model": "", "temperature": 0, "ignore_eos": True, "max_tokens": max_tokens}
    return {**common, "prompt": prompt, **fields}


async def stream(
    client: httpx.AsyncClient, asked: dict[str, Any], begun: asyncio.Semaphore | None = None
) -> str:
    async with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as got:
        assert got.status_code == 200
        lines: list[str] = []
        async for line in got.aiter_lines():
            if begun and not lines:
                begun.release()
            if line:
                lines.append(line)
    assert lines.pop() == "data: [DONE]", lines[-3:]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert not any("error" in event for event in events)
    return "".join(choice["text"] for event in events for choice in event["choices"])


async def test_memory_that_ends_costs_the_newest(served: tuple[str, int, str]) -> None:
    url, pid, dtype = served
    exact = dtype == "float32"  # answers are the same in any batch
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        long = [body(1500 + 300 * i, 4, model=model) for i in range(6)]

        async def one_by_one() -> list[dict[str, Any]]:
            return [(await client.post("/v1/completions", json=each)).json() for each in long]

        wanted = await one_by_one() if exact else []
        # Their rows have room for the whole answer, so that they need nothing more.
        short = [body(140 + i, ANSWER, model=model) for i in range(STREAMS)]
        # Steps of their size have been made once, so that torch maps no more for the first of them.
        alone = await asyncio.gather(*(stream(client, each) for each in short))
        refused = 0
        for more in MORE[dtype]:
            begun = asyncio.Semaphore(0)
            streams = [asyncio.ensure_future(stream(client, each, begun)) for each in short]
            for _ in streams:
                await begun.acquire()
            limit(pid, more * MIB)
            try:
                answers = await asyncio.gather(
                    *(client.post("/v1/completions", json=each) for each in long)
                )
            finally:
                limit(pid, None)
            for place, answer in enumerate(answers):
                if answer.status_code == 200:
                    assert not exact or answer.json()["choices"] == wanted[place]["choices"]
                    continue
                assert answer.status_code == 503, answer.text
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "overloaded"
                refused += 1
            assert (await client.get("/livez")).status_code == 200
            texts = await asyncio.gather(*streams)
            assert not exact or texts == alone
        assert refused
        if exact:
            again = [answer["choices"] for answer in await one_by_one()]
            assert again == [answer["choices"] for answer in wanted]
        # Lengths that it has not seen yet.
        for tokens in range(700, 705):
            new = await client.post("/v1/completions", json=body(tokens, 2, model=model))
            assert new.status_code == 200

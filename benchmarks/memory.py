"""Peak resident memory of a server beside what its banner announces: prompts alone and at once.

python -m benchmarks.memory --out build/memory.json
"""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.serving import served

LENGTHS = (1_000, 4_000, 8_000)
AT_ONCE = 16
BANNER = re.compile(r"at most ([0-9.]+) GiB of memory")
ALLOWED = 1.1
"""A peak may be this many times what the banner announces."""


def announced(banner: str) -> float:
    """The memory in GiB that a server's banner announces, 0 where it says none."""
    found = BANNER.search(banner)
    return float(found[1]) if found else 0.0


def peak(pid: int) -> float:
    """The largest resident memory of a process since `forget`, in GiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 2**20


def forget(pid: int) -> None:
    """Let `peak` count from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def ask(url: str, model: str, tokens: int, seed: int) -> None:
    """Send one prompt that begins as no other does, and read its short answer."""
    prompt = random.Random(seed).choices(range(100, 40_000), k=tokens)
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, timeout=None).raise_for_status()


def run(
    out: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
    model: Annotated[str, typer.Option(help="Base model.")] = "demo",
    dtypes: Annotated[str, typer.Option(help="Number formats, with commas.")] = "float32,bfloat16",
    kv_tokens: Annotated[str, typer.Option(help="Cache sizes, with commas.")] = "8208,32768",
    at_once: Annotated[int, typer.Option(help="Prompts at once.")] = AT_ONCE,
) -> None:
    """Measure, print a table, and fail where a peak exceeds what is announced by a tenth."""
    rows: list[dict[str, Any]] = []
    seed = 0
    for dtype in dtypes.split(","):
        for size in kv_tokens.split(","):
            timeouts = dict.fromkeys(("first_token_timeout", "request_timeout"), 86400)
            with served(model, dtype, {"kv_tokens": size, **timeouts}) as server:
                url, pid, gib = server.url, server.process.pid, announced(server.banner)
                name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
                print(f"{dtype}, {size} tokens of cache: {gib:.2f} GiB announced", flush=True)
                for count in (1, at_once):
                    for length in LENGTHS:
                        forget(pid)
                        with ThreadPoolExecutor(count) as pool:
                            asked = [
                                pool.submit(ask, url, name, length, seed + i) for i in range(count)
                            ]
                            for each in asked:
                                each.result()
                        seed += count
                        rows.append(
                            {
                                "dtype": dtype,
                                "kv_tokens": int(size),
                                "announced": gib,
                                "prompts": count,
                                "tokens": length,
                                "peak": round(peak(pid), 3),
                            }
                        )
                        print(f"  {count} x {length}: {rows[-1]['peak']:.2f} GiB", flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n")
    beyond = [row for row in rows if row["peak"] > ALLOWED * row["announced"]]
    if beyond:
        raise SystemExit(f"More than announced: {beyond}")


if __name__ == "__main__":
    typer.run(run)

"""What the README says of speed is what the raw figures give."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import layouts
from benchmarks.measuring import Round, load, median, speed_ratio

ROOT = Path(__file__).parents[1]
README = " ".join((ROOT / "README.md").read_text().split())
GROUPS = load(ROOT / "docs/measurements/throughput.json")
ANSWER_TOKENS = 64
TASKS = "n tasks: all layers, r=8, f7+l7"

ROWS = {
    "base": "base",
    "n tasks: 4 layers, r=4, l1": "n different tasks: 4 layers, r=4, l1",
    "n tasks: 4 layers, r=4, f3+l3": "n different tasks: 4 layers, r=4, f3+l3",
    TASKS: "n different tasks: all layers, r=8, f7+l7",
    "n tasks: all layers, r=8, decode": "n different tasks: all layers, r=8, decoded tokens",
    "base, over HTTP": "base, over HTTP",
    f"{TASKS}, over HTTP": "the same over HTTP",
    "floor: linear layers alone": "floor: the linear layers alone",
    "transformers: generate, static batch": "transformers: generate, static batch",
    "transformers: continuous batching": "transformers: continuous batching",
    "vLLM: base": "vLLM, base",
    "vLLM: 8 LoRAs": "vLLM, 8 different LoRAs, r=8",
    "vLLM: 32 LoRAs": "vLLM, 32 different LoRAs, r=8",
    "pyreft, one after another": "pyreft, one after another",
    "PEFT: n LoRAs, static batch": "PEFT: n LoRAs, static batch",
}


def rounds(dtype: str, workload: str, n: int | None = None) -> list[Round]:
    """Those of a table."""
    (found,) = (
        group["rounds"]
        for group in GROUPS
        if group["setting"]["dtype"] == dtype
        and group["setting"]["workload"] == workload
        and group["setting"].get("n") == n
    )
    return found


def cell(taken: list[Round], label: str, n: int) -> str:
    if label not in taken[0]:
        return ""
    speed = f"{n * ANSWER_TOKENS / median(taken, label):.0f}"
    if label == "base":
        return speed
    _, low, high = speed_ratio(taken, label, "base")
    return f"{speed} ({low:.2f} to {high:.2f})"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables(dtype: str) -> None:
    columns = {n: rounds(dtype, "closed", n) for n in (1, 8, 32)}
    assert f"| {dtype}, {len(columns[1])} rounds | n=1 | n=8 | n=32 |" in README
    for label in {label: None for taken in columns.values() for label in taken[0]}:
        cells = [cell(taken, label, n) for n, taken in columns.items()]
        row = f"| {ROWS[label]} | {' | '.join(cells)} |"
        assert " ".join(row.split()) in README


def test_ratios() -> None:
    for dtype, n, label, peer in (
        ("float32", 32, "base", "vLLM: base"),
        ("bfloat16", 32, "base", "vLLM: base"),
        ("float32", 32, TASKS, "vLLM: 32 LoRAs"),
        ("float32", 32, TASKS, "base"),
        ("bfloat16", 32, TASKS, "base"),
        ("float32", 8, TASKS, "base"),
    ):
        ratio = speed_ratio(rounds(dtype, "closed", n), label, peer)
        digits = 1 if "LoRAs" in peer else 2
        middle, low, high = (f"{value:.{digits}f}" for value in ratio)
        assert f"{middle} ({low} to {high})" in README, (dtype, n, label, peer, ratio)


def test_mixed_load() -> None:
    for dtype in ("float32", "bfloat16"):
        taken = rounds(dtype, "mixed")
        ratio, low, high = speed_ratio(taken, "base", "vLLM: base")
        assert f"{ratio:.2f}" in README
        assert f"({low:.2f} to {high:.2f})" in README
        for key, digits in (("ttft_median", 1), ("ttft_p95", 1), ("gap_p95", 2)):
            ours, theirs = (
                f"{median(taken, label, key):.{digits}f}" for label in ("base", "vLLM: base")
            )
            assert f"{ours} s for {theirs} s" in README or f"{ours} s for its {theirs} s" in README


def test_quality() -> None:
    text = (ROOT / "docs/training.md").read_text()
    runs = [
        json.loads(line)
        for line in (ROOT / "docs/measurements/quality.jsonl").read_text().splitlines()
    ]
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for entry in runs:
        key = entry["run"]["task"], entry["run"]["method"], entry["run"]["rows"]
        found.setdefault(key, []).append(entry["outcome"])
    for method, label in (
        ("base", "base"),
        ("LoReFT l1", "LoReFT, `l1`"),
        ("LoReFT f1+l1", "LoReFT, `f1+l1`"),
        ("pyreft l1", "the same by pyreft's modules, `l1`"),
        ("LoRA r=8", "LoRA, r=8 on all linear layers"),
    ):
        rows = 0 if method == "base" else 2000
        cells = [accuracy(found.get((task, method, rows), [])) for task in ("sst2", "trec")]
        line = f"| {label} | {' | '.join(cells)} | "
        if rows:
            outcomes = found["trec", method, rows]
            seconds = statistics.mean(outcome["seconds"] for outcome in outcomes)
            line += f"{outcomes[0]['parameters']:,} | {outcomes[-1]['size_bytes'] / 1000:,.0f} | "
            line += f"{seconds:.0f} |"
        assert line in text


def test_table_of_layouts() -> None:
    text = (ROOT / "docs/training.md").read_text()
    finished = layouts.finished(ROOT / "docs/measurements/layouts.jsonl")
    assert layouts.table(finished.outcomes) in text


def accuracy(outcomes: list[dict[str, float]]) -> str:
    values = [100 * outcome["accuracy"] for outcome in outcomes]
    if len(values) > 1:
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    return f"{values[0]:.1f}" if values else ""


def test_tables_of_a_device() -> None:
    text = (ROOT / "docs/measurements/README.md").read_text()
    lines = text.partition("## On an H100")[2].splitlines()
    for group in load(ROOT / "docs/measurements/device.json"):
        taken, n = group["rounds"], group["setting"].get("n")
        for label in taken[0]:
            step, prompts = median(taken, label, "step"), median(taken, label, "prompts")
            ratio = speed_ratio(taken, label, "base", "seconds" if n else "prompts")
            told = "" if label == "base" else str(ratio)
            if n:
                line = f"| {n} | {label} | {1000 * step:.2f} | {int(n) / step:.0f} | {told} |"
            else:
                line = f"| {label} | {1000 * prompts:.0f} | {told} |"
            assert line in lines

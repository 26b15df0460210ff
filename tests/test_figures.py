"""What the README says of speed is what the raw figures give."""

from __future__ import annotations

import json
import statistics
from itertools import product
from pathlib import Path

import pytest

from benchmarks import layouts
from benchmarks.measuring import Round, load, median, speed_ratio

ROOT = Path(__file__).parents[1]
README = " ".join((ROOT / "README.md").read_text().split())
MEASURED = (ROOT / "docs/measurements/README.md").read_text()
GROUPS = load(ROOT / "docs/measurements/throughput.json")
ANSWER_TOKENS = 64
TASKS = "n tasks: all layers, r=8, f7+l7"

DECODED = "n tasks: all layers, r=8, decode"

ROWS = {
    "base": "base",
    TASKS: "n different tasks: all layers, r=8, f7+l7",
    DECODED: "n different tasks: all layers, r=8, decoded tokens",
    "base, each JSON of its own schema": "base, each answer JSON of its own schema",
    "base, each of its own pattern": "base, each answer of its own pattern",
    "base, over HTTP": "base, over HTTP",
    f"{TASKS}, over HTTP": "the same over HTTP",
    "floor: linear layers alone": "floor: the linear layers alone",
    "transformers: generate, static batch": "transformers: generate, static batch",
    "vLLM: base": "vLLM, base",
    "vLLM: 32 LoRAs": "vLLM, 32 different LoRAs, r=8",
}
SHORT = {
    "base": "our base",
    TASKS: "ours, n different tasks",
    "vLLM: base": "vLLM, base",
    "vLLM: 32 LoRAs": "vLLM, 32 different LoRAs",
    "floor: linear layers alone": "the linear layers alone",
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


def test_table_of_the_readme() -> None:
    for label, name in SHORT.items():
        cells = []
        for dtype, n in product(("bfloat16", "float32"), (1, 8, 32)):
            taken = rounds(dtype, "closed", n)
            speed = f"{n * ANSWER_TOKENS / median(taken, label):.0f}" if label in taken[0] else ""
            told = speed and label != "base"
            cells.append(
                f"{speed} ({speed_ratio(taken, label, 'base').median:.2f})" if told else speed
            )
        assert " ".join(f"| {name} | {' | '.join(cells)} |".split()) in README


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables(dtype: str) -> None:
    columns = {n: rounds(dtype, "closed", n) for n in (1, 8, 32)}
    assert f"| {dtype}, {len(columns[1])} rounds | n=1 | n=8 | n=32 |" in MEASURED
    for label in {label: None for taken in columns.values() for label in taken[0]}:
        cells = [cell(taken, label, n) for n, taken in columns.items()]
        assert f"| {ROWS[label]} | {' | '.join(cells)} |" in MEASURED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ratios(dtype: str) -> None:
    for label, reference in (
        ("base", "vLLM: base"),
        (TASKS, "vLLM: 32 LoRAs"),
        (TASKS, "base"),
        (DECODED, "base"),
        ("base, over HTTP", "base"),
    ):
        ratio = speed_ratio(rounds(dtype, "closed", 32), label, reference)
        digits = 1 if "LoRAs" in reference else 2
        middle, low, high = (f"{value:.{digits}f}" for value in ratio)
        assert f"{middle} ({low} to {high})" in README, (label, reference, ratio)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_load(dtype: str) -> None:
    taken = rounds(dtype, "mixed")
    ratio, low, high = speed_ratio(taken, "base", "vLLM: base")
    assert f"{ratio:.2f} ({low:.2f} to {high:.2f})" in README
    for key in ("ttft_p95", "gap_p95"):
        ours, theirs = (f"{median(taken, label, key):.2f}" for label in ("base", "vLLM: base"))
        assert f"{ours} s for its {theirs} s" in README


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

"""Pictures of what `benchmarks.throughput` measured.

python -m benchmarks.throughput_plots bench.json docs
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.figure import Figure

from benchmarks.measuring import Group, load, median, speed_ratio
from benchmarks.throughput_cases import BASE, CLOSED, FLOOR
from benchmarks.workload import ANSWER_TOKENS, DECODE, F3L3, L1, PAPER

Groups = dict[tuple[str, int], Group]
"""The rounds of n requests at once, by dtype and n."""

OF_OURS = {BASE: "-", PAPER: "--"}
PEERS = [case.label for case in CLOSED if not case.ours]
TASKS = [L1, F3L3, PAPER, DECODE]
TICKS = [10, 20, 50, 100, 200, 500, 1000]


def closed_groups(path: Path) -> Groups:
    """The groups in a file of raw figures; of two for the same dtype and n the later counts."""
    return {
        (str(group["setting"]["dtype"]), int(group["setting"]["n"])): group
        for group in load(path)
        if group["setting"].get("workload") == "closed"
    }


def throughput(groups: Groups) -> Figure:
    """Tokens per second by the number of requests at once; a panel for each dtype."""
    dtypes = sorted({dtype for dtype, _ in groups}, reverse=True)
    figure = Figure(figsize=(4.8 * len(dtypes), 5), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        for label in (*OF_OURS, *PEERS):
            points = [
                (n, n * ANSWER_TOKENS / median(group["rounds"], label))
                for (of, n), group in sorted(groups.items())
                if of == dtype and _has(group, label)
            ]
            if not points:
                continue
            line: dict[str, Any]
            if label in OF_OURS:
                line = {"color": "C0", "linestyle": OF_OURS[label], "linewidth": 2}
            elif label == FLOOR:
                line = {"color": "black", "linestyle": ":"}
            else:
                line = {"color": f"C{PEERS.index(label)}", "linewidth": 1}
            panel.plot(
                [n for n, _ in points], [y for _, y in points], "o", ms=3, label=label, **line
            )
        sizes = sorted({n for of, n in groups if of == dtype})
        panel.set(title=dtype, xlabel="requests at once", xscale="log", yscale="log")
        panel.set_xticks(sizes, [str(n) for n in sizes])
        panel.set_yticks(TICKS, [str(tick) for tick in TICKS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("generated tokens per second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def tasks_over_base(groups: Groups) -> Figure:
    """Speed with an intervention for each request over the base's speed, with 90 % intervals."""
    n = max(n for _, n in groups)
    figure = Figure(figsize=(7, 3), layout="constrained")
    panel = figure.subplots()
    dtypes = sorted({dtype for dtype, of in groups if of == n}, reverse=True)
    for number, dtype in enumerate(dtypes):
        rounds = groups[dtype, n]["rounds"]
        shown = [label for label in TASKS if _has(groups[dtype, n], label)]
        ratios = [speed_ratio(rounds, label, BASE) for label in shown]
        panel.errorbar(
            [ratio.median for ratio in ratios],
            [TASKS.index(label) + 0.2 * (number - 0.5) for label in shown],
            xerr=[[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]],
            fmt="o",
            capsize=3,
            label=dtype,
        )
    panel.axvline(1, color="grey", linestyle=":")
    panel.set_yticks(range(len(TASKS)), TASKS)
    panel.invert_yaxis()
    panel.set(xlabel=f"speed over the base's, n = {n}")
    panel.grid(axis="x", alpha=0.3)
    panel.legend()
    return figure


def main(
    raw: Annotated[Path, typer.Argument(help="What `benchmarks.throughput --out` wrote.")],
    folder: Annotated[Path, typer.Argument(help="Where throughput.svg and tasks.svg go.")],
) -> None:
    """Draw throughput.svg and tasks.svg."""
    matplotlib.rcParams["svg.hashsalt"] = "reft"  # the same figures give the same file
    groups = closed_groups(raw)
    if not groups:
        raise SystemExit(f"{raw}: no figures of requests at once; run benchmarks.throughput first.")
    for name, figure in {
        "throughput": throughput(groups),
        "tasks": tasks_over_base(groups),
    }.items():
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _has(group: Group, label: str) -> bool:
    return all(label in found for found in group["rounds"])


if __name__ == "__main__":
    typer.run(main)

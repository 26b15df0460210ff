"""Tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from reft_runtime.display.text import aligned
from reft_runtime.use import with_strength

if TYPE_CHECKING:
    from reft_runtime.outputs import Trace
    from reft_runtime.use import Use

_TRACE_HEAD = ("INTERVENTION", "LAYER", "COMPONENT", "ROWS", "MEAN", "LARGEST", "POSITIONS")


def short(digest: str) -> str:
    """The first digits of a digest, by which a version can be named."""
    return digest[:12]


def trace_table(trace: Trace, uses: Sequence[Use], prompt_tokens: int) -> str:
    """What every edit did, one line each: to how many rows, and how far it moved them."""
    rows = [_TRACE_HEAD]
    for edit in trace.summaries():
        use = uses[edit.intervention]
        rows.append(
            (
                with_strength(use.label.partition("@")[0], use.strength),
                str(edit.layer),
                edit.component,
                str(len(edit.positions)),
                f"{edit.mean:.3f}",
                f"{edit.largest:.3f}",
                ranges(edit.positions),
            )
        )
    return "\n".join(
        [
            *(aligned(rows) if trace.edits else ["No row was edited."]),
            "",
            "MEAN, LARGEST  length of the change, in lengths of the row before it",
            f"POSITIONS      of tokens, counted from 0; from {prompt_tokens} on they are generated",
            f"first token    {trace.kl:.3f} nats from the base model's distribution",
            f"answer         {trace.mean_log_ratio:.3f} nats a token likelier than to the base",
        ]
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: 0-2,7."""
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ends)

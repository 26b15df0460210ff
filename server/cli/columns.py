"""Answers of one prompt below each other: who answered, how long, how far from the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from reft_runtime.display.text import printable
from reft_runtime.outputs import BASE_LABEL
from server.cli.backend import Applied, Ask, Backend, Reply

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Column:
    """One answer, and the label of what was applied to it."""

    label: str
    reply: Reply

    def as_json(self) -> dict[str, Any]:
        """The column as plain values; `kl` is the first token's divergence from the base, in nats.

        `mean_log_ratio` is how much likelier the answer is than to the base, in nats a token.
        """
        return {
            "interventions": self.label,
            "answer": self.reply.text,
            "tokens": self.reply.tokens,
            "finish_reason": self.reply.finish_reason,
            "kl": self.reply.trace.kl,
            "mean_log_ratio": self.reply.trace.mean_log_ratio,
        }


def answer_columns(backend: Backend, asks: Sequence[Ask]) -> list[Column]:
    """Ask all together, and give the answers their labels."""
    return [
        Column(ask.applied.label or BASE_LABEL, reply)
        for ask, reply in zip(asks, backend.answers(asks), strict=True)
    ]


def show_columns(console: Console, columns: Sequence[Column]) -> None:
    """Write the columns, each below a line that says whose it is."""
    for place, column in enumerate(columns):
        if place:
            console.print()
        said = [f"{column.reply.tokens} tokens"]
        if column.reply.finish_reason == "length":
            said = [f"cut off at {column.reply.tokens} tokens"]
        if column.label != BASE_LABEL:
            trace = column.reply.trace
            said.append(f"first token {trace.kl:.3f} nats from the base")
            said.append(f"answer {trace.mean_log_ratio:+.3f} a token")
        console.print(
            Text.assemble((printable(column.label), "bold"), "  ", (", ".join(said), "dim"))
        )
        console.print(printable(column.reply.text.strip()))


def conversation(system: str | None, turns: Sequence[Message]) -> list[Message]:
    """The messages of a chat: the system's, if there is one, and then the turns."""
    told = [] if system is None else [{"role": "system", "content": system}]
    return [*told, *turns]


def alone(messages: Sequence[Any], applied: Applied) -> list[Any]:
    """The messages that the template takes: all, or system turns and the last one."""
    if not applied.one_turn:
        return list(messages)
    return [m for m in messages[:-1] if m["role"] == "system"] + list(messages[-1:])

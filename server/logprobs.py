"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reft_runtime.outputs import TokenLogprob

if TYPE_CHECKING:
    from reft_runtime.text import Tokenizer

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot write; OpenAI's own number for it."""


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offset: int,
) -> dict[str, Any]:
    """The object of /v1/completions; `offset` is where the first token begins, in characters.

    The first token of a prompt has no log-probability (None). The chosen token is among the
    alternatives, whether or not it is one of the best.
    """
    texts: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token, logprob in zip(tokens, logprobs, strict=True):
        text = tokenizer.token_text(token)
        texts.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if logprob is None else _finite(logprob.logprob))
        if logprob is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for other, value in (*logprob.top, (token, logprob.logprob)):
            top.setdefault(tokenizer.token_text(other), _finite(value))
        tops.append(top)
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The object of /v1/chat/completions."""
    content = [
        {
            **_chat_token(tokenizer, entry.token, entry.logprob),
            "top_logprobs": [_chat_token(tokenizer, *pair) for pair in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)

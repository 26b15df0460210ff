"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reft_runtime.outputs import TokenLogprob
from server.schemas.answers.base import PromptLogprob
from server.schemas.answers.chat import ChatLogprobs, ChatTokenLogprob, TopLogprob
from server.schemas.answers.completions import CompletionLogprobs

if TYPE_CHECKING:
    from server.engine import Tokenizer

FLOOR = -9999.0
"""Stand-in for minus infinity, which JSON cannot write; OpenAI uses the same number."""


def completion_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offsets: list[int],
    count: int,
) -> CompletionLogprobs:
    """Log-probabilities as /v1/completions writes them.

    `offsets` are the places where the tokens begin, in characters. The first token of a prompt
    has no log-probability (None). The chosen token is listed among the `count` best, even if it
    is not one of them.
    """
    texts: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token, logprob in zip(tokens, logprobs, strict=True):
        texts.append(tokenizer.token_text(token))
        values.append(None if logprob is None else _finite(logprob.logprob))
        if logprob is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for other, value in (*logprob.top[:count], (token, logprob.logprob)):
            top.setdefault(tokenizer.token_text(other), _finite(value))
        tops.append(top)
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_offsets(tokenizer: Tokenizer, tokens: Sequence[int], text: str) -> list[int]:
    """Places where the tokens of a prompt begin in its echoed `text`, in characters.

    A special token is as long as its name if the text contains the name there. If the token was
    added, or left out of the text, its length is 0.
    """
    from reft_runtime.text import TextOffsets  # loads torch: only when needed

    offsets, named, found = TextOffsets(tokenizer), 0, []
    for token in tokens:
        found.append(min(offsets.push(token) + named, len(text)))
        if token in tokenizer.special_ids:
            name = tokenizer.token_text(token)
            named += len(name) if text.startswith(name, found[-1]) else 0
    return found


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob | None], count: int
) -> list[dict[str, PromptLogprob] | None]:
    """Log-probabilities as vLLM writes them: for every prompt token its own and the best, by id.

    The `count` best are listed. `rank` counts from 1, and is None for a token that is not among
    the best. The first token has no log-probability (None).
    """
    written: list[dict[str, PromptLogprob] | None] = []
    for entry in logprobs:
        if entry is None:
            written.append(None)
            continue
        best = entry.top[:count]
        ranks = {token: rank for rank, (token, _) in enumerate(best, start=1)}
        written.append(
            {
                str(token): {
                    "logprob": _finite(value),
                    "rank": ranks.get(token),
                    "decoded_token": tokenizer.token_text(token),
                }
                for token, value in ((entry.token, entry.logprob), *best)
            }
        )
    return written


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Log-probabilities as /v1/chat/completions writes them."""
    content: list[ChatTokenLogprob] = [
        {
            **_chat_token(tokenizer, entry.token, entry.logprob),
            "top_logprobs": [_chat_token(tokenizer, *pair) for pair in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    return {
        "token": tokenizer.token_text(token),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)

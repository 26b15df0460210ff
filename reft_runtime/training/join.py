"""Which blank stands between the prompts of a data set and their completions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions.format.manifest import CompletionPrefix
from reft_runtime.text import Tokenizer
from reft_runtime.text.join import BLANK, takes_blank
from reft_runtime.training.layout import Layout
from reft_runtime.training.rows import Row

_LOOKED_AT = 200
"""This many rows decide for all."""


def choose_prefix(rows: Sequence[Row], layout: Layout, tokenizer: Tokenizer) -> CompletionPrefix:
    """A blank, where most of the rows' completions have it in their first token, else nothing.

    Nothing stands before answers to chats, which the model's own template begins, and behind
    prompts that end with a line.
    """
    looked = list(islice(rows, _LOOKED_AT))
    blank = sum(
        _takes_blank(layout.prompt(row), layout.completion(row), tokenizer) for row in looked
    )
    return BLANK if 2 * blank > len(looked) else ""


def _takes_blank(asked: object, completion: str, tokenizer: Tokenizer) -> bool:
    if not isinstance(asked, str):
        return False
    try:
        return takes_blank(asked, completion, tokenizer)
    except InvalidRequest:
        return False  # said with its row where it becomes an example

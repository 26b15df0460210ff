"""How a completion is joined to its prompt: as the model's tokenizer writes the two together.

Most tokenizers keep a blank with the word behind it: ` billing` is what the model has read a
thousand times behind a colon, `billing` is not, and learns worse by far. Nobody should have to
know, so blanks at the border are taken off rows, and put there where the tokenizer wants one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from reft_runtime.errors import InvalidRequest
from reft_runtime.interventions.format.manifest import CompletionPrefix
from reft_runtime.text import Tokenizer
from reft_runtime.training.layout import Layout
from reft_runtime.training.rows import Row

BLANK: CompletionPrefix = " "

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


def join(completion: str, prefix: CompletionPrefix | None) -> str:
    """What a completion is written as behind its prompt; None leaves it as it is.

    One blank before it is of the border. More are its own, such as the indent of code, and so is
    any other beginning of a line.
    """
    if prefix is None or (completion[:1].isspace() and completion[:1] != BLANK):
        return completion
    single = completion[:1] == BLANK and not completion[1:2].isspace()
    return prefix + (completion[1:] if single else completion)


def _takes_blank(asked: object, completion: str, tokenizer: Tokenizer) -> bool:
    if not isinstance(asked, str):
        return False
    prompt, answer = asked.rstrip(BLANK), join(completion, BLANK)
    if not prompt or prompt[-1:].isspace() or not answer.startswith(BLANK):
        return False
    try:
        before = tokenizer.encode(prompt)
        together = tokenizer.encode(prompt + answer)
    except InvalidRequest:
        return False  # said with its row where it becomes an example
    first = together[len(before) : len(before) + 1]
    return together[: len(before)] == before and bool(tokenizer.decode(first).strip())

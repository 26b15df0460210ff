"""How a completion is joined to its prompt: as the model's tokenizer writes the two together.

Most tokenizers keep a blank with the word behind it: ` billing` is what the model has read a
thousand times behind a colon, `billing` is not, and learns worse by far. Nobody should have to
know, so blanks at the border are taken off, and put there where the tokenizer wants one.
"""

from __future__ import annotations

from typing import Protocol

from reft_runtime.interventions.format.manifest import CompletionPrefix

BLANK: CompletionPrefix = " "


class TextTokenizer(Protocol):
    """The part of a `Tokenizer` that tells how a prompt and its completion are joined."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""


def join(completion: str, prefix: CompletionPrefix | None) -> str:
    """What a completion is written as behind its prompt; None leaves it as it is.

    One blank before it is of the border. More are its own, such as the indent of code, and so is
    any other beginning of a line.
    """
    if prefix is None or (completion[:1].isspace() and completion[:1] != BLANK):
        return completion
    single = completion[:1] == BLANK and not completion[1:2].isspace()
    return prefix + (completion[1:] if single else completion)


def takes_blank(prompt: str, completion: str, tokenizer: TextTokenizer) -> bool:
    """Whether a blank between the two belongs to the completion's first token.

    It does not behind a prompt that ends with a line. Raises `InvalidRequest` for text that cannot
    be tokenised.
    """
    before, answer = prompt.rstrip(BLANK), join(completion, BLANK)
    if not before or before[-1:].isspace() or not answer.startswith(BLANK):
        return False
    ids = tokenizer.encode(before)
    together = tokenizer.encode(before + answer)
    first = together[len(ids) : len(ids) + 1]
    return together[: len(ids)] == ids and bool(tokenizer.decode(first).strip())

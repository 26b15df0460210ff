"""The labels of a classification: which they are, and their tokens behind a prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from reft_runtime.errors import InvalidRequest
from reft_runtime.front.prompt_form import Encoder
from reft_runtime.interventions.format.labels import problem_of
from reft_runtime.schedule.labels import END, LabelTree
from reft_runtime.text.join import BLANK, takes_blank

if TYPE_CHECKING:
    from reft_runtime.interventions import Version

_TAIL = 4
"""So many tokens at a prompt's end decide how a tokenizer writes what follows."""

_LOOKED_AT = 8
"""So many labels decide whether a blank stands before them."""

_KEPT = 64
"""So many sets of labels are remembered in tokens: most prompts of a task end alike."""


def labels_of(given: Sequence[str] | None, versions: Sequence[Version]) -> tuple[str, ...]:
    """The labels that a request names, or else those of the files that it applies.

    Raises `InvalidRequest` if they are no list of labels, if there are none anywhere, or if the
    files name different ones.
    """
    if given is not None:
        texts = not isinstance(given, str) and all(isinstance(label, str) for label in given)
        problem = problem_of(given) if texts else "give a list of texts"
        if problem is not None:
            raise InvalidRequest(f"labels: {problem}.", param="labels")
        return tuple(given)
    found = {version.name: labels for version in versions if (labels := version.labels) is not None}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    if found:
        why = f"{' and '.join(found)} name different ones"
    elif versions:
        why = f"{' and '.join(version.name for version in versions)}: no labels stand in the file"
    else:
        why = "the base model has none of its own"
    raise InvalidRequest(
        f'labels: {why}; give the answers to choose from, such as ["yes", "no"].', param="labels"
    )


class LabelTokens:
    """Writes labels as a model would generate them behind a prompt. Safe to use in many threads.

    `eos_ids` are the tokens that end the model's answers.
    """

    def __init__(self, tokenizer: Encoder, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._can_end = bool(eos_ids)
        self._made = lru_cache(_KEPT)(self._make)

    def tree(
        self, labels: tuple[str, ...], prompt: Sequence[int], prefix: str, *, chat: bool
    ) -> LabelTree:
        """The tokens of labels behind a prompt, joined to it as training joins a completion.

        `prefix` is what the files of the request put before completions. Without any a blank is
        put there if the tokenizer wants one, but not in a `chat`. Raises `InvalidRequest` if two
        labels have the same tokens, if one has none, or if one begins another and no token ends the
        model's answers.
        """
        return self._made(labels, tuple(prompt[-_TAIL:]), prefix, chat=chat)

    def _make(
        self, labels: tuple[str, ...], tail: tuple[int, ...], prefix: str, *, chat: bool
    ) -> LabelTree:
        before = self._tokenizer.decode(tail, skip_special_tokens=False)
        texts = [label.strip() for label in labels]
        if not prefix and not chat and not before[-1:].isspace():
            looked = texts[:_LOOKED_AT]
            blanks = sum(takes_blank(before, text, self._tokenizer) for text in looked)
            prefix = BLANK if 2 * blanks > len(looked) else ""
        start = self._tokens(before)
        try:
            tree = LabelTree.of([self._behind(before, start, prefix + text) for text in texts])
        except ValueError:
            raise InvalidRequest(
                "labels: to the model's tokenizer two of them are the same, or one is nothing;"
                " write them otherwise.",
                param="labels",
            ) from None
        if not self._can_end:
            _check_endless(labels, tree)
        return tree

    def _behind(self, before: str, start: list[int], answer: str) -> tuple[int, ...]:
        whole = self._tokens(before + answer)
        if whole[: len(start)] == start:
            return tuple(whole[len(start) :])
        return tuple(self._tokens(answer))

    def _tokens(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _check_endless(labels: tuple[str, ...], tree: LabelTree) -> None:
    """Raise `InvalidRequest` if a label needs an end to be told from another that it begins."""
    for label, tokens in zip(labels, tree.labels, strict=True):
        if tokens[-1] == END:
            begun = tokens[:-1]
            other = next(
                one
                for one, longer in zip(labels, tree.labels, strict=True)
                if longer != tokens and longer[: len(begun)] == begun
            )
            raise InvalidRequest(
                f"labels: {label!r} is the beginning of {other!r}, and this model has no token that"
                " ends an answer, by which to tell them apart; choose labels of which none begins"
                " another.",
                param="labels",
            )

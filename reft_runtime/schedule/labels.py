"""The labels of a request in tokens, as a tree: what is computed once for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Tokens = tuple[int, ...]

END = -1
"""Stands for the end of the answer, whichever of the model's tokens ends it."""


@dataclass(frozen=True, slots=True)
class LabelTree:
    """Labels whose log-probabilities after one prompt are asked for.

    `labels` are distinct and not empty. One that another begins with ends in `END`: then no two
    can be the same answer. `following` has, for each beginning of labels, what may come next.
    `paths` are the fewest token sequences, none the beginning of another, behind whose tokens
    everything that comes next is found; the first is `()` if all labels have one token.
    """

    labels: tuple[Tokens, ...]
    following: Mapping[Tokens, Tokens]
    paths: tuple[Tokens, ...]

    @classmethod
    def of(cls, labels: Sequence[Tokens]) -> LabelTree:
        """The tree of labels; raises `ValueError` if one is empty or there twice."""
        if not all(labels) or len(set(labels)) < len(labels):
            raise ValueError("labels must have tokens, and differ in them")
        inner = {label[:length] for label in labels for length in range(len(label))}
        ended = tuple((*label, END) if label in inner else label for label in labels)
        following: dict[Tokens, dict[int, None]] = {}
        for label in ended:
            for length, token in enumerate(label):
                following.setdefault(label[:length], {})[token] = None
        needed = dict.fromkeys(label[:-1] for label in ended)
        before = {path[:length] for path in needed for length in range(len(path))}
        return cls(
            ended,
            {prefix: tuple(tokens) for prefix, tokens in following.items()},
            tuple(path for path in needed if path not in before),
        )

    def scores(self, logprobs: Mapping[Tokens, float]) -> tuple[float, ...]:
        """Log-probability of each label; `logprobs` has that of the last token of every beginning.

        A beginning includes its last token, so that a whole label is one, too.
        """
        return tuple(
            sum(logprobs[label[:length]] for length in range(1, len(label) + 1))
            for label in self.labels
        )

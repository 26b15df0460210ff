"""The frozen base with trainable edits: from examples to the logits of their completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reft_runtime.base.model import LoadedModel, forward
from reft_runtime.edits.sites import EditSites, Site
from reft_runtime.interventions import CanonicalEdit
from reft_runtime.machine.contention import StepWatch
from reft_runtime.progress import bar
from reft_runtime.training.attention import BatchAttention, Prefix
from reft_runtime.training.prompts import Example
from reft_runtime.training.trainable import TrainableEdits

GROUP = 32
"""This many prefixes are computed at once."""


class Base:
    """A frozen base model, to which edits are applied from outside."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.watch = self._watch()
        two = torch.arange(2, device=loaded.device)
        with torch.no_grad():
            self.sites = EditSites(
                loaded.model,
                loaded.layers,
                loaded.mixers,
                lambda step: forward(loaded.model, two, two, two[:1], step),
            )
        self._kept: dict[tuple[int, ...], Prefix] = {}

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.loaded.model.device

    def check(self, edits: Iterable[CanonicalEdit]) -> None:
        """Raise `WrongBaseModel` if the model has no place for one of the edits."""
        for edit in edits:
            self.sites.check(edit.layer, edit.component, edit.U.shape[1])

    def to(self, device: torch.device) -> None:
        """Move the model to a device, and forget what was kept."""
        if self.loaded.device != device:  # quantised weights cannot be converted in place
            self.loaded.model.to(device)  # type: ignore[arg-type]
        self.forget()
        self.watch = self._watch()

    def forget(self) -> None:
        """Give back the memory of what was kept."""
        self._kept.clear()

    def _watch(self) -> StepWatch:
        return StepWatch(torch.get_num_threads() if self.device.type == "cpu" else 1)

    def keep(self, prefixes: Iterable[tuple[int, ...]], max_bytes: int, *, progress: bool) -> None:
        """Compute the keys and values of prefixes, which no edit changes, and keep them.

        They are good for every pass over the data, whatever is learned. What is computed together
        depends on the prefixes alone: so a training gives the same weights when it is resumed.
        The longest that `max_bytes` have no room for are left to be computed when they are needed.
        """
        wanted, free = [], max_bytes
        for tokens in sorted(set(prefixes) - {()}, key=lambda tokens: (len(tokens), tokens)):
            free -= len(tokens) * self.loaded.kv_bytes_per_token
            if free < 0:
                break
            wanted.append(tokens)
        with bar(total=len(wanted), desc="Prompts", disable=not progress or not wanted) as shown:
            for first in range(0, len(wanted), GROUP):
                part = wanted[first : first + GROUP]
                self._kept.update(zip(part, self._compute(part), strict=True))
                shown.update(len(part))

    def start(self, edits: Sequence[CanonicalEdit], example: Example) -> int:
        """The first token of an example to be computed; `prefixes` hold what comes before.

        That is its first where the model has recurrent layers, whose states are not kept.
        """
        return 0 if self.loaded.mixers else first_edited(edits, example)

    def prefixes(self, wanted: Sequence[tuple[int, ...]]) -> list[Prefix | None]:
        """The keys and values of these prefixes; None for an empty one."""
        missing = sorted({tokens for tokens in wanted if tokens} - self._kept.keys())
        made = dict(zip(missing, self._compute(missing) if missing else (), strict=True))
        return [self._kept.get(tokens) or made[tokens] if tokens else None for tokens in wanted]

    @torch.no_grad()
    def _compute(self, prefixes: Sequence[tuple[int, ...]]) -> list[Prefix]:
        attention = BatchAttention([len(t) for t in prefixes], self.device, keep_own=True)
        self._forward(prefixes, [0] * len(prefixes), [], attention)
        return attention.prefixes_of_rows()

    def logits(
        self,
        parts: Sequence[Sequence[int]],
        starts: Sequence[int],
        prefixes: Sequence[Prefix | None],
        keep: Sequence[int],
    ) -> Tensor:
        """Logits [len(keep), vocabulary] of packed rows; part i begins at `starts[i]`."""
        attention = BatchAttention([len(p) for p in parts], self.device, prefixes=prefixes)
        return self._forward(parts, starts, keep, attention)

    def _forward(
        self,
        parts: Sequence[Sequence[int]],
        starts: Sequence[int],
        keep: Sequence[int],
        attention: BatchAttention,
    ) -> Tensor:
        device = self.device
        ids = [token for part in parts for token in part]
        positions = [
            start + i for part, start in zip(parts, starts, strict=True) for i in range(len(part))
        ]
        with self.watch.step():
            made: Tensor = forward(
                self.loaded.model,
                torch.tensor(ids, device=device),
                torch.tensor(positions, device=device),
                torch.tensor(keep, dtype=torch.long, device=device),
                attention,
            )
        return made


@dataclass(frozen=True, slots=True)
class Predictions:
    """Logits [K, vocabulary] of all completion tokens of a batch, and the tokens themselves [K].

    `counts` says how many of them each example has.
    """

    logits: Tensor
    targets: Tensor
    counts: tuple[int, ...]

    def loss(self) -> Tensor:
        """Cross-entropy in nats, summed over the tokens."""
        return cross_entropy(self.logits.float(), self.targets, reduction="sum")

    def right(self, examples: Sequence[Example]) -> list[bool]:
        """For each example: whether greedy decoding gives its label, or, without one, all of it."""
        hits = torch.split(self.logits.argmax(-1) == self.targets, list(self.counts))
        return [
            bool(hit[: example.label_length].all())
            for hit, example in zip(hits, examples, strict=True)
        ]


class _BatchEdits:
    """An `Editor` of one batch: packed rows by site and edit, all edits at one strength."""

    def __init__(self, device: torch.device, strength: float) -> None:
        self._device = device
        self._strength = strength
        self._passes: dict[Site, list[tuple[CanonicalEdit, Tensor]]] = {}

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self._passes)

    def add(self, edit: CanonicalEdit, rows: list[int]) -> None:
        if rows:
            index = torch.tensor(rows, device=self._device)
            self._passes.setdefault((edit.layer, edit.component), []).append((edit, index))

    def apply(self, site: Site, hidden: Tensor) -> None:
        for edit, rows in self._passes[site]:
            new = edit.edited(hidden[rows], self._strength)
            hidden.index_copy_(0, rows, new.to(hidden.dtype))


def predict(
    base: Base,
    edits: Sequence[CanonicalEdit],
    examples: Sequence[Example],
    strength: float = 1.0,
) -> Predictions:
    """Run examples through the base with edits, at the positions where serving applies them.

    Gradients flow from the first edited token and layer on; what is before is computed without
    them, or not at all where it is known from before. The last token of an example is no input.
    """
    starts = [base.start(edits, example) for example in examples]
    parts = [e.tokens[start:-1] for e, start in zip(examples, starts, strict=True)]
    keep: list[int] = []
    places: list[list[list[int]]] = [[] for _ in edits]
    first = 0
    for example, start, part in zip(examples, starts, parts, strict=True):
        stop = start + len(part)
        keep.extend(range(first + example.prompt_length - 1 - start, first + len(part)))
        for rows, edit in zip(places, edits, strict=True):
            offsets = edit.positions.offsets(example.prompt_length, start, stop)
            rows.append([first - start + offset for offset in offsets])
        first += len(part)
    editor = _BatchEdits(base.device, strength)
    for rows, edit in zip(places, edits, strict=True):
        editor.add(edit, [row for some in rows for row in some])
    prefixes = base.prefixes([e.tokens[:s] for e, s in zip(examples, starts, strict=True)])
    with base.sites.hooked(editor):
        logits = base.logits(parts, starts, prefixes, keep)
    targets = [token for example in examples for token in example.completion]
    return Predictions(
        logits,
        torch.tensor(targets, device=base.device),
        tuple(len(example.completion) for example in examples),
    )


def first_edited(edits: Sequence[CanonicalEdit], example: Example) -> int:
    """Where what depends on the edits begins: at the first edit, or at the first logits."""
    stop = example.prompt_length - 1
    offsets = (edit.positions.offsets(example.prompt_length, 0, stop) for edit in edits)
    return min((found[0] for found in offsets if found), default=stop)


class EditedModel(nn.Module):
    """What transformers' Trainer trains: the edits' parameters, with the base beside them."""

    accepts_loss_kwargs = True
    """Tells the Trainer to say how many tokens a step has, of which a batch may be a part."""

    def __init__(self, base: Base, edits: TrainableEdits) -> None:
        super().__init__()
        self.edits = edits
        self._base = (base,)  # in a tuple it is no submodule: neither saved nor counted

    @property
    def base(self) -> Base:
        """The frozen model."""
        return self._base[0]

    def forward(
        self,
        examples: Sequence[Example],
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Any]:
        """The loss of a batch: the mean over completion tokens, of all parts of the step."""
        made = predict(self.base, self.edits.canonical(), examples)
        count = made.targets.shape[0] if num_items_in_batch is None else num_items_in_batch
        return {"loss": made.loss() / count, "predictions": made}

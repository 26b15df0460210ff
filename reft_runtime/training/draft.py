"""The intervention that a training is about to make: its edits, its examples, its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerState

from reft_runtime.base.model import LoadedModel
from reft_runtime.base.shape import shape_of
from reft_runtime.errors import ConfigError
from reft_runtime.interventions import Intervention
from reft_runtime.interventions.format.labels import problem_of
from reft_runtime.machine.dtypes import name_of
from reft_runtime.text import Tokenizer
from reft_runtime.training.join import choose_prefix
from reft_runtime.training.material import Material
from reft_runtime.training.prompts import Example, Formatter, make_examples
from reft_runtime.training.record import about, metrics_of
from reft_runtime.training.rows import Rows
from reft_runtime.training.trainable import new_edits


@dataclass(frozen=True, slots=True)
class Examples:
    """The rows of a training in tokens: those that are learned, and those held out."""

    learned: Sequence[Example]
    held_out: Sequence[Example]


class Draft:
    """New edits for one base model by complete `settings`, and what their file says of them."""

    def __init__(
        self,
        material: Material,
        name: str,
        loaded: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        description: str,
        license: str | None,
    ) -> None:
        self._material = material
        self._shape = shape_of(name, loaded)
        self._loaded = loaded
        self._words = Tokenizer(tokenizer, loaded.max_model_len)
        self._description = description
        self._license = license
        self.settings = material.settings
        self.edits = new_edits(self._shape, self.settings)
        self._prefix = choose_prefix(material.rows.rows, material.layout, self._words)
        dtype = name_of(loaded.dtype)
        self._labels = _labels(material)
        self._about = about(material.rows, material.held_out, self.settings, dtype)

    @property
    def note(self) -> dict[str, Any]:
        """What identifies the training; one that differs in any of this is another training."""
        columns = self._material.rows.columns
        return {
            "base": self._shape.model_dump(),
            "completion_prefix": self._prefix,
            "text": columns.prompt,
            "label": columns.label or columns.completion,
            **self._about,
        }

    def build(self, **figures: Any) -> Intervention:
        """The intervention with the edits as they are; `figures` are `metrics` and `training`."""
        layout = self._material.layout
        return Intervention.build(
            self._shape,
            self.edits.export(),
            template=layout.served_template,
            system=self._material.system,
            completion_prefix=self._prefix,
            texts=layout.texts,
            labels=self._labels,
            description=self._description,
            license=self._license,
            **figures,
        )

    def finished(self, state: TrainerState, seconds: float) -> Intervention:
        """The intervention with the edits as they are, and how its training went."""
        training = {**self._about, "steps": state.global_step, "seconds": seconds}
        return self.build(metrics=metrics_of(state), training=training)

    def examples(self) -> Examples:
        """The rows in tokens.

        Raises `ConfigError` for rows that are too long, and for those in which no token is edited.
        """
        loaded, material = self._loaded, self._material
        formatter = Formatter(
            material.layout, self._words, loaded.eos_ids, completion_prefix=self._prefix
        )
        longest = min(self.settings.max_length or loaded.max_model_len, loaded.max_model_len)

        def made(rows: Rows) -> list[Example]:
            return make_examples(rows, formatter, longest, truncate=self.settings.truncate)

        learned = made(material.rows)
        held_out = [] if material.held_out is None else made(material.held_out)
        self._check_edited(learned)
        return Examples(learned, held_out)

    def _check_edited(self, examples: Sequence[Example]) -> None:
        for example in examples:
            n, stop = example.prompt_length, len(example.tokens) - 1
            if not any(edit.spec.positions.offsets(n, 0, stop) for edit in self.edits):
                positions = next(iter(self.edits)).spec.positions
                raise ConfigError(
                    f"{example.where}: positions {positions} edit nothing in its prompt of {n}"
                    " tokens; leave such rows out, or choose other positions.",
                    param="positions",
                )


def _labels(material: Material) -> list[str] | None:
    """The labels of all rows, those held out too; None unless each row has one of a few."""
    rows = [*material.rows.rows, *(material.held_out.rows if material.held_out else ())]
    found = {row.label.strip() for row in rows if row.label is not None}
    labelled = all(row.label is not None for row in rows)
    return sorted(found) if labelled and problem_of(sorted(found)) is None else None

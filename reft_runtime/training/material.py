"""From data to the rows of a training: read, laid out, checked, and some of them held out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.shape import base_shape
from reft_runtime.errors import ConfigError
from reft_runtime.interventions.format.manifest import SystemTurn
from reft_runtime.interventions.format.template import CHAT
from reft_runtime.loading.base import read_words
from reft_runtime.text import Tokenizer
from reft_runtime.training.callbacks import Say
from reft_runtime.training.check import check_data, measure_of
from reft_runtime.training.hold_out import split
from reft_runtime.training.layout import Layout, choose_template
from reft_runtime.training.rows import Rows, read_rows
from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.sources import Data
from reft_runtime.training.wording import counted


@dataclass(frozen=True, slots=True)
class Material:
    """What a training learns from, before any model is loaded.

    `held_out` are the rows that choose the checkpoint and measure it, None where there are none.
    `settings` are complete, and have the template that `layout` writes prompts by, where there is
    one. `system` is what the manifest says of system turns.
    """

    rows: Rows
    held_out: Rows | None
    layout: Layout
    settings: TrainSettings
    system: SystemTurn | None


def prepare(
    data: Data,
    evaluation: Data | None,
    settings: TrainSettings,
    *,
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    system: SystemTurn | None,
    text: str | None,
    label: str | None,
    say: Say,
) -> Material:
    """Make the rows of a training ready, and tell what is in them; arguments are as for `train`.

    Raises `ConfigError` where rows, or settings about rows, cannot be trained with, and where the
    settings do not fit the model.
    """
    rows = read_rows(data, text=text, label=label, lenient=True)
    held_out = None
    if evaluation is not None:
        held_out = read_rows(evaluation, text=text, label=label, lenient=True)
    words = None if isinstance(model, PreTrainedModel) else read_words(model)
    if settings.template is None and system is None:
        settings = replace(settings, template=_chosen_template(rows, words, tokenizer))
    layout = Layout(settings.template, rows.rows[0])
    system = _checked_system(system, layout)
    _check_rows(rows, held_out, words, layout, settings, say)
    if held_out is None:
        rows, held_out = _split(rows, layout, settings, say)
    elif settings.hold_out:
        raise ConfigError(
            "hold_out: there are other rows to evaluate on; give one of the two.",
            param="hold_out",
        )
    if settings.patience is not None and held_out is None:
        raise ConfigError(
            "patience: there are no rows to evaluate on; give them with --eval (in Python"
            " evaluation=), or hold some out with --hold-out 0.1 (hold_out=0.1).",
            param="patience",
        )
    settings = settings.complete(base_shape(model), len(rows.rows))
    settings.steps_over(len(rows.rows))  # more than there can be are told now
    return Material(rows, held_out, layout, settings, system)


def _chosen_template(
    rows: Rows, words: Tokenizer | None, tokenizer: PreTrainedTokenizerBase | None
) -> str | None:
    """The template where nobody gave one: what the rows and the model's tokenizer suggest."""
    chats = words.knows_chats if words else tokenizer is not None and bool(tokenizer.chat_template)
    return choose_template(rows, chats=chats)


def _checked_system(system: SystemTurn | None, layout: Layout) -> SystemTurn | None:
    """What the manifest says of system turns; the model's own template takes them anyway."""
    if system not in (None, "prepend", "drop", "refuse"):
        raise ConfigError(f"system: write prepend, drop or refuse, not {system!r}.", param="system")
    if layout.served_template != CHAT:
        return system or "prepend"
    if system is not None:
        raise ConfigError(
            "system: chats are written by the model's own template, which takes system turns;"
            " leave it out, or give a template that is a text.",
            param="system",
        )
    return None


def _check_rows(
    rows: Rows,
    held_out: Rows | None,
    words: Tokenizer | None,
    layout: Layout,
    settings: TrainSettings,
    say: Say,
) -> None:
    """Say what is in the rows; raises `ConfigError` where they cannot be trained on."""
    measure = None
    if not settings.truncate and words is not None:
        measure = measure_of(words, layout, settings.max_length)
    for check in check_data(rows, held_out, settings.template, measure):
        check.raise_errors()
        say(str(check))
    if layout.texts and layout.served_template == CHAT:
        say("texts are asked as what a user says in a chat; --template '{prompt}' leaves them bare")


def _split(
    rows: Rows, layout: Layout, settings: TrainSettings, say: Say
) -> tuple[Rows, Rows | None]:
    kept, held_out = split(rows, settings.hold_out, layout, settings.seed)
    if held_out is not None:
        say(
            f"{len(held_out.rows):,} of {counted(len(rows.rows), 'row')} are held out to measure"
            " it; --hold-out 0 trains on all"
        )
    return kept, held_out

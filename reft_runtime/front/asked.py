"""Reads the arguments of `generate` and `compare`: prompts, and what applies to each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from reft_runtime.errors import InvalidRequest
from reft_runtime.front.prompts import Prompt
from reft_runtime.sampling import SamplingParams
from reft_runtime.use import Use

Uses = str | Use | tuple[str | Use, ...] | None
"""What to apply to a prompt: one intervention, several in order, or (None) the base model."""


def uses_of(applied: Uses) -> tuple[Use, ...]:
    """The interventions applied to one prompt, in order. Raises `InvalidRequest`."""
    if applied is None:
        return ()
    several = applied if isinstance(applied, tuple) else (applied,)
    for use in several:
        if not isinstance(use, str | Use):
            raise InvalidRequest(
                "intervention: give a name, a Use, a tuple of them, or None, not "
                f"{type(use).__name__}.",
                param="intervention",
            )
    return tuple(use if isinstance(use, Use) else Use(use) for use in several)


def pairs(
    prompts: Prompt | Sequence[Prompt], intervention: Uses | list[Uses] | list[str]
) -> list[tuple[Prompt, tuple[Use, ...]]]:
    """Prompts with what applies to each; a single prompt counts as a list of one.

    Raises `InvalidRequest`.
    """
    if not isinstance(prompts, str | list | tuple) or (not prompts and prompts != ""):
        raise InvalidRequest(
            "prompts: give text, a list of token ids, a list of messages, or a list of these, not "
            f"{repr(prompts)[:40]}.",
            param="prompts",
        )
    single = isinstance(prompts, str) or isinstance(prompts[0], int | Mapping)
    several = cast(Sequence[Prompt], [prompts] if single else prompts)
    if not isinstance(intervention, list):
        return [(prompt, uses_of(intervention)) for prompt in several]
    if len(intervention) != len(several):
        raise InvalidRequest(
            f"intervention: {len(intervention)} for {len(several)} prompts; give one, or a list "
            "with one for each prompt.",
            param="intervention",
        )
    return [(p, uses_of(applied)) for p, applied in zip(several, intervention, strict=True)]


def for_each(
    sampling: SamplingParams | list[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """The settings of each of `count` prompts, of those for all or a list. Raises `InvalidRequest`.

    None is the defaults.
    """
    if not isinstance(sampling, list):
        return [SamplingParams() if sampling is None else sampling] * count
    if len(sampling) != count:
        raise InvalidRequest(
            f"sampling: {len(sampling)} for {count} prompts; give one, or a list with one for "
            "each prompt.",
            param="sampling",
        )
    return sampling

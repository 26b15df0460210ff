"""Which interventions a body names, by `model` or `interventions`; the runtime resolves them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from reft_runtime.errors import NotFound, did_you_mean
from reft_runtime.use import Use
from server.context import Context
from server.schemas.common import InterventionUse

if TYPE_CHECKING:
    from reft_runtime.interventions import Version


@contextmanager
def selected(
    context: Context, model: str, interventions: Sequence[InterventionUse] = ()
) -> Iterator[list[Use]]:
    """Yield what a body applies: its `interventions`, else its `model`. The block resolves it.

    `model` is the base's id, NAME, NAME@DIGEST or BASE:NAME. Beside `interventions` it is not
    applied, but must exist. An unknown `model` raises `NotFound`, also if only the block finds it
    unknown.
    """
    name = _name(context, model)
    if interventions:
        find_model(context, model)
        yield [
            Use(one.name, one.strength, None if one.subspace is None else tuple(one.subspace))
            for one in interventions
        ]
        return
    try:
        yield [] if name is None else [Use(name)]
    except NotFound as error:
        if name is None or error.param != "interventions.0.name":
            raise
        raise _unknown(context, model, name) from None


def find_model(context: Context, model: str) -> Version | None:
    """The version that a model's id stands for now, None for the base; raises `NotFound`."""
    name = _name(context, model)
    if name is None:
        return None
    try:
        return context.registry.resolve(name)
    except NotFound:
        raise _unknown(context, model, name) from None


def label(model: str, interventions: Sequence[InterventionUse]) -> str:
    """The answer's `model`: names and strengths of `interventions`, or without them `model`."""
    return "+".join(map(_label, interventions)) or model


def _label(use: InterventionUse) -> str:
    return use.name if use.strength == 1 else f"{use.name}*{use.strength:g}"


def _name(context: Context, model: str) -> str | None:
    base = context.engine.info.model
    return None if model == base else model.removeprefix(f"{base}:")


def _unknown(context: Context, model: str, name: str) -> NotFound:
    meant = context.registry.meant(name) or did_you_mean(name, [context.engine.info.model])
    return NotFound(f"The model `{model}` does not exist.{meant}", param="model")

"""Whether a server will take the file of a training, asked before the training."""

from __future__ import annotations

from pathlib import Path

import httpx

from reft_runtime.base.shape import read_base
from reft_runtime.client import Change, Server
from reft_runtime.errors import ConfigError, ReftError
from reft_runtime.interventions import Intervention, serialise
from reft_runtime.reaching import why_unreachable
from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.trainable import new_edits


def check_push(server: Server, name: str, model: str, settings: TrainSettings) -> None:
    """Raise `ConfigError` with what the server has against the file that will be made.

    It is asked about one of the same base and shape, untrained.
    """
    base, _ = read_base(model)
    edits = new_edits(base, settings.complete(base, 1))
    data = serialise(Intervention.build(base, edits.export()))
    try:
        refusal = server.refusal(name, data)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"push: no answer from {server.shown}: {why_unreachable(error, server.url)}.",
            param="push",
        ) from None
    if refusal is not None:
        raise ConfigError(f"push: {server.shown} would not take {name}: {refusal}", param="push")


def push(server: Server, file: Path, name: str) -> Change:
    """Put a trained file on the server, and say what that changed.

    `ConfigError` says how to do it later.
    """
    try:
        _, change = server.upload(name, file.read_bytes())
        return change
    except ReftError as error:
        key = "" if server.api_key is None else ' -H "authorization: Bearer $REFT_API_KEY"'
        raise ConfigError(
            f"{error.message}\nThe trained file is {file}. To put it on a server that runs:\n"
            f"  curl -X PUT {server.shown}/v1/interventions/{name} --data-binary @{file}{key}",
            param="push",
        ) from None

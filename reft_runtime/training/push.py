"""Whether a server will take the file of a training, asked before the training."""

from __future__ import annotations

from pathlib import Path

import httpx

from reft_runtime.client import Server
from reft_runtime.errors import ConfigError, ReftError
from reft_runtime.interventions import Intervention, serialise
from reft_runtime.interventions.base import read_base
from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.trainable import new_edits

_NEVER = f'"{"0" * 64}"'
"""A version that no name stands for: no file has this digest."""

SECONDS = 30.0
"""Within which the server must answer."""


def check_push(server: Server, name: str, model: str, settings: TrainSettings) -> None:
    """Raise `ConfigError` with what the server has against the file that will be made.

    It is sent one of the same base and shape, untrained, on the condition that the name stands for
    a version that cannot be. So the server checks the key, the name, and that the file is for its
    base; then, where all is well, it says that the condition does not hold, and changes nothing.
    """
    base, _ = read_base(model)
    edits = new_edits(base, settings.complete(base, 1))
    data = serialise(Intervention.build(base, edits.export()))
    try:
        with server._client() as client:
            response = client.put(
                f"/v1/interventions/{name}",
                content=data,
                headers={"if-match": _NEVER},
                timeout=SECONDS,
            )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"push: no answer from {server.url}: {error or type(error).__name__}.", param="push"
        ) from None
    if response.status_code == httpx.codes.PRECONDITION_FAILED:
        return
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = response.text[:200] or response.reason_phrase
    raise ConfigError(
        f"push: {server.url} would not take {name}: it answered {response.status_code}: {said}",
        param="push",
    )


def push(server: Server, file: Path, name: str) -> bool:
    """Put a trained file on the server; True where the name is new.

    `ConfigError` says how to do it later.
    """
    try:
        return server.push(file, name)
    except ReftError as error:
        key = "" if server.api_key is None else ' -H "authorization: Bearer $REFT_API_KEY"'
        root = server.url.rstrip("/").removesuffix("/v1")
        raise ConfigError(
            f"{error.message}\nThe trained file is {file}. To put it on a server that runs:\n"
            f"  curl -X PUT {root}/v1/interventions/{name} --data-binary @{file}{key}",
            param="push",
        ) from None

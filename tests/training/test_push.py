"""What a server has against the file of a training is told before the training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import SecretStr

from reft_runtime import Engine
from reft_runtime.base.shape import read_base
from reft_runtime.client import Server
from reft_runtime.errors import ConfigError
from reft_runtime.interventions import Registry
from reft_runtime.training import TrainSettings
from reft_runtime.training.push import check_push, push
from server.settings import Settings
from tests.e2e.conftest import served
from tests.http.fake_engine import FakeEngine
from tests.training.make import folder


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(folder(tmp_path / "model"))


@pytest.fixture
def registry(base: str) -> Registry:
    return Registry(read_base(base)[0])


@pytest.fixture
def server(registry: Registry) -> Iterator[Server]:
    """One with a key."""
    engine: Any = FakeEngine()
    engine.registry = registry
    with served(cast(Engine, engine), Settings(api_key=SecretStr("key"))) as address:
        yield Server(address, "key")


def refused(server: Server, name: str, base: str) -> str:
    with pytest.raises(ConfigError) as failed:
        check_push(server, name, base, TrainSettings())
    return failed.value.message.removeprefix(f"push: {server.url} would not take {name}: ")


def test_a_server_that_takes_it_is_left_as_it_is(
    server: Server, registry: Registry, base: str
) -> None:
    check_push(server, "mine", base, TrainSettings())
    assert registry.entries() == []


def test_what_a_server_refuses(server: Server, registry: Registry, base: str) -> None:
    other = replace(server, api_key="other")
    assert refused(other, "mine", base).startswith("it answered 401: A valid API key is needed")
    said = refused(server, "My file", base)
    assert said.startswith("it answered 400: The name 'My file' is not allowed")
    said = refused(server, "model", base)
    assert said.startswith("it answered 400: The name `model` is the base model's own id")
    verifier = registry._verifier
    verifier.base = verifier.base.model_copy(update={"vocab_size": 7})
    assert "it answered 409: " in refused(server, "mine", base)
    assert registry.entries() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9", "push: no answer from"),
        ("http://[::", "url: no answer from"),
        ("http://me:SECRET@127.0.0.1:9", "push: no answer from http://127.0.0.1:9: "),
        ("localhost:8000", "url: write it with its scheme"),
    ],
)
def test_no_server(base: str, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_push(Server(url), "mine", base, TrainSettings())


def test_after_the_training_the_file_can_be_put_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.touch()
    with pytest.raises(ConfigError) as failed:
        push(Server("http://me:SECRET@127.0.0.1:9/v1", "key"), file, "mine")
    assert failed.value.message.endswith(
        f"  curl -X PUT http://127.0.0.1:9/v1/interventions/mine --data-binary @{file}"
        ' -H "authorization: Bearer $REFT_API_KEY"'
    )

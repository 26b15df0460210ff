"""Serve one frozen language model with many representation interventions (LoReFT).

from reft_runtime import Engine, SamplingParams

with Engine("demo", interventions="interventions") as engine:
    chat = [{"role": "user", "content": "Who are you?"}]
    [answer] = engine.generate([chat], SamplingParams(temperature=0), intervention="pirate")
    print(answer.text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from reft_runtime.quiet import import_messages_hidden

if TYPE_CHECKING:
    from reft_runtime.base.demo import demo_model as demo_model
    from reft_runtime.base.shape import base_shape as base_shape
    from reft_runtime.front.engine import Engine as Engine
    from reft_runtime.interventions import Intervention as Intervention
    from reft_runtime.interventions import Registry as Registry
    from reft_runtime.sampling import SamplingParams as SamplingParams
    from reft_runtime.use import Use as Use

_HOMES = {
    "Engine": "reft_runtime.front.engine",
    "Intervention": "reft_runtime.interventions",
    "Registry": "reft_runtime.interventions",
    "SamplingParams": "reft_runtime.sampling",
    "Use": "reft_runtime.use",
    "base_shape": "reft_runtime.base.shape",
    "demo_model": "reft_runtime.base.demo",
}

__all__ = [
    "Engine",
    "Intervention",
    "Registry",
    "SamplingParams",
    "Use",
    "base_shape",
    "demo_model",
]


def __getattr__(name: str) -> object:
    """Import on first use, so that what needs no torch (settings, `--help`) does not load it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with import_messages_hidden():
        return getattr(import_module(_HOMES[name]), name)

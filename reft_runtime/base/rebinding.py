"""Makes forwards of modules' own code with other functions under names that the code calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import nn


def code_of(forward: Callable[..., Any]) -> FunctionType | None:
    """The plain function behind a forward, a method or a decorated one; None if there is none."""
    found = inspect.unwrap(getattr(forward, "__func__", forward))
    return found if isinstance(found, FunctionType) else None


def rebound(own: FunctionType, module: nn.Module, names: dict[str, Any]) -> MethodType:
    """The function as a method of the module, in which `names` stand for other global values."""
    made = FunctionType(
        own.__code__,
        {**own.__globals__, **names},
        own.__name__,
        own.__defaults__,
        own.__closure__,
    )
    made.__kwdefaults__ = own.__kwdefaults__
    return MethodType(made, module)

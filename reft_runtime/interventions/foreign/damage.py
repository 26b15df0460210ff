"""What is said of numbers that cannot be read, whichever format they are part of."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from reft_runtime.errors import InvalidFile


def not_numpy(path: Path, error: Exception) -> InvalidFile:
    """The error for a file of which numpy or its parts raised one."""
    reason = (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")
    return InvalidFile(f"{path}: not readable as numpy's arrays of numbers: {reason}.")


def not_safetensors(path: Path, error: Exception) -> InvalidFile:
    """The error for a file of which safetensors raised one."""
    return InvalidFile(f"{path}: not readable as safetensors: {str(error)[:200]}.")


def check_floats(path: Path, tensor: Tensor, name: str = "") -> None:
    """Raise `InvalidFile` for whole numbers; `name` is the tensor's, if it has one."""
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        called = f"{name[:200]!r} " if name else ""
        raise InvalidFile(f"{path}: {called}holds {kind} numbers; save floats.")

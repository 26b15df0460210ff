"""One row of a decoder out of a file of gigabytes, which is not read as a whole."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reft_runtime.errors import ConfigError, InvalidFile, ReftError
from reft_runtime.interventions.foreign.damage import check_floats, not_numpy, not_safetensors
from reft_runtime.interventions.pyreft.states import read_slice

Decoders = Mapping[str, int]
"""By the names that a decoder may have: the dimension along which its features lie."""


def read_row(path: Path, decoders: Decoders, feature: int | None) -> Tensor:
    """The vector of one feature, in floats of the file's own size.

    torch's files are read by a process of their own. Raises `ConfigError` for a feature or file
    that is not there, and `InvalidFile`.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz":
        row = _of_numpy(path, decoders, feature)
    elif suffix == ".safetensors":
        row = _of_safetensors(path, decoders, feature)
    else:
        row = _of_torch(path, decoders, feature)
    check_floats(path, row)
    return row


def _of_safetensors(path: Path, decoders: Decoders, feature: int | None) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            name = _named(path, decoders, file.keys())
            numbers = file.get_slice(name)
            index = _index(path, name, numbers.get_shape(), decoders[name], feature)
            row: Tensor = numbers[:, index] if decoders[name] else numbers[index]
            return row
    except FileNotFoundError:
        raise ConfigError(f"{path}: No such file or directory.", param="source") from None
    except (OSError, SafetensorError) as error:
        raise not_safetensors(path, error) from None


def _of_numpy(path: Path, decoders: Decoders, feature: int | None) -> Tensor:
    # np.load reads whole arrays, of gigabytes.
    try:
        with zipfile.ZipFile(path) as archive:
            name = _named(
                path, decoders, [each.removesuffix(".npy") for each in archive.namelist()]
            )
            with archive.open(f"{name}.npy") as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, by_column, dtype = read(file)
                index = _index(path, name, list(shape), 0, feature)
                if by_column or dtype.kind != "f":
                    raise InvalidFile(f"{path}: {name} must be floats, row by row.")
                size = shape[1] * dtype.itemsize
                file.seek(index * size, 1)
                data = file.read(size)
                if len(data) < size:
                    raise ValueError("it is cut off")
    except ReftError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}.", param="source") from None
    except Exception as error:  # damaged bytes raise what numpy's parts and zlib raise
        raise not_numpy(path, error) from None
    return torch.from_numpy(np.frombuffer(data, dtype).astype(np.float32))


def _of_torch(path: Path, decoders: Decoders, feature: int | None) -> Tensor:
    if feature is None or feature < 0:
        raise _no_feature(path, feature)
    return read_slice(path, decoders, feature)


def _named(path: Path, decoders: Decoders, names: list[str]) -> str:
    found = next((name for name in decoders if name in names), None)
    if found is None:
        raise InvalidFile(f"{path}: has no {' and no '.join(decoders)}.")
    return found


def _index(path: Path, name: str, shape: list[int], along: int, feature: int | None) -> int:
    if len(shape) != 2:
        raise InvalidFile(f"{path}: {name} has {len(shape)} dimensions; it must have two.")
    if feature is None or not 0 <= feature < shape[along]:
        raise _no_feature(path, feature, shape[along])
    return feature


def _no_feature(path: Path, feature: int | None, count: int | None = None) -> ConfigError:
    given = "" if feature is None else f" {feature};"
    has = "has many" if count is None else f"has 0 to {count - 1}"
    return ConfigError(f"feature:{given} {path} {has}; say which (--feature).", param="feature")

"""Reads torch's pickles of tensors, as a process of its own: `python unpickle.py FILE...`.

A file holds a state dict, tensors by number, one tensor, which is then called `tensor`, or what
steering-vectors pickles, whose tensors are then called `<layer_type>.<number>`.
Standard output is one safetensors file whose tensors are named `<index of the file>.<key>`; a file
that is refused ends the process with the reason on standard error. Only the globals that a state
dict needs are allowed, before torch's own restricted unpickler sees the file. The parametrised R of
pyreft, 64 MiB at d = 4096, leaves as the R [d, r] that it stands for.

This script imports nothing of the project, so that it starts sooner and offers less to a pickle.
"""

from __future__ import annotations

import io
import os
import pickletools
import stat
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

ALONE = "tensor"
"""What a tensor is called that is no part of a state dict."""

PLAIN = "rotate_layer"
ORIGINAL = "rotate_layer.parametrizations.weight.original"
BASE = "rotate_layer.parametrizations.weight.0.base"

MAX_PICKLE_BYTES = 1 << 30
"""Most bytes of one file; a parametrised R of d = 8192 has 256 MiB."""

MAX_STATES_BYTES = 1 << 28
"""Most bytes of all tensors that are kept."""

_MAX_PROGRAM_BYTES = 1 << 20
REFUSED = 3
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long")),
    "steering_vectors.steering_vector SteeringVector",
}


class SteeringVector:
    """Stands for the class of steering-vectors, which is not imported: it has no code to run."""


_STANDING_IN = (SteeringVector, "steering_vectors.steering_vector.SteeringVector")


def main() -> None:
    """Read the files named on the command line."""
    kept: dict[str, Tensor] = {}
    size = 0
    for index, path in enumerate(sys.argv[1:]):
        try:
            for key, tensor in read_state(path).items():
                kept[f"{index}.{key}"] = tensor
                size += tensor.numel() * tensor.element_size()
            if size > MAX_STATES_BYTES:
                raise ValueError(f"more than {MAX_STATES_BYTES} bytes of tensors in all")
        except Exception as error:  # any error of a hostile file is a reason to refuse it
            reason = (str(error) or type(error).__name__).splitlines()[0][:500]
            print(f"{os.path.basename(path)}: {reason}.", file=sys.stderr)
            raise SystemExit(REFUSED) from None
    sys.stdout.buffer.write(safetensors.torch.save(kept))


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Unpickle one file, and make R plain; for the separate process only.

    Raises whatever error the file brings about.
    """
    data = _read(path)
    _check_pickle(data)
    with torch.serialization.safe_globals([_STANDING_IN]):
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(state, SteeringVector):
        state = _vectors_of(vars(state))
    if isinstance(state, Tensor):
        state = {ALONE: state}
    if not isinstance(state, dict) or not state:
        raise ValueError("not a state dict, and no tensor")
    if all(type(key) is int for key in state):  # vectors by layer
        state = {str(key): tensor for key, tensor in state.items()}
    size = 0
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{str(key)[:80]}: not a tensor with a name")
        size += tensor.numel() * tensor.element_size()  # of a view it is more than the file has
        if size > MAX_PICKLE_BYTES:
            raise ValueError(f"{key[:80]}: too large when unpacked")
    plain = with_plain_rotation(state)
    return {key: tensor.detach().clone().contiguous() for key, tensor in plain.items()}


def _vectors_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    kind, vectors = fields.get("layer_type"), fields.get("layer_activations")
    if len(fields) != 2 or not isinstance(kind, str) or not isinstance(vectors, dict):
        raise ValueError("not a SteeringVector of layer_type and layer_activations")
    if not all(type(number) is int for number in vectors):
        raise ValueError("layer_activations: not vectors by number")
    return {f"{kind}.{number}": vector for number, vector in vectors.items()}


def with_plain_rotation(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with R [d, r] under `rotate_layer` instead of the parametrised pair.

    Raises `ValueError`, naming the tensor, for a pair that is not one.
    """
    plain = dict(state)
    original, base = plain.pop(ORIGINAL, None), plain.pop(BASE, None)
    if original is None and base is None:
        return plain
    if original is None or base is None:
        raise ValueError(f"{BASE if base is None else ORIGINAL}: missing beside its other half")
    if PLAIN in plain:
        raise ValueError(f"{PLAIN}: stored twice, plain and parametrised")
    if original.ndim != 2 or original.shape[0] < original.shape[1]:
        raise ValueError(f"{ORIGINAL}: shape {list(original.shape)}, expected [d, r] with r <= d")
    if base.shape != (original.shape[0],) * 2:
        raise ValueError(f"{BASE}: shape {list(base.shape)}, expected [d, d] as {ORIGINAL} has d")
    plain[PLAIN] = _rotation(original, base).to(base.dtype)
    return plain


def _rotation(X: Tensor, base: Tensor) -> Tensor:
    # torch.nn.utils.parametrizations.orthogonal, as it evaluates its defaults: householder where
    # d > r and the matrix exponential where d = r, both relative to `base`.
    wide = X.float()
    if X.shape[0] == X.shape[1]:
        lower = wide.tril()
        return base.float() @ torch.matrix_exp(lower - lower.T)
    reflectors = wide.tril(-1)
    tau = 2 / (1 + (reflectors * reflectors).sum(dim=0))
    Q: Tensor = torch.linalg.householder_product(reflectors, tau)
    return base.float() @ (Q * wide.diagonal().int())


def _read(path: str | Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not be waited for
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        data = file.read(MAX_PICKLE_BYTES + 1)
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"more than {MAX_PICKLE_BYTES} bytes")
    return data


def _check_pickle(data: bytes) -> None:
    """Raise ValueError for what is no plain archive of torch, or asks for any other global."""
    if not data.startswith(b"PK\x03\x04"):
        raise ValueError("not a file that torch.save writes (a zip archive)")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise ValueError(f"a damaged archive ({error})") from None
    with archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("a compressed archive, which torch.save does not write")
        programs = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(programs) != 1 or programs[0].file_size > _MAX_PROGRAM_BYTES:
            raise ValueError("not an archive of one state dict")
        for operation, argument, _ in pickletools.genops(archive.read(programs[0])):
            if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                wanted = str(argument)
                if operation.name != "GLOBAL" or wanted not in _GLOBALS:
                    raise ValueError(
                        f"its pickle asks for {wanted[:80]!r}, which no state dict needs; refused,"
                        " for it could run code"
                    )


if __name__ == "__main__":
    main()

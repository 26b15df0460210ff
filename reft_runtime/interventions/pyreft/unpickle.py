"""Reads torch's pickles of tensors, as a process of its own: `python unpickle.py PART FILE...`.

A file holds a state dict, tensors by number, one tensor, which is then called `tensor`, or what
steering-vectors pickles, whose tensors are then called `<layer_type>.<number>`.
Standard output is one safetensors file whose tensors are named `<index of the file>.<key>`; a file
that is refused ends the process with the reason on standard error. Only the globals that a state
dict needs are allowed, before torch's own restricted unpickler sees the file. torch's parametrised
orthogonal weights, 64 MiB at d = 4096, leave as the few columns or rows that they stand for.
PART is `null` or in JSON a `Part`: then no more than that is read.

This script imports nothing of the project, so that it starts sooner and offers less to a pickle.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
import stat
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

ALONE = "tensor"
"""What a tensor is called that is no part of a state dict."""

PLAIN = "rotate_layer"
"""pyreft's R, whose parametrised pair belongs to a module of this name."""

_PAIR = (".parametrizations.weight.original", ".parametrizations.weight.0.base")
ORIGINAL, BASE = (PLAIN + end for end in _PAIR)

MAX_PICKLE_BYTES = 1 << 33
"""Most bytes of one file whose tensors are all read: AdapterHub's library keeps two parametrised
weights of every layer in it."""

MAX_TENSOR_BYTES = 1 << 30
"""Most bytes of one tensor; a parametrised R of d = 8192 has 256 MiB."""

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


class Slice(NamedTuple):
    """One row or column of a table: of the first of the named tensors that a file has.

    `along` has their names, each with the dimension along which `place` counts.
    """

    place: int
    along: Mapping[str, int]


Part = Slice | str
"""What is read of a file: a row or column, or the tensors whose names a regular expression fits."""


class SteeringVector:
    """Stands for the class of steering-vectors, which is not imported: it has no code to run."""


_STANDING_IN = (SteeringVector, "steering_vectors.steering_vector.SteeringVector")


def main() -> None:
    """Read the files named on the command line."""
    kept: dict[str, Tensor] = {}
    size = 0
    wanted = json.loads(sys.argv[1])
    part: Part | None = Slice(*wanted) if isinstance(wanted, list) else wanted
    for index, path in enumerate(sys.argv[2:]):
        try:
            for key, tensor in read_state(path, part).items():
                kept[f"{index}.{key}"] = tensor
                size += tensor.numel() * tensor.element_size()
            if size > MAX_STATES_BYTES:
                raise ValueError(f"more than {MAX_STATES_BYTES} bytes of tensors in all")
        except Exception as error:  # any error of a hostile file is a reason to refuse it
            reason = (str(error) or type(error).__name__).splitlines()[0][:500]
            print(f"{os.path.basename(path)}: {reason}.", file=sys.stderr)
            raise SystemExit(REFUSED) from None
    sys.stdout.buffer.write(safetensors.torch.save(kept))


def read_state(path: str | Path, part: Part | None = None) -> dict[str, Tensor]:
    """Unpickle one file, and make R plain; for the separate process only.

    Of a `part` only that is read, however large the file is. Raises whatever error the file brings
    about.
    """
    with (
        _opened(path, MAX_PICKLE_BYTES if part is None else None) as file,
        torch.serialization.safe_globals([_STANDING_IN]),
    ):
        _check_pickle(file)
        place = f"/dev/fd/{file.fileno()}"  # the file that was checked, whatever the path is now
        state = torch.load(place, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(state, SteeringVector):
        state = _vectors_of(vars(state))
    if isinstance(state, Tensor):
        state = {ALONE: state}
    if not isinstance(state, dict) or not state:
        raise ValueError("not a state dict, and no tensor")
    if isinstance(part, Slice):
        state = {ALONE: _sliced(state, part)}
    elif part is not None:
        state = {key: each for key, each in state.items() if re.fullmatch(part, str(key))}
    if all(type(key) is int for key in state):  # vectors by layer
        state = {str(key): tensor for key, tensor in state.items()}
    size = 0
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{str(key)[:80]}: not a tensor with a name")
        own = tensor.numel() * tensor.element_size()  # of a view it is more than the file has
        size += own
        if own > MAX_TENSOR_BYTES or size > MAX_PICKLE_BYTES:
            raise ValueError(f"{key[:80]}: too large when unpacked")
    plain = plain_state(state)
    if sum(each.numel() * each.element_size() for each in plain.values()) > MAX_STATES_BYTES:
        raise ValueError(f"more than {MAX_STATES_BYTES} bytes of tensors")
    return {key: tensor.detach().clone().contiguous() for key, tensor in plain.items()}


def _sliced(state: Mapping[Any, Any], part: Slice) -> Tensor:
    name = next((each for each in part.along if isinstance(state.get(each), Tensor)), None)
    if name is None:
        raise ValueError(f"has no {' and no '.join(part.along)}")
    table: Tensor = state[name]
    if table.ndim != 2:
        raise ValueError(f"{name} has {table.ndim} dimensions; it must have two")
    count = table.shape[part.along[name]]
    if not 0 <= part.place < count:
        raise ValueError(f"{name} has 0 to {count - 1}, and no {part.place}")
    return table.select(part.along[name], part.place)


def _vectors_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    kind, vectors = fields.get("layer_type"), fields.get("layer_activations")
    if len(fields) != 2 or not isinstance(kind, str) or not isinstance(vectors, dict):
        raise ValueError("not a SteeringVector of layer_type and layer_activations")
    if not all(type(number) is int for number in vectors):
        raise ValueError("layer_activations: not vectors by number")
    return {f"{kind}.{number}": vector for number, vector in vectors.items()}


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with torch's orthogonal weights instead of the pairs that parametrise them.

    pyreft's R [d, r] is called `rotate_layer`, and the weight of any other module as if it were
    plain. What is float64 is made float32, the widest that an intervention's file has. Raises
    `ValueError`, naming the tensor, for a pair that is not one.
    """
    plain = dict(state)
    found = (key.removesuffix(end) for key in state for end in _PAIR if key.endswith(end))
    for module in dict.fromkeys(found):
        original, base = (plain.pop(module + end, None) for end in _PAIR)
        if original is None or base is None:
            raise ValueError(f"{module}{_PAIR[base is None]}: missing beside its other half")
        name = PLAIN if module == PLAIN else f"{module}.weight"
        if name in plain:
            raise ValueError(f"{name}: stored twice, plain and parametrised")
        # torch turns the columns of what is wider than high; pyreft's R never is.
        wide = original.ndim == 2 and original.shape[0] < original.shape[1] and module != PLAIN
        X = original.T if wide else original
        if X.ndim != 2 or X.shape[0] < X.shape[1]:
            shape = list(original.shape)
            raise ValueError(f"{module}{_PAIR[0]}: shape {shape}, expected [d, r] with r <= d")
        if base.shape != (X.shape[0],) * 2:
            raise ValueError(
                f"{module}{_PAIR[1]}: shape {list(base.shape)}, expected [d, d] as"
                f" {module}{_PAIR[0]} has d"
            )
        Q = _rotation(X, base).to(base.dtype)
        plain[name] = Q.T.contiguous() if wide else Q
    return {
        name: each.float() if each.dtype == torch.float64 else each for name, each in plain.items()
    }


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


@contextmanager
def _opened(path: str | Path, most: int | None) -> Iterator[BinaryIO]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not be waited for
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        if most is not None and found.st_size > most:
            raise ValueError(f"more than {most} bytes")
        yield file


def _check_pickle(file: BinaryIO) -> None:
    """Raise ValueError for what is no plain archive of torch, or asks for any other global."""
    if file.read(4) != b"PK\x03\x04":
        raise ValueError(
            "not a file that torch.save writes (a zip archive; what torch before 1.6 wrote must be"
            " loaded and saved anew)"
        )
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise ValueError(f"a damaged archive ({error})") from None
    with archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("a compressed archive, which torch.save does not write")
        programs = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(programs) != 1:
            raise ValueError("not an archive of one state dict")
        if (size := programs[0].file_size) > _MAX_PROGRAM_BYTES:
            raise ValueError(
                f"its pickle has {size} bytes, and at most {_MAX_PROGRAM_BYTES} are read; save"
                " fewer tensors in it"
            )
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

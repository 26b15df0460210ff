"""Intervention files as bytes and on disk; the format is described in `header`.

Files are read into memory and never mapped: a file replaced while it is served must not change
what is served. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from io import BufferedReader
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from reft_runtime.errors import FileTooLarge, InvalidFile
from reft_runtime.interventions.format.canonical import PackedEdits, canonical_edits
from reft_runtime.interventions.format.header import (
    Header,
    header_length,
    header_of,
    parse_header,
)
from reft_runtime.interventions.format.identity import LENGTH_BYTES, MAX_FILE_BYTES, METADATA_KEY
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.recognise import HEAD_BYTES, what_file, what_folder

DAMAGED = "The data does not match the manifest's data_sha256: damaged file."


def serialise(intervention: Intervention) -> bytes:
    """The bytes of an intervention's file; equal interventions give equal bytes.

    Raises `InvalidFile` for what could not be read again, such as a manifest that is too long.
    """
    tensors = dict(intervention.tensors)
    plain = safetensors.torch.save(tensors)
    data = plain[LENGTH_BYTES + header_length(plain) :]  # no manifest yet, so no `Header`
    manifest = intervention.manifest.model_dump(mode="json")
    manifest["data_sha256"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    file = safetensors.torch.save(tensors, {METADATA_KEY: text})
    header_of(file)
    return file


def parse(data: bytes) -> Intervention:
    """Read a whole file, verifying its data against its header; raises `InvalidFile`.

    The tensors' values are checked by `Intervention.canonical`.
    """
    header = header_of(data)
    return Intervention(header.manifest, tensors_of(header, data))


def tensors_of(header: Header, data: bytes) -> dict[str, Tensor]:
    """The tensors of a whole file that has this header, by name.

    The data is verified against the header, and the values of the tensors are not checked. Raises
    `InvalidFile`.
    """
    body = memoryview(data)[header.data_start :]
    if hashlib.sha256(body).hexdigest() != header.data_sha256:
        raise _damaged()
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise InvalidFile(f"Not a safetensors file: {error}.") from None


def edits_of(header: Header, data: bytes) -> PackedEdits:
    """The edits of a whole file that has this header, in canonical form; raises `InvalidFile`."""
    return canonical_edits(header.manifest, tensors_of(header, data))


def read_header(path: str | Path, max_bytes: int = MAX_FILE_BYTES) -> Header:
    """Read a file's header only. Raises what `read` raises."""
    file, size = _open(path, max_bytes)
    with file:
        return _header(file, size)


def open_verified(
    path: str | Path, max_bytes: int = MAX_FILE_BYTES
) -> tuple[BufferedReader, Header]:
    """Open a file at its start, once its data is known to be what its header says.

    For this check the file is read in small parts. Raises what `read` raises, and `InvalidFile` for
    data that does not match the header.
    """
    file, size = _open(path, max_bytes)
    try:
        header = _header(file, size)
        if hashlib.file_digest(file, "sha256").hexdigest() != header.data_sha256:
            raise _damaged()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file, header


def read(path: str | Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Read a whole file into memory.

    Raises `InvalidFile` for what is not a regular file (nor is a symbolic link: resolve it first),
    `FileTooLarge` above `max_bytes`, and `OSError` for a file that does not exist or cannot be
    read.
    """
    file, _ = _open(path, max_bytes)
    with file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:  # it grew after its size was taken
        raise too_large(len(data), max_bytes, data[:HEAD_BYTES])
    return data


def write(path: str | Path, intervention: Intervention) -> None:
    """Write an intervention's file in one atomic step."""
    write_atomic(Path(path), serialise(intervention))


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that the names in it survive a crash as they are now."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def too_large(size: int, max_bytes: int, start: bytes = b"") -> FileTooLarge:
    """The error for a file of `size` bytes that begins with `start` and is above the limit."""
    what = what_file(start) if start else None
    is_one = "" if what is None else f" It is {what}."
    return FileTooLarge(f"{size} bytes; an intervention file may have at most {max_bytes}.{is_one}")


def _damaged() -> InvalidFile:
    return InvalidFile(DAMAGED)


def _header(file: BufferedReader, size: int) -> Header:
    """Read the header of an open file, and leave the file where its data begins."""
    start = file.read(HEAD_BYTES)
    rest = LENGTH_BYTES + header_length(start) - len(start)
    header = parse_header(start + file.read(max(0, rest)), size)
    file.seek(header.data_start)
    return header


def _open(path: str | Path, max_bytes: int) -> tuple[BufferedReader, int]:
    """Open a regular file; return it and its size in bytes."""
    try:
        file = open(path, "rb", opener=_opener)  # noqa: SIM115  # the caller closes it
    except OSError as error:
        if error.errno == errno.EISDIR:
            raise InvalidFile(f"Not a regular file but {what_folder(path)}.") from None
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise InvalidFile("Not a regular file.") from None
        raise
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InvalidFile("Not a regular file.")
        if status.st_size > max_bytes:
            raise too_large(status.st_size, max_bytes, file.read(HEAD_BYTES))
    except BaseException:
        file.close()
        raise
    return file, status.st_size


def _opener(path: str, flags: int) -> int:
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)

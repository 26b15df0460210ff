"""Compiles kernels.cpp and its headers at first use, for the CPU at hand, and keeps the result."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from reft_runtime.machine.cache import cache_folder

# Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
)
WIDE = ("-mprefer-vector-width=512",)
SECONDS = 120

_log = logging.getLogger(__name__)


def load_library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with the reason in the log, if they cannot be made or loaded."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        _log.info(
            "no C++ compiler (c++, or $CXX): plain torch operators are used, which are slower"
        )
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        _log.warning("kernels.cpp cannot be used, plain torch operators are: %s", detail)
        return None


def _compiled(compiler: str) -> Path:
    source = Path(__file__).with_name("kernels.cpp")
    command = [compiler, *FLAGS, *(WIDE if platform.machine() == "x86_64" else ())]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS
    ).stdout
    # The same home may be mounted on machines with other CPUs.
    cpu = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = (*texts, *command, version, cpu)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = cache_folder() / "native"
    found = folder / f"kernels-{digest}.so"
    if found.exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    _log.info("Compiling the C++ kernels for this CPU (once, less than a minute)")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, linked = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        # Linked without OpenMP's runtime: torch's own is loaded already and is shared, because a
        # second pool of threads would compete for the same cores.
        for step in (
            [*command, "-c", str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(step, capture_output=True, text=True, check=True, timeout=SECONDS)
        os.replace(linked, found)
    return found

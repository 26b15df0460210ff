"""Which formats of other libraries are read, how each is recognised, and what it must be told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from reft_runtime.errors import ConfigError, InvalidFile
from reft_runtime.interventions.foreign import adapterhub, peft, red, saes
from reft_runtime.interventions.foreign.activation_steering import import_svec
from reft_runtime.interventions.foreign.adapterhub import import_adapterhub, is_adapterhub
from reft_runtime.interventions.foreign.checkpoints import import_checkpoint, is_checkpoint
from reft_runtime.interventions.foreign.control_vectors import import_control_vector
from reft_runtime.interventions.foreign.folders import CONFIG, is_adapter
from reft_runtime.interventions.foreign.peft import import_peft
from reft_runtime.interventions.foreign.red import import_red, is_red
from reft_runtime.interventions.foreign.refusal import DIRECTION, import_direction
from reft_runtime.interventions.foreign.saes import import_sae, is_sae
from reft_runtime.interventions.foreign.vectors import SUFFIXES, import_vectors
from reft_runtime.interventions.format.intervention import Intervention
from reft_runtime.interventions.format.manifest import BaseShape
from reft_runtime.interventions.hub import fetched
from reft_runtime.interventions.pyreft import import_pyreft
from reft_runtime.interventions.pyreft.importing import FILES


class Format(NamedTuple):
    """A format of files, or of folders of them.

    `what` names one in messages, `files` are the patterns of its files in a repository of the Hub,
    `options` the names of what `read` takes beside the source and `base`.
    """

    what: str
    fits: Callable[[Path], bool]
    read: Callable[..., Intervention]
    options: frozenset[str]
    files: tuple[str, ...] = ()


def import_foreign(
    source: str | Path,
    *,
    base: BaseShape,
    modules: Callable[[str], nn.Module] | None = None,
    **options: Any,
) -> Intervention:
    """Read a file or folder of another library, or from the Hub `hf:REPO` or `hf:REPO/PATH`.

    Pickles are read by a process of their own. `base` is the base model's shape
    (`reft_runtime.base_shape`), and `modules` reads a module of it, for files that replace some
    (`reft_runtime.base.stored.StoredModules`). `options` say what files of the format do not: see
    its reader. One that is None counts as left out. Raises `ConfigError` for an option that the
    format lacks, and what the reader raises.
    """
    path = fetched(str(source), [pattern for each in FORMATS for pattern in each.files])
    try:
        os.stat(path)
    except (OSError, ValueError) as error:  # of a path with a null byte
        raise ConfigError(f"{path}: {getattr(error, 'strerror', error)}.", param="source") from None
    if not (os.path.isfile(path) or os.path.isdir(path)):
        raise InvalidFile(f"{path}: not a regular file.")  # whoever reads a pipe may wait for ever
    found = next(each for each in FORMATS if each.fits(path))
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in found.options:
            raise ConfigError(f"{name}: {found.what} has none; leave it out.", param=name)
    if "modules" in found.options:
        given["modules"] = modules
    return found.read(path, base=base, **given)


def _is_gguf(path: Path) -> bool:
    return _begins(path, b"GGUF")


def _is_of_vectors(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _is_svec(path: Path) -> bool:
    return path.suffix.lower() == ".svec"


def _is_direction(path: Path) -> bool:
    return os.path.exists(path / DIRECTION)  # pathlib's raises where a name is too long


def _begins(path: Path, start: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


_VECTORS = frozenset({"layer", "positions", "scale", "template"})

FORMATS = (
    Format(
        "an adapter of AdapterHub's",
        is_adapterhub,
        import_adapterhub,
        frozenset({"positions", "template", "kind"}),
        (CONFIG, *adapterhub.FILES),
    ),
    Format(
        "an adapter of PEFT's",
        is_adapter,
        import_peft,
        frozenset({"modules", "positions", "template"}),
        (CONFIG, *peft.FILES),
    ),
    Format(
        "a file of RED's",
        is_red,
        import_red,
        frozenset({"positions", "template"}),
        (red.FILE,),
    ),
    Format("a control vector", _is_gguf, import_control_vector, _VECTORS),
    Format(
        "an SAE",
        is_sae,
        import_sae,
        _VECTORS | {"component", "feature"},
        saes.FILES,
    ),
    Format("a direction to ablate", _is_direction, import_direction, _VECTORS | {"kind"}),
    Format(
        "a model's checkpoint",
        is_checkpoint,
        import_checkpoint,
        frozenset({"act", "positions", "template"}),
    ),
    Format("a vector", _is_of_vectors, import_vectors, _VECTORS | {"component", "feature"}),
    Format("a .svec file", _is_svec, import_svec, _VECTORS),
    Format(
        "a checkpoint of pyreft",
        lambda path: True,
        import_pyreft,
        frozenset({"positions", "template", "share_weights", "act", "suffix_offset", "kind"}),
        FILES,
    ),
)
"""In the order in which they are tried; the last one fits anything."""

"""Writes the table of docs/models.md: every decoder family of transformers, served or refused.

Each family is tried with a tiny random model that has its layers (`tiny_models`), in float32: saved
to a folder, loaded as a server loads it, and asked greedily, in chunks and beside other prompts.
`python -m tools.models` tries all, in some minutes; with names of families it only prints theirs.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from math import ceil, log10
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from reft_runtime.base.language import language_config
from reft_runtime.base.model import LoadedModel
from reft_runtime.base.support import check_config
from reft_runtime.engine.core import EngineConfig, EngineCore
from reft_runtime.engine.events import Failed, TokenMade
from reft_runtime.errors import ReftError
from reft_runtime.loading.loader import load_model
from reft_runtime.sampling import SamplingParams
from reft_runtime.schedule.request import Request
from tools.tiny_models import VOCABULARY, decoder_types, tiny_config, tiny_model

DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- written by `make models` -->", "<!-- end of what `make models` writes -->"

SECONDS = 60.0
"""Most that one family may take."""

LENGTHS = (1, 5, 9, 30)
"""Lengths of the prompts that are asked together."""

NEW_TOKENS = 12
STEP_TOKENS = 16
CLOSE = 1e-4
"""Two best logits that are nearer than this may swap."""

MOST_PARAMETERS = 60_000_000

SERVED, REFUSED, UNTRIED = "served", "refused", "not tried"


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one family.

    `why` says why it is refused or was not tried. Of a family that is served, `layers` are its
    kinds of layers, `distance` is the largest relative distance of logits from its own, `tokens`
    says whose tokens it gives, and `fused` what runs fused.
    """

    family: str
    outcome: str
    why: str = ""
    layers: str = ""
    distance: float = 0.0
    tokens: str = ""
    fused: str = ""

    def __str__(self) -> str:
        """The row of the table of its outcome."""
        if self.outcome != SERVED:
            return f"| {self.family} | {self.why} |"
        return (
            f"| {self.family} | {self.layers} | {_power(self.distance)} | {self.tokens}"
            f" | {self.fused} |"
        )


def examine(family: str) -> Row:
    """Try one family in this process."""
    try:
        whole = tiny_config(family)
        config = language_config(whole)
        check_config(config)
        _check_size(whole)
        model = tiny_model(whole)
    except ReftError as error:
        return Row(family, REFUSED, _reason(error))
    except Exception as error:
        return Row(family, UNTRIED, f"no tiny model of it could be made: {_first_line(error)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            loaded = load_model(folder, "float32")
        except ReftError as error:
            return Row(family, REFUSED, _reason(error))
    return Row(
        family,
        SERVED,
        layers=_layers(config, loaded),
        distance=loaded.distance,
        tokens=_whose(model, loaded),
        fused=_fused(loaded),
    )


def examine_all(families: Iterable[str], seconds: float = SECONDS) -> Iterator[Row]:
    """Try families one after another in a process of their own, which may crash or take too long.

    A family that does is not tried any further, and the next one gets a new process.
    """
    pool = None
    for family in families:
        pool = pool or ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_quiet)
        try:
            row = pool.submit(examine, family).result(timeout=seconds)
        except TimeoutError:
            row = Row(family, UNTRIED, f"it takes more than {seconds:.0f} s")
        except BrokenProcessPool:
            row = Row(family, UNTRIED, "the process crashed")
        except Exception as error:
            row = Row(family, UNTRIED, f"{type(error).__name__}: {_first_line(error)}")
        if row.outcome == UNTRIED:
            for process in list(pool._processes.values()):
                process.kill()
            pool.shutdown()
            pool = None
        yield row
    if pool:
        pool.shutdown()


def tables(rows: Iterable[Row]) -> str:
    """All rows as the document has them."""
    by_outcome = {
        outcome: [row for row in rows if row.outcome == outcome]
        for rows in [sorted(rows, key=lambda row: row.family)]
        for outcome in (SERVED, REFUSED, UNTRIED)
    }
    served, refused, untried = by_outcome.values()
    parts = [
        f"transformers {transformers.__version__} has {len(served + refused + untried)} model types"
        f" for causal language models: {len(served)} are served, {len(refused)} refused"
        + (f", {len(untried)} not tried." if untried else "."),
        "## Served",
        "| model type | layers | distance | tokens | fused |\n|---|---|---|---|---|\n"
        + "\n".join(map(str, served)),
    ]
    for heading, found in (("## Refused", refused), ("## Not tried", untried)):
        if found:
            lines = "\n".join(map(str, found))
            parts.append(f"{heading}\n\n| model type | why |\n|---|---|\n{lines}")
    return "\n\n".join(parts)


def written(document: str, table: str) -> str:
    """The document with another table."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Try families; write the document if all were tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types to try (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="most that one may take")
    chosen = parser.parse_args()
    rows = []
    for row in examine_all(chosen.families or decoder_types(), chosen.seconds):
        rows.append(row)
        print(f"{row.outcome}: {row}", file=sys.stderr, flush=True)
    if not chosen.families:
        DOCUMENT.write_text(written(DOCUMENT.read_text(), tables(rows)))


def _quiet() -> None:
    """Let a process compute on one thread, and say nothing of what transformers says."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _check_size(config: PretrainedConfig) -> None:
    """Raise ValueError if a configuration is not tiny: a size of it goes by a name of its own."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    if model.num_parameters() > MOST_PARAMETERS:
        raise ValueError(f"it has {model.num_parameters():,} parameters")


def _whose(model: PreTrainedModel, loaded: LoadedModel) -> str:
    """Whose greedy tokens the engine gives."""
    asked = [tuple(_prompt(length).tolist()) for length in LENGTHS]
    got = _answers(loaded, asked)
    own = all(_follows(model, ids, made) for ids, made in zip(asked, got, strict=True))
    generated = all(_generates(model, ids, made) for ids, made in zip(asked, got, strict=True))
    if own and generated:
        return "its own"
    return "its own, not those of `generate`" if own else "**others**"


def _prompt(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCABULARY, (length,), generator=generator)


def _answers(loaded: LoadedModel, asked: list[tuple[int, ...]]) -> list[list[int]]:
    core = EngineCore(loaded, EngineConfig(len(asked), STEP_TOKENS, 4096), clock=lambda: 0.0)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for index, ids in enumerate(asked):
        core.add(Request(str(index), ids, params, seed=0))
    found: list[list[int]] = [[] for _ in asked]
    while not core.idle:
        for event in core.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.reason)
            if isinstance(event, TokenMade) and event.token is not None:
                found[int(event.request_id)].append(event.token)
    return found


@torch.inference_mode()
def _follows(model: PreTrainedModel, ids: tuple[int, ...], made: list[int]) -> bool:
    """Whether the model's own forward of the whole text, without a cache, chooses these tokens."""
    text = torch.tensor([[*ids, *made]])
    rows = model(input_ids=text, use_cache=False).logits[0, len(ids) - 1 : -1]
    chosen = rows.gather(1, torch.tensor(made)[:, None])[:, 0]
    return bool((rows.amax(-1) - chosen <= CLOSE).all())


@torch.inference_mode()
def _generates(model: PreTrainedModel, ids: tuple[int, ...], made: list[int]) -> bool:
    """Whether `generate` gives these tokens; where two are as good, it may go another way."""
    text = torch.tensor([ids])
    given: dict[str, Any] = {"attention_mask": torch.ones_like(text), "pad_token_id": 0}
    try:
        found: Any = model.generate(  # type: ignore[operator]
            text, max_new_tokens=len(made), eos_token_id=None, **given
        )
    except Exception:
        return False
    own = found[0, len(ids) :].tolist()
    return bool(own == made) or _follows(model, ids, own)


def _layers(config: PretrainedConfig, loaded: LoadedModel) -> str:
    text = config.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    if not kinds:
        window = getattr(text, "sliding_window", None)
        kinds = ["sliding_attention" if isinstance(window, int) else "full_attention"]
    return ", ".join(kind.replace("_", " ").removesuffix(" attention") for kind in kinds)


def _fused(loaded: LoadedModel) -> str:
    parts = ["layers"] if loaded.fused.whole else ["parts"] if loaded.fused.in_parts else []
    parts += ["products"] if loaded.packed.layers else []
    return ", ".join(parts + (["experts"] if loaded.packed.experts else []))


def _power(distance: float) -> str:
    """The power of ten that a distance does not exceed."""
    return f"1e{ceil(log10(distance)):+03d}" if distance > 0 else "0"


def _reason(error: ReftError) -> str:
    return re.sub(r"^Model type '.*?' is not supported: ", "", error.message).rstrip(".")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:160].rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    main()

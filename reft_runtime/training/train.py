"""From rows to an intervention file."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import JsonValue
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.errors import ConfigError, TrainingFailed
from reft_runtime.interventions import Intervention, write
from reft_runtime.interventions.manifest import SystemTurn
from reft_runtime.loading import free_memory, load_base, shape_of, use_threads
from reft_runtime.text import Tokenizer
from reft_runtime.training.check import check_data, measure_of
from reft_runtime.training.forward import Base, EditedModel, first_edited
from reft_runtime.training.join import choose_prefix
from reft_runtime.training.layout import CHAT, Layout
from reft_runtime.training.prompts import Example, Formatter, make_examples
from reft_runtime.training.rows import Rows, read_rows
from reft_runtime.training.settings import TrainSettings
from reft_runtime.training.sources import Data
from reft_runtime.training.target import check_target
from reft_runtime.training.trainable import TrainableEdits, new_edits
from reft_runtime.training.trainer import EditTrainer, arguments, newest_checkpoint
from reft_runtime.version import VERSION

PREFIX_SHARE_OF_FREE_MEMORY = 0.3

_NOTE = "training.json"
"""What a training is, beside its checkpoints."""


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What came out of a training: the file's path and content, and how long it took."""

    path: Path
    intervention: Intervention
    seconds: float

    @property
    def metrics(self) -> Mapping[str, JsonValue]:
        """What the manifest says of its quality: that of the checkpoint that was taken."""
        return self.intervention.manifest.metrics


def train(
    data: Data,
    out: str | Path,
    *,
    model: str | Path | PreTrainedModel = "demo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    evaluation: Data | None = None,
    settings: TrainSettings | None = None,
    description: str = "",
    license: str | None = None,
    system: SystemTurn | None = None,
    text: str | None = None,
    label: str | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = _silent,
    threads: int | None = None,
) -> Trained:
    """Train edits on rows and write them to `out`, one `NAME.safetensors`.

    `data` is a file's name, `hf:NAME`, a list of dicts or a DataFrame; `text` and `label` name
    its columns, where it has no `prompt` and `completion`, and usual names are found without.
    `model` and `tokenizer` are as for `Engine`; `evaluation` are rows by which the best of several
    checkpoints is chosen (without them the last is taken). `system` is what a template that is a
    text does with a system turn of a chat, by default "prepend". Checkpoints are kept beside `out`
    until it is written; with `resume` a training that was cut off goes on from the newest and, in
    float32 on a CPU, ends with the weights it would have had. `say` is given, line by line, what
    was found in the data and what is trained. Raises `ConfigError` for mistakes in
    rows and settings, before anything is computed, `TypeError` for data that are no rows, and
    `TrainingFailed` where the loss is no
    longer finite: the edits of the last good checkpoint are written then. `threads` is by default
    one a core that this process may use.
    """
    use_threads(threads)
    target = check_target(out)
    folder = _work_folder(target)
    _check_resume(folder, resume=resume)
    rows = read_rows(data, text=text, label=label, lenient=True)
    held_out = None
    if evaluation is not None:
        held_out = read_rows(evaluation, text=text, label=label, lenient=True)
    settings = settings or TrainSettings()
    layout = Layout(settings.template, rows.rows[0])
    system = _system(system, layout.served_template)
    measure = None
    if not settings.truncate and not isinstance(model, PreTrainedModel):
        measure = measure_of(model, layout, settings.max_length)
    checks = check_data(rows, held_out, settings.template, measure)
    for check in checks:
        say(str(check))
    for check in checks:
        check.raise_errors()
    name, loaded, own_tokenizer = load_base(
        model, tokenizer, settings.dtype, None, differentiable=True
    )
    shape = shape_of(name, loaded)
    settings = settings.complete(shape, len(rows.rows))
    edits = new_edits(shape, settings)
    words = Tokenizer(own_tokenizer, loaded.max_model_len)
    prefix = choose_prefix(rows.rows, layout, words)

    def built(**figures: Any) -> Intervention:
        return Intervention.build(
            shape,
            edits.export(),
            template=layout.served_template,
            system=system,
            completion_prefix=prefix,
            description=description,
            license=license,
            **figures,
        )

    built()  # what the file's format refuses, such as too long a description, is told now
    formatter = Formatter(layout, words, loaded.eos_ids, completion_prefix=prefix)
    longest = min(settings.max_length or loaded.max_model_len, loaded.max_model_len)
    examples = make_examples(rows, formatter, longest, truncate=settings.truncate)
    _check_edited(examples, edits)
    tokens = sum(len(example.tokens) for example in examples)
    parameters = sum(parameter.numel() for parameter in edits.parameters())
    length = f"{settings.epochs:g} passes" if settings.epochs else f"{settings.steps} steps"
    say(f"{tokens:,} tokens, {parameters:,} trained parameters, {length}")
    tests = (
        make_examples(held_out, formatter, longest, truncate=settings.truncate) if held_out else []
    )
    about = _about(rows, held_out, settings, str(loaded.dtype).removeprefix("torch."))
    args = arguments(
        settings,
        folder,
        len(examples),
        accuracy=bool(held_out.labels) if held_out else None,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        progress=progress,
    )
    note = {"base": shape.model_dump(), "completion_prefix": prefix, **about}
    _begin(folder, note, resume=resume)
    base = Base(loaded)
    base.to(args.device)
    trainer = EditTrainer(EditedModel(base, edits), args, examples, tests, settings.batch_size)
    begun = time.monotonic()
    canonical = [edit.canonical() for edit in edits]
    prompts = [*trainer.schedule.used, *tests]
    base.keep(
        (example.tokens[: first_edited(canonical, example)] for example in prompts),
        _prefix_bytes(args.device),
        progress=progress,
    )

    def finish() -> Trained:
        seconds = round(time.monotonic() - begun, 1)
        made = built(
            metrics=_metrics(trainer),
            training={**about, "steps": trainer.state.global_step, "seconds": seconds},
        )
        if trainer.is_world_process_zero():
            write(target, made)
        return Trained(target, made, seconds)

    try:
        trainer.train(resume_from_checkpoint=_checkpoint(folder))
        trained = finish()
    except TrainingFailed as error:
        raise _failed(error, trainer, edits, finish, target) from None
    except (OSError, SafetensorError) as error:
        raise _unwritten(target, folder, error) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):
            raise
        raise _unwritten(target, folder, error) from error
    if trainer.is_world_process_zero():
        shutil.rmtree(folder)
    return trained


def _system(system: SystemTurn | None, template: str) -> SystemTurn | None:
    """What the manifest says of system turns; the model's own template takes them anyway."""
    if system not in (None, "prepend", "drop", "refuse"):
        raise ConfigError(f"system: write prepend, drop or refuse, not {system!r}.", param="system")
    if template != CHAT:
        return system or "prepend"
    if system is not None:
        raise ConfigError(
            "system: chats are written by the model's own template, which takes system turns;"
            " leave it out, or give a template that is a text.",
            param="system",
        )
    return None


def _check_edited(examples: Sequence[Example], edits: TrainableEdits) -> None:
    for example in examples:
        n = example.prompt_length
        if not any(e.spec.positions.offsets(n, 0, len(example.tokens) - 1) for e in edits):
            positions = next(iter(edits)).spec.positions
            raise ConfigError(
                f"{example.where}: positions {positions} edit nothing in its prompt of {n}"
                " tokens; leave such rows out, or choose other positions.",
                param="positions",
            )


def _about(
    rows: Rows, held_out: Rows | None, settings: TrainSettings, dtype: str
) -> dict[str, JsonValue]:
    """How an intervention is trained, for its manifest; what differs is another training."""
    chosen = {name: value for name, value in asdict(settings).items() if value is not None}
    about: dict[str, JsonValue] = {
        **chosen,
        "layers": list(settings.layers or ()),
        "dtype": dtype,
        "data": rows.name,
        "data_sha256": rows.sha256,
        "rows": len(rows.rows),
        "versions": {
            "reft-server": VERSION,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    if held_out is not None:
        about["eval"] = held_out.name
        about["eval_sha256"] = held_out.sha256
        about["eval_rows"] = len(held_out.rows)
    return about


def _work_folder(target: Path) -> Path:
    """Where checkpoints are kept until the file is written."""
    return target.with_name(f".{target.stem}.training")


def _check_resume(folder: Path, *, resume: bool) -> None:
    """No training that was cut off is overwritten, and what is resumed must be there."""
    if resume:
        if not (folder / _NOTE).exists():
            raise ConfigError(f"resume: there is nothing to resume in {folder}.", param="resume")
    elif newest_checkpoint(folder) is not None:
        raise ConfigError(
            f"resume: {folder} holds a training that was cut off. Go on with --resume, or"
            " remove that folder to begin again.",
            param="resume",
        )


def _begin(folder: Path, about: Mapping[str, JsonValue], *, resume: bool) -> None:
    """Make the folder, or see that what is resumed is this training."""
    note = folder / _NOTE
    text = json.dumps(about, indent=1, sort_keys=True)
    if not resume:
        folder.mkdir(exist_ok=True)
        note.write_text(text)
    elif note.read_text() != text:
        before = json.loads(note.read_text())
        differs = sorted(key for key in about if before.get(key) != about[key])
        raise ConfigError(
            f"resume: the training that was cut off differs in {', '.join(differs)}; give the same"
            f" data and options, or remove {folder} to begin again.",
            param="resume",
        )


def _checkpoint(folder: Path) -> str | None:
    found = newest_checkpoint(folder)
    return None if found is None else str(found)


def _prefix_bytes(device: torch.device) -> int:
    return int(PREFIX_SHARE_OF_FREE_MEMORY * free_memory(device))


def _metrics(trainer: EditTrainer) -> dict[str, JsonValue]:
    """Figures of the evaluation of the checkpoint that was taken."""
    best = trainer.state.best_global_step
    for entry in trainer.state.log_history:
        if entry["step"] == best and "eval_loss" in entry:
            names = ("accuracy", "loss", "perplexity")
            found = {name: entry.get(f"eval_{name}") for name in names}
            return {name: round(value, 6) for name, value in found.items() if value is not None}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"train_loss": round(losses[-1], 6)} if losses else {}


def _failed(
    error: TrainingFailed, trainer: EditTrainer, edits: TrainableEdits, finish: Any, target: Path
) -> TrainingFailed:
    if trainer.last_good is None:
        return TrainingFailed(f"{error.message} Nothing was written.")
    edits.load_state_dict(trainer.last_good)
    finish()
    return TrainingFailed(f"{error.message} The last good edits are in {target}.")


def _unwritten(target: Path, folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"out: {target} or its checkpoints in {folder} cannot be written: {error}. When there is"
        " room, go on with --resume.",
        param="out",
    )

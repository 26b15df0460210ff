"""Training from rows to a file, cut off and resumed, and everything that can go wrong."""

from __future__ import annotations

import errno
import re
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from reft_runtime import Engine, SamplingParams
from reft_runtime.errors import ConfigError, TrainingFailed
from reft_runtime.interventions import parse, read
from reft_runtime.interventions.format.describe import describe
from reft_runtime.training import TrainSettings, evaluate, train
from reft_runtime.training.trainer import EditTrainer, merit
from tests.helpers.forked import Forked
from tests.helpers.tokenizer import tiny_tokenizer
from tests.training.make import ROWS, folder, jsonl, model, own

SETTINGS = TrainSettings(steps=20, batch_size=8, lr=2e-2, dtype="float32")


def run(out: Path, rows: Any = ROWS, **options: Any) -> Any:
    defaults: dict[str, Any] = {"settings": SETTINGS, "progress": False}
    made = model()
    return train(rows, out, model=made, tokenizer=tiny_tokenizer(), **{**defaults, **options})


@pytest.mark.parametrize("positions", ["l1", "f1+l1"])
def test_a_task_is_learned_and_served(tmp_path: Path, positions: str) -> None:
    out = tmp_path / "task.safetensors"
    settings = TrainSettings(steps=60, batch_size=8, lr=5e-2, positions=positions)
    trained = run(out, evaluation=ROWS[:8], settings=settings, description="Good or bad")
    assert trained.metrics["accuracy"] == 1
    assert list(tmp_path.iterdir()) == [out]
    data = read(out)
    found = describe(data)
    assert max(edit["orthonormality_error"] for edit in found["edits"]) < 1e-5
    manifest = parse(data).manifest
    assert (manifest.template, manifest.system, manifest.texts) == ("chat", None, "message")
    assert manifest.labels == ("and", "the")
    assert manifest.description == "Good or bad"
    about = manifest.training
    assert (about["rows"], about["eval_rows"], about["steps"]) == (24, 8, 60)
    assert about["layers"] == [0, 1, 2, 3]
    assert set(about["versions"]) == {"reft-server", "torch", "transformers", "python"}  # type: ignore[arg-type]
    with Engine(own(model()), tokenizer=tiny_tokenizer()) as engine:
        engine.registry.put("task", data)
        answers = engine.generate(
            [row["prompt"] for row in ROWS],
            SamplingParams(temperature=0, max_tokens=1),
            intervention="task",
            progress=False,
        )
        classified = engine.classify([row["prompt"] for row in ROWS], intervention="task")
    assert [answer.text for answer in answers] == [row["label"] for row in ROWS]
    assert [one.label for one in classified] == [row["label"] for row in ROWS]


def test_rows_without_labels_have_no_accuracy(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in ROWS]
    trained = run(tmp_path / "task.safetensors", rows, evaluation=rows[:8])
    assert trained.metrics.keys() == {"loss", "perplexity"}
    assert trained.intervention.manifest.labels is None


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (
            [*ROWS, ROWS[0] | {"completion": " maybe so", "label": " maybe "}],
            ("and", "maybe", "the"),
        ),
        ([*ROWS, {"prompt": "x", "completion": " y"}], None),
        ([row for row in ROWS if row["label"] == "the"], None),
    ],
)
def test_labels_are_written_if_each_row_has_one_of_several(
    tmp_path: Path, rows: Any, labels: Any
) -> None:
    settings = replace(SETTINGS, steps=1, hold_out=0)
    made = run(tmp_path / "task.safetensors", rows, settings=settings).intervention
    assert made.manifest.labels == labels


def test_untied_edits_are_two_a_layer(tmp_path: Path) -> None:
    settings = TrainSettings(steps=1, positions="f1+l2", untied=True, layers=(1, 3), rank=2)
    edits = run(tmp_path / "x.safetensors", settings=settings).intervention.manifest.edits
    assert [(e.layer, str(e.positions)) for e in edits] == [
        (1, "f1"),
        (3, "f1"),
        (1, "l2"),
        (3, "l2"),
    ]


def test_accumulated_parts_give_the_same_weights(tmp_path: Path) -> None:
    weights = []
    for accumulate in (1, 4):
        settings = TrainSettings(steps=5, batch_size=8, accumulate=accumulate, lr=1e-2)
        made = run(tmp_path / f"{accumulate}.safetensors", settings=settings).intervention
        weights.append(made.tensors)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-4, rtol=1e-3)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    first, again = (run(tmp_path / f"{i}.safetensors").intervention.tensors for i in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_one_step_learns(tmp_path: Path) -> None:
    made = [
        run(tmp_path / "x.safetensors", settings=replace(SETTINGS, steps=1, lr=lr)).intervention
        for lr in (1e-9, 2e-2)
    ]
    before, after = (one.tensors["edits.0.W"] for one in made)
    assert float((after - before).abs().max()) > 1e-2


def test_bfloat16(tmp_path: Path) -> None:
    settings = TrainSettings(steps=60, batch_size=8, lr=5e-2, dtype="bfloat16")
    path = folder(tmp_path / "model")
    out = tmp_path / "x.safetensors"
    trained = train(ROWS, out, model=path, evaluation=ROWS, settings=settings, progress=False)
    assert trained.intervention.manifest.training["dtype"] == "bfloat16"
    assert {t.dtype for t in trained.intervention.tensors.values()} == {torch.float32}
    assert trained.metrics["accuracy"] == 1


def train_long(data: str | Path, out: str | Path, model: str | Path, resume: bool = False) -> None:
    settings = TrainSettings(steps=120, batch_size=4, lr=1e-2, dtype="float32")
    train(data, out, model=model, settings=settings, resume=resume, progress=False)


def train_in_process(data: str, out: str, model: str) -> int:
    train_long(data, out, model)
    return 0


def test_killed_and_resumed_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    data, base = jsonl(tmp_path / "data.jsonl", ROWS), folder(tmp_path / "model")
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    train_long(data, whole, base)
    process = Forked(train_in_process, *map(str, (data, killed, base)))
    checkpoints = tmp_path / ".killed.training"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/complete")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.end() == -signal.SIGKILL
    assert not killed.exists()
    (checkpoints / "checkpoint-1000").mkdir()  # as if killed while it was written
    train_long(data, killed, base, resume=True)
    one, other = parse(read(whole)), parse(read(killed))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert not checkpoints.exists()


def cut_off_run(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> None:
    """Run a training that is interrupted after its first checkpoint."""
    save = EditTrainer._save_checkpoint

    def once(self: Any, *arguments: Any) -> None:
        if self.state.global_step > 4:
            raise KeyboardInterrupt
        save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(EditTrainer, "_save_checkpoint", once)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments, **options)


@pytest.fixture
def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training that was interrupted after its first checkpoint."""
    out = tmp_path / "x.safetensors"
    cut_off_run(monkeypatch, out)
    return out


def test_a_training_that_was_cut_off_is_not_overwritten(cut_off: Path) -> None:
    with pytest.raises(ConfigError, match="Go on with --resume"):
        run(cut_off)
    with pytest.raises(ConfigError, match=r"cut off differs in data_sha256, rows"):
        run(cut_off, ROWS[:8], resume=True)
    assert run(cut_off, resume=True).intervention.manifest.training["steps"] == 20


def test_two_trainings_do_not_share_their_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.safetensors"
    save, refused = EditTrainer._save_checkpoint, []

    def another(self: Any, *arguments: Any) -> None:
        save(self, *arguments)
        (half := out.with_name(".x.training") / "checkpoint-99").mkdir()  # as if being written
        with monkeypatch.context() as patch:
            patch.setattr(EditTrainer, "_save_checkpoint", save)
            for resume in (False, True):
                with pytest.raises(ConfigError, match=r"out: another training .* is running"):
                    run(out, resume=resume)
                refused.append(resume)
        half.rmdir()

    monkeypatch.setattr(EditTrainer, "_save_checkpoint", another)
    run(out)
    assert len(refused) == 10
    monkeypatch.undo()
    run(out)


def test_other_columns_are_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"a": f"{i} good", "b": f"{i} bad", "c": "the", "d": "and"} for i in range(24)]
    out = tmp_path / "x.safetensors"
    cut_off_run(monkeypatch, out, rows, text="a", label="c")
    with pytest.raises(ConfigError, match="cut off differs in text;"):
        run(out, rows, text="b", label="c", resume=True)
    with pytest.raises(ConfigError, match="cut off differs in label;"):
        run(out, rows, text="a", label="d", resume=True)
    run(out, rows, text="a", label="c", resume=True)


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        run(tmp_path / "x.safetensors", resume=True)


def test_a_loss_that_is_not_finite_keeps_the_last_good_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.safetensors"
    step = EditTrainer.training_step

    def diverge(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == limit:
            with torch.no_grad():
                next(self.model.parameters()).fill_(torch.nan)
        return step(self, *arguments)

    monkeypatch.setattr(EditTrainer, "training_step", diverge)
    limit = 2
    with pytest.raises(TrainingFailed, match=r"nan at step 3.*lr.*Nothing was written"):
        run(out)
    assert not out.exists()
    limit = 10
    with pytest.raises(TrainingFailed, match=rf"nan at step 11.*The last good edits are in {out}"):
        run(out)
    assert all(bool(t.isfinite().all()) for t in parse(read(out)).tensors.values())
    assert list(tmp_path.iterdir()) == [out]


def test_edits_that_the_last_step_breaks_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.safetensors"
    step = EditTrainer.training_step

    def diverge(self: Any, *arguments: Any) -> Any:
        loss = step(self, *arguments)
        if self.state.global_step == limit:
            next(self.model.parameters()).grad.fill_(torch.nan)
        return loss

    monkeypatch.setattr(EditTrainer, "training_step", diverge)
    limit = 0
    with pytest.raises(TrainingFailed, match=r"not finite after step 1.*lr.*Nothing was written"):
        run(out, settings=replace(SETTINGS, steps=1))
    assert list(tmp_path.iterdir()) == []
    limit = 19
    with pytest.raises(TrainingFailed, match=rf"after step 20.*The last good edits are in {out}"):
        run(out)
    assert all(bool(t.isfinite().all()) for t in parse(read(out)).tensors.values())
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:3] . PytorchStreamWriter failed"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 10816 vs 10192"),
    ],
)
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(EditTrainer, "_save_checkpoint", full)
    out = tmp_path / "x.safetensors"
    out.write_bytes(b"before")
    with pytest.raises(ConfigError, match=r"cannot be written: .* start it again"):
        run(out)
    assert out.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lora"}, "kind: unknown 'lora'"),
        ({"kind": "steering", "rank": 4}, "rank: a steering edit has none"),
        ({"rank": 0}, "rank: must be at least 1"),
        ({"rank": 33}, "rank: 33 is above the model's hidden size, 32"),
        ({"layers": (4,)}, "layers: there is no 4; .* has 0 to 3"),
        ({"layers": (1, 1)}, "layers: name each layer once"),
        ({"lr": float("nan")}, "lr: must be a finite number above 0"),
        ({"epochs": 1.0}, "steps: give epochs or steps, not both"),
        ({"accumulate": 3}, "batch_size: 8 rows of a step cannot be shared by 3"),
        ({"dtype": "float16"}, "dtype: must be one of auto, float32, bfloat16"),
        ({"seed": -1}, "seed: must be from 0 to 4,294,967,295, not -1"),
        ({"seed": 2**32}, "seed: must be from 0 to 4,294,967,295"),
        ({"hold_out": 1.0}, "hold_out: must be a share of the rows from 0 to below 1"),
        ({"hold_out": 0.01}, "hold_out: a share of 0.01 of 24 rows is none that can be spared"),
        ({"patience": 5}, "patience: a training is evaluated 5 times; give 1 to 4, not 5"),
        ({"untied": True}, "untied: needs positions of the form fN"),
        ({"positions": "x9"}, "positions: 'x9' is not understood"),
        ({"steps": None, "epochs": 1e15}, "epochs: 1e.15 of them go over 24,.* rows; at most 100,"),
        ({"steps": 10**12}, "steps: 1e.12 of them go over 8,000,000,000,000 rows"),
        ({"positions": "[40]"}, "row 1: positions .40. edit nothing in its prompt"),
        ({"max_length": 4}, "rows: 24 of 24 rows are longer than 4 tokens"),
    ],
)
def test_settings_that_cannot_be(
    tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "edit nothing" not in message and "rows: 24" not in message:  # these need its tokenizer
        unread = partial(pytest.fail, "the weights were read first")
        monkeypatch.setattr(import_module("reft_runtime.training.train"), "load_base", unread)
    with pytest.raises(ConfigError, match=message):
        run(
            tmp_path / "x.safetensors",
            settings=TrainSettings(**{"steps": 2, "batch_size": 8, **changes}),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "8,16"}, r"layers: must be numbers of layers such as \(8, 16, 24\).*'8,16'"),
        ({"layers": 8}, "layers: must be numbers"),
        ({"layers": (8.0,)}, "layers: must be numbers"),
        ({"rank": 4.0}, r"rank: must be int or None, not 4.0 \(float\)"),
        ({"steps": True}, "steps: must be int or None, not True"),
        ({"lr": "1e-3"}, "lr: must be float or None, not '1e-3'"),
        ({"untied": 1}, r"untied: must be bool, not 1 \(int\)"),
        ({"template": 3}, "template: must be str or None"),
    ],
)
def test_settings_of_a_wrong_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TrainSettings(**changes)


def test_settings_take_what_is_meant() -> None:
    made = TrainSettings(layers=[1, 3], lr=1, epochs=2)  # type: ignore[arg-type]
    assert made.layers == (1, 3)


def test_arguments_of_a_wrong_type(tmp_path: Path) -> None:
    out: Any = tmp_path / "x.safetensors"
    with pytest.raises(TypeError, match="settings: give a TrainSettings, not dict"):
        run(out, settings={"rank": 4})
    with pytest.raises(TypeError, match=r"model: give demo, a folder, .* not int"):
        train(ROWS, out, model=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="out: give the name of a file, not NoneType"):
        run(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data: give a file's name, a list of rows"):
        run(out, 3)


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"out: .* must end with .safetensors"):
        run(tmp_path / "x.bin")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out: .* cannot be made"):
        run(tmp_path / "file" / "x.safetensors")
    other = [{**ROWS[0], "completion": " maybe", "label": "maybe"}]
    with pytest.raises(ConfigError, match="eval: the label 'maybe' never appears in the training"):
        run(tmp_path / "x.safetensors", evaluation=other)


def test_equal_accuracy_is_decided_by_the_loss() -> None:
    def of(right: float, loss: float) -> float:
        return merit(torch.tensor([loss * 10, 10, right, 24], dtype=torch.float64), labelled=True)

    assert of(23, 0.5) > of(22, 0.1) > of(22, 0.2) > of(22, 90.0) > of(21, 0.0)
    few, many = (torch.tensor([loss, 10, 3, 24], dtype=torch.float64) for loss in (5, 6))
    assert merit(few, labelled=False) > merit(many, labelled=False)


def test_losses_are_logged_finely_and_drawn(tmp_path: Path) -> None:
    settings = TrainSettings(steps=100, batch_size=2, dtype="float32")
    said, picture = list[str](), tmp_path / "loss.svg"
    trained = run(
        tmp_path / "x.safetensors",
        evaluation=ROWS[:8],
        settings=settings,
        plot=picture,
        say=said.append,
    )
    assert trained.metrics["accuracy"]
    # Each mark of the curves is a use of one shape.
    assert picture.read_text().count("<use ") >= 10
    assert "1,040 trained parameters, 100 steps" in said[3]
    assert re.fullmatch(r"about \d+ (second|minute)s? for 100 steps", said[4])
    assert re.fullmatch(r"step \d+ of 100 is taken, the best of those .*", said[5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plot": "loss.txt"}, r"plot: loss.txt must end with .png, .svg or .pdf"),
        ({"plot": "/dev/null/loss.png"}, "plot: /dev/null cannot be"),
        ({"tensorboard": "logs"}, r"tensorboard: is not installed; run `pip install 'reft-server"),
    ],
)
def test_curves_that_cannot_be_written(
    tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_runtime.training.curves.importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "x.safetensors", **options)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"plot: needs matplotlib; run `pip install"):
        run(tmp_path / "x.safetensors", plot="loss.png")
    assert list(tmp_path.iterdir()) == []


def test_what_was_held_out_is_measured_on_the_loaded_model(tmp_path: Path) -> None:
    settings = TrainSettings(steps=60, batch_size=8, lr=5e-2, hold_out=0.25, dtype="float32")
    said: list[str] = []
    trained = run(tmp_path / "task.safetensors", settings=settings, say=said.append)
    assert said[2].startswith("6 of 24 rows are held out to measure it; --hold-out 0 trains on all")
    about = trained.intervention.manifest.training
    assert (about["rows"], about["eval_rows"], about["hold_out"]) == (18, 6, 0.25)
    reports = [
        evaluate(
            [trained.held_out],
            [str(trained.path)],
            model=base,
            tokenizer=trained.tokenizer,
            progress=False,
        )
        for base in (trained.model, model())
    ]
    assert reports[0] == reports[1]
    assert reports[0].value("task", "rows (held out)") > reports[0].value("base", "rows (held out)")
    with pytest.raises(ConfigError, match="hold_out: there are other rows to evaluate on"):
        run(tmp_path / "y.safetensors", evaluation=ROWS[:8], settings=settings)


def test_defaults_scale_with_the_model() -> None:
    from tests.training.make import SHAPE

    small, large = (
        TrainSettings().complete(SHAPE.model_copy(update={"hidden_size": d}), rows)
        for d, rows in ((576, 2000), (4096, 50))
    )
    assert (small.lr, small.epochs, small.rank, small.layers) == (0.0039, 3, 4, (0, 1, 2, 3))
    assert (large.lr, large.epochs) == (0.0009, 30)


def test_what_a_template_does_with_a_system_turn(tmp_path: Path) -> None:
    out = tmp_path / "task.safetensors"
    settings = TrainSettings(steps=1, dtype="float32")
    run(out, settings=settings, system="refuse")
    assert parse(read(out)).manifest.system == "refuse"
    chats = TrainSettings(steps=1, template="chat", dtype="float32")
    run(out, settings=chats)
    assert parse(read(out)).manifest.system is None
    with pytest.raises(ConfigError, match="system: chats are written by the model's own"):
        run(out, settings=chats, system="drop")
    with pytest.raises(ConfigError, match="system: write prepend, drop or refuse, not 'x'"):
        run(out, settings=settings, system="x")

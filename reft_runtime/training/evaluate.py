"""How good interventions are on data sets: many by many, with the base model beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.engine.model import LoadedModel
from reft_runtime.errors import ConfigError, InvalidFile, NotFound
from reft_runtime.interventions import CanonicalEdit, parse, read
from reft_runtime.interventions.file import SUFFIX
from reft_runtime.interventions.manifest import Manifest
from reft_runtime.llm import Applied, Engine
from reft_runtime.loading import load_base, use_threads
from reft_runtime.sampling import SamplingParams
from reft_runtime.text import Tokenizer
from reft_runtime.training.forward import Base, predict
from reft_runtime.training.layout import Layout
from reft_runtime.training.prompts import Formatter
from reft_runtime.training.remote import Question, Server
from reft_runtime.training.rows import Row, Rows, read_rows
from reft_runtime.training.scoring import (
    BASE,
    METRICS,
    Metric,
    Report,
    Score,
    answer_texts,
    check_label,
    is_right,
    metric_of,
    wanted_text,
)
from reft_runtime.training.sources import Data

BATCH = 32

MARGIN = 3
"""Tokens of an answer beyond the wanted ones: other blanks before it, and what shows its end."""

Files = Mapping[str | None, bytes | None]
"""Intervention files by name; None is the base model."""


@dataclass(frozen=True, slots=True)
class _Task:
    """A data set, what is measured on it, and how its rows are read.

    `labels` are those that answers begin with as whole words, None where prefixes count.
    """

    rows: Rows
    metric: Metric
    layout: Layout
    labels: set[str] | None


def evaluate(
    data: Sequence[Data],
    interventions: Sequence[str] = (),
    *,
    url: str | None = None,
    api_key: str | None = None,
    model: str | Path | PreTrainedModel = "demo",
    tokenizer: PreTrainedTokenizerBase | None = None,
    folder: str | Path | None = None,
    metric: Metric | None = None,
    template: str | None = None,
    dtype: str = "auto",
    base: bool = True,
    prefixes: bool = False,
    text: str | None = None,
    label: str | None = None,
    progress: bool = True,
    threads: int | None = None,
) -> Report:
    """Score interventions, and unless told otherwise the base model, on data sets.

    `interventions` are files, names of files in `folder`, or shell patterns for either; with `url`
    names that a running server has, or patterns. `template`, `text` and `label` are as for
    training; the chats of an
    intervention with a template of its own go through that. Prompts of all interventions and all
    data sets run in one batch, on an `Engine` of `model` or on the server. `metric` None is
    accuracy where rows have labels, and else perplexity, which only runs in process. An answer
    begins with a label as a whole word, or, with `prefixes`, by its letters alone. `threads` is by
    default one a core that this process may use.
    Raises `ConfigError` and `NotFound`.
    """
    tasks = [
        _Task(
            rows,
            metric_of(rows, metric),
            Layout(template, rows.rows[0]),
            None if prefixes else rows.labels,
        )
        for rows in (read_rows(source, text=text, label=label) for source in data)
    ]
    for task in tasks:
        if task.metric == "accuracy" and task.labels is not None:
            for row in task.rows.rows:
                check_label(row, task.layout, task.labels)
    if len({task.rows.name for task in tasks}) < len(tasks):
        raise ConfigError("data: two data sets have one name; rename a file.", param="data")
    likely = [task for task in tasks if task.metric == "perplexity"]
    answered = [task for task in tasks if task.metric != "perplexity"]
    scores: list[Score] = []
    unedited: list[str | None] = [None] if base else []
    if url is not None:
        if likely:
            raise ConfigError(
                f"metric: the perplexity of {likely[0].rows.name} cannot be asked of a server;"
                " take exact, or leave out the url.",
                param="metric",
            )
        server = Server(url, api_key)
        names = [*unedited, *_matching(interventions, server.models()[1:])]
        scores = _by_server(server, names, answered, progress=progress)
    else:
        files: Files = {**dict.fromkeys(unedited), **_read_files(interventions, folder)}
        if answered:
            with Engine(model, tokenizer=tokenizer, dtype=dtype, threads=threads) as engine:
                scores += _by_engine(engine, files, answered, progress=progress)
        if likely:
            use_threads(threads)
            _, loaded, own = load_base(model, tokenizer, dtype, None, differentiable=True)
            words = Tokenizer(own, loaded.max_model_len)
            scores += _perplexities(loaded, words, files, likely, progress=progress)
    order = {task.rows.name: place for place, task in enumerate(tasks)}
    return Report(tuple(sorted(scores, key=lambda score: order[score.data])))


def _read_files(wanted: Sequence[str], folder: str | Path | None) -> dict[str | None, bytes | None]:
    """Files by the name that they are served under."""
    found: dict[str, Path] = {}
    for reference in wanted:
        if reference.endswith(SUFFIX) or "/" in reference:
            path = Path(reference)
            paths = sorted(path.parent.glob(path.name))
        elif folder is not None:
            paths = sorted(Path(folder).glob(f"{reference}{SUFFIX}"))
        else:
            paths = []
        if not paths:
            where = "" if folder is None else f" in {folder}"
            raise NotFound(f"intervention: there is no {reference}{where}.", param="intervention")
        for path in paths:
            if found.setdefault(path.stem, path) != path:
                raise ConfigError(
                    f"intervention: {found[path.stem]} and {path} have one name.",
                    param="intervention",
                )
    return {name: _sound(path) for name, path in found.items()}


def _sound(path: Path) -> bytes:
    """A file's bytes, looked at before any model is loaded."""
    try:
        data = read(path.resolve())
        parse(data)
    except (OSError, InvalidFile) as error:
        reason = error.message if isinstance(error, InvalidFile) else f"{error.strerror}."
        raise ConfigError(f"intervention: {path}: {reason}", param="intervention") from None
    return data


def _matching(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names that a server has."""
    found: dict[str, None] = {}
    for reference in wanted:
        names = [name for name in known if fnmatchcase(name, reference)]
        if not names:
            raise NotFound(
                f"intervention: the server has no {reference!r}; it has"
                f" {', '.join(known) or 'none'}. A file is put on it with `reft train --push`, or"
                " PUT /v1/interventions/NAME.",
                param="intervention",
            )
        found.update(dict.fromkeys(names))
    return list(found)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One prompt of one intervention, and what its answer should be."""

    task: _Task
    intervention: str | None
    row: Row
    wanted: str


Ask = Callable[[Sequence[_Asked], int], list[str]]
"""Greedy answers of at most so many tokens."""


def _answered(
    tasks: Sequence[_Task],
    names: Sequence[str | None],
    count_tokens: Callable[[Sequence[str]], list[int]],
    ask: Ask,
) -> list[Score]:
    """Ask everything that is compared in one way in one run, and score it."""
    scores = []
    for metric in METRICS:
        asked = [
            _Asked(task, name, row, wanted_text(row, metric, task.layout))
            for task in tasks
            if task.metric == metric
            for name in names
            for row in task.rows.rows
        ]
        if not asked:
            continue
        texts = {
            text
            for one in asked
            for text in answer_texts(one.row, one.wanted, metric, one.task.layout)
        }
        longest = max(count_tokens(sorted(texts))) + MARGIN
        rights: dict[tuple[str | None, str], list[bool]] = {}
        for one, answer in zip(asked, ask(asked, longest), strict=True):
            key = (one.intervention, one.task.rows.name)
            rights.setdefault(key, []).append(is_right(answer, one.wanted, metric, one.task.labels))
        scores += [
            Score(name or BASE, data, metric, sum(right) / len(right), len(right), tuple(right))
            for (name, data), right in rights.items()
        ]
    return scores


def _by_engine(
    engine: Engine, files: Files, tasks: Sequence[_Task], *, progress: bool
) -> list[Score]:
    manifests: dict[str | None, Manifest] = {}
    for name, data in files.items():
        if name is not None and data is not None:
            version, _ = engine.registry.put(name, data)
            manifests[name] = version.manifest
    tokenizer = engine.tokenizer

    def ask(asked: Sequence[_Asked], max_tokens: int) -> list[str]:
        prompts = [
            _formatter(
                one.task, tokenizer, tokenizer.eos_ids, manifests.get(one.intervention)
            ).prompt(one.row)
            for one in asked
        ]
        applied: list[Applied] = [one.intervention for one in asked]
        answers = engine.generate(
            prompts,
            SamplingParams(temperature=0, max_tokens=max_tokens),
            intervention=applied,
            progress=progress,
        )
        return [answer.text for answer in answers]

    def count(texts: Sequence[str]) -> list[int]:
        return [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    return _answered(tasks, list(files), count, ask)


def _by_server(
    server: Server, names: Sequence[str | None], tasks: Sequence[_Task], *, progress: bool
) -> list[Score]:
    def ask(asked: Sequence[_Asked], max_tokens: int) -> list[str]:
        questions = [
            Question(one.task.layout.prompt(one.row), one.intervention, max_tokens) for one in asked
        ]
        return server.answers(questions, progress=progress)

    return _answered(tasks, names, server.count_tokens, ask)


@torch.no_grad()
def _perplexities(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    files: Files,
    tasks: Sequence[_Task],
    *,
    progress: bool,
) -> list[Score]:
    """Perplexity of the completions' tokens, as training computes its loss."""
    base = Base(loaded)
    scores = []
    batches = sum(math.ceil(len(task.rows.rows) / BATCH) for task in tasks) * len(files)
    with tqdm(total=batches, desc="Perplexity", disable=not progress) as bar:
        for task in tasks:
            for name, data in files.items():
                edits: tuple[CanonicalEdit, ...] = ()
                manifest = None
                if data is not None:
                    intervention = parse(data)
                    edits, manifest = intervention.canonical(), intervention.manifest
                formatter = _formatter(task, tokenizer, loaded.eos_ids, manifest)
                examples = [formatter.example(row) for row in task.rows.rows]
                loss, tokens = 0.0, 0
                for first in range(0, len(examples), BATCH):
                    made = predict(base, edits, examples[first : first + BATCH])
                    loss, tokens = loss + float(made.loss()), tokens + len(made.targets)
                    bar.update()
                value = math.exp(loss / tokens)
                scores.append(
                    Score(name or BASE, task.rows.name, "perplexity", value, len(examples))
                )
    return scores


def _formatter(
    task: _Task, tokenizer: Tokenizer, eos_ids: frozenset[int], manifest: Manifest | None
) -> Formatter:
    """What writes a task's prompts for an intervention, or for the base model."""
    if manifest is None:
        return Formatter(task.layout, tokenizer, eos_ids)
    return Formatter(
        task.layout,
        tokenizer,
        eos_ids,
        manifest.template,
        manifest.system_turn,
        manifest.completion_prefix,
    )

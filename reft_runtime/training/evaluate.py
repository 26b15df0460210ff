"""How good interventions are on data sets: many by many, with the base model beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_runtime.base.model import LoadedModel
from reft_runtime.client import Answer, Question, Server
from reft_runtime.errors import ConfigError
from reft_runtime.front.asked import Uses
from reft_runtime.front.engine import Engine
from reft_runtime.interventions.format.manifest import Manifest
from reft_runtime.loading.base import load_base
from reft_runtime.machine.cores import use_threads
from reft_runtime.progress import bar
from reft_runtime.sampling import SamplingParams
from reft_runtime.text import Tokenizer
from reft_runtime.training.candidates import Candidate, File, find_files, find_served
from reft_runtime.training.forward import Base, predict
from reft_runtime.training.layout import Layout
from reft_runtime.training.outcomes import Outcome, Score
from reft_runtime.training.prompts import Formatter
from reft_runtime.training.report import Report
from reft_runtime.training.rows import Row
from reft_runtime.training.scoring import METRICS, Metric, answer_texts, wanted_text
from reft_runtime.training.sources import Data
from reft_runtime.training.tasks import Task, read_tasks
from reft_runtime.use import Use

BATCH = 32

MARGIN = 3
"""An answer may be this many tokens longer than the right one, for blanks and its end."""


def evaluate(
    data: Sequence[Data],
    interventions: Sequence[str] = (),
    *,
    url: str | None = None,
    api_key: str | None = None,
    engine: Engine | None = None,
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
    names that a running server has, NAME@DIGEST, or patterns; each with `=STRENGTH` behind it or
    without. `text` and `label` are as for training, `template` too: without it, rows are asked of a
    file as the template in its manifest says. Prompts of all interventions and all data sets run in
    one batch: on the server, on `engine`, which stays open, or else on an `Engine` of `model`.
    `metric` None is accuracy where rows have labels, and else perplexity, which only runs in
    process, and loads `model` for itself. An answer begins with a label as a
    whole word, or, with `prefixes`, by its letters alone. `threads` is by default one a core that
    this process may use.
    Raises `ConfigError` and `NotFound`.
    """
    tasks = read_tasks(data, metric, template=template, prefixes=prefixes, text=text, label=label)
    likely = [task for task in tasks if task.metric == "perplexity"]
    answered = [task for task in tasks if task.metric != "perplexity"]
    scores: list[Score] = []
    bases = [_Subject(Candidate())] if base else []
    if url is not None:
        if likely:
            raise ConfigError(
                f"metric: the perplexity of {likely[0].rows.name} cannot be asked of a server;"
                " take exact, or leave out the url.",
                param="metric",
            )
        server = Server(url, api_key)
        served = find_served(interventions, server)
        # A server tells the manifest of a name's newest version; older ones are taken as alike.
        names = {one: (one.name or "").partition("@")[0] for one in served}
        manifests = {name: server.manifest(name) for name in set(names.values())}
        subjects = [*bases, *(_Subject(one, manifests[names[one]]) for one in served)]
        scores = _by_server(server, subjects, answered, progress=progress)
    else:
        found = find_files(interventions, folder)
        subjects = [*bases, *(_Subject(one, file.content.manifest, file) for one, file in found)]
        if answered and engine is not None:
            scores += _by_engine(engine, subjects, answered, progress=progress)
        elif answered:
            with Engine(model, tokenizer=tokenizer, dtype=dtype, threads=threads) as own_engine:
                scores += _by_engine(own_engine, subjects, answered, progress=progress)
        if likely:
            use_threads(threads)
            _, loaded, own = load_base(model, tokenizer, dtype, None, differentiable=True)
            words = Tokenizer(own, loaded.max_model_len)
            try:
                scores += _perplexities(loaded, words, subjects, likely, progress=progress)
            finally:
                loaded.give_back()
    order = {task.rows.name: place for place, task in enumerate(tasks)}
    return Report(tuple(sorted(scores, key=lambda score: order[score.data])))


@dataclass(frozen=True, slots=True)
class _Subject:
    """A candidate, its manifest and, unless a server has it, its file; the base has neither."""

    candidate: Candidate
    manifest: Manifest | None = None
    file: File | None = None

    def formatter(self, layout: Layout, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> Formatter:
        """A formatter that writes the candidate's prompts as a server does."""
        if self.manifest is None:
            return Formatter(layout, tokenizer, eos_ids)
        return Formatter(
            layout,
            tokenizer,
            eos_ids,
            self.manifest.template,
            self.manifest.system_turn,
            self.manifest.completion_prefix if self.candidate.strength else None,
        )

    def score(self, task: Task, value: float, outcomes: Sequence[Outcome] = ()) -> Score:
        """The candidate's score on a task, with the number of rows that it was trained on."""
        trained = None if self.manifest is None else self.manifest.training.get("rows")
        return Score(
            self.candidate.label,
            task.rows.name,
            task.metric,
            value,
            len(task.rows.rows),
            tuple(outcomes),
            trained if isinstance(trained, int) else None,
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """One prompt of one candidate, and what its answer should be."""

    task: Task
    subject: _Subject
    layout: Layout
    row: Row
    wanted: str


Ask = Callable[[Sequence[_Asked], int], list[Answer]]
"""A function that gives greedy answers to all prompts, of at most so many tokens."""


def _answered(
    tasks: Sequence[Task],
    subjects: Sequence[_Subject],
    count_tokens: Callable[[Sequence[str]], list[int]],
    ask: Ask,
) -> list[Score]:
    """Ask all prompts, those of one metric in one run, and score the answers."""
    scores = []
    for metric in METRICS:
        pairs = [(task, one) for task in tasks if task.metric == metric for one in subjects]
        asked = []
        for task, subject in pairs:
            layout = task.asked_of(subject.manifest)
            asked += [
                _Asked(task, subject, layout, row, wanted_text(row, metric, layout))
                for row in task.rows.rows
            ]
        if not asked:
            continue
        texts = {
            text for one in asked for text in answer_texts(one.row, one.wanted, metric, one.layout)
        }
        longest = max(count_tokens(sorted(texts))) + MARGIN
        answers = iter(zip(asked, ask(asked, longest), strict=True))
        for task, subject in pairs:
            outcomes = [
                one.task.outcome(one.row, one.layout, one.wanted, answer)
                for one, answer in islice(answers, len(task.rows.rows))
            ]
            value = sum(outcome.right for outcome in outcomes) / len(outcomes)
            scores.append(subject.score(task, value, outcomes))
    return scores


def _by_engine(
    engine: Engine,
    subjects: Sequence[_Subject],
    tasks: Sequence[Task],
    *,
    progress: bool,
) -> list[Score]:
    versions = {
        one.candidate.name: engine.registry.verified(one.candidate.name, one.file.data)
        for one in subjects
        if one.candidate.name is not None and one.file is not None
    }
    tokenizer = engine.tokenizer

    def ask(asked: Sequence[_Asked], max_tokens: int) -> list[Answer]:
        prompts = [
            one.subject.formatter(one.layout, tokenizer, tokenizer.eos_ids).prompt(one.row)
            for one in asked
        ]
        candidates = (one.subject.candidate for one in asked)
        sampling = []
        for one, prompt in zip(asked, prompts, strict=True):
            _check_length(one.row, len(prompt) + 1, tokenizer.max_model_len)
            room = tokenizer.max_model_len - len(prompt)
            sampling.append(SamplingParams(temperature=0, max_tokens=min(max_tokens, room)))
        applied: list[Uses] = [
            None if one.name is None else Use(versions[one.name], one.strength)
            for one in candidates
        ]
        answers = engine.generate(prompts, sampling, intervention=applied, progress=progress)
        choices = [answer.choices[0] for answer in answers]
        return [Answer(choice.text, choice.finish_reason == "stop") for choice in choices]

    def count(texts: Sequence[str]) -> list[int]:
        return [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]

    return _answered(tasks, subjects, count, ask)


def _check_length(row: Row, tokens: int, longest: int) -> None:
    if tokens > longest:
        raise row.error(
            f"has {tokens} tokens, and the model takes {longest} tokens; shorten"
            " it, or leave it out."
        )


def _by_server(
    server: Server, subjects: Sequence[_Subject], tasks: Sequence[Task], *, progress: bool
) -> list[Score]:
    def ask(asked: Sequence[_Asked], max_tokens: int) -> list[Answer]:
        questions = []
        for one in asked:
            candidate = one.subject.candidate
            prompt = one.layout.prompt(one.row)
            questions.append(Question(prompt, candidate.name, max_tokens, candidate.strength))
        return server.answers(questions, progress=progress)

    return _answered(tasks, subjects, server.count_tokens, ask)


@torch.no_grad()
def _perplexities(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    subjects: Sequence[_Subject],
    tasks: Sequence[Task],
    *,
    progress: bool,
) -> list[Score]:
    """The perplexities of the completions' tokens, computed as training computes its loss."""
    base = Base(loaded)
    scores = []
    batches = sum(math.ceil(len(task.rows.rows) / BATCH) for task in tasks) * len(subjects)
    with bar(total=batches, desc="Perplexity", disable=not progress) as shown:
        for task in tasks:
            for subject in subjects:
                edits = () if subject.file is None else subject.file.content.canonical()
                base.check(edits)
                layout = task.asked_of(subject.manifest)
                formatter = subject.formatter(layout, tokenizer, loaded.eos_ids)
                examples = [formatter.example(row) for row in task.rows.rows]
                for row, example in zip(task.rows.rows, examples, strict=True):
                    _check_length(row, len(example.tokens), loaded.max_model_len)
                loss, tokens = 0.0, 0
                for first in range(0, len(examples), BATCH):
                    made = predict(
                        base,
                        edits,
                        examples[first : first + BATCH],
                        subject.candidate.strength,
                    )
                    loss, tokens = loss + float(made.loss()), tokens + len(made.targets)
                    shown.update()
                scores.append(subject.score(task, math.exp(loss / tokens)))
    return scores

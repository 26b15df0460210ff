"""The command `classify`: texts, each with its label and how likely it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Annotated, Any

import typer

from reft_runtime.client import MOST_INPUTS, Asked, Labelled
from reft_runtime.display.text import printable
from reft_runtime.errors import ConfigError
from reft_runtime.interventions.format.template import CHAT
from server.cli.backend import open_backend
from server.cli.console import console, print_json, table
from server.cli.options import (
    LOCAL_SETTINGS,
    ApiKey,
    AsJson,
    Composed,
    MaybeUrl,
    unescaped,
    with_settings,
)

app = typer.Typer()

_FIELD = re.compile(r"\{\w+\}")


@app.command()
@with_settings(*LOCAL_SETTINGS)
def classify(
    text: Annotated[
        str | None,
        typer.Argument(help="What to classify; without it, each line of --file."),
    ] = None,
    intervention: Composed = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL,LABEL...",
            help="What to choose from; by default what stands in the intervention's file.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        typer.FileText | None,
        typer.Option(
            "--file",
            "-f",
            encoding="utf-8-sig",
            help="Texts, one a line; - is standard input.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            callback=unescaped,
            help="How a text becomes a prompt: 'chat' (a user's message), or a text with one field "
            "in braces, 'Review: {text}\\nSentiment:'. By default as the intervention's file says.",
            show_default=False,
        ),
    ] = None,
    url: MaybeUrl = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Say which label a text has, and how likely it is.

    Nothing is generated. A running server is asked (--url, or the one of this machine), else a
    model in this process. Of one text all labels are shown, the likeliest first; of a file the
    likeliest, one text a line.
    """
    if file is not None and text is None:
        texts = _lines(file)
    elif text is not None and file is None:
        texts = iter([text])
    else:
        raise ConfigError("classify: give a text, or texts with --file FILE (- is standard input).")
    write = _writer(template)
    names = None if labels is None else [name.strip() for name in labels.split(",")]
    backend = open_backend(url, api_key, options, intervention or ())
    try:
        applied = backend.resolve(intervention or ())
        for batch in _batches(texts):
            found = backend.classify([write(one) for one in batch], names, applied)
            for one, label in zip(batch, found, strict=True):
                _show(one, label, as_json=as_json, alone=file is None)
    finally:
        backend.close()


def _writer(template: str | None) -> Callable[[str], Asked]:
    """How a text is asked; raises `ConfigError` for a template that does not take one text."""
    if template is None:
        return lambda text: text
    if template == CHAT:
        return lambda text: [{"role": "user", "content": text}]
    if len(_FIELD.findall(template)) != 1:
        raise ConfigError(
            "template: write chat, or a text with one field, such as 'Review: {text}', not"
            f" {template!r}.",
            param="template",
        )
    return lambda text: _FIELD.sub(lambda _: text, template)


def _lines(file: typer.FileText) -> Iterator[str]:
    """The lines of a file that say something. Raises `ConfigError` if it is not UTF-8."""
    try:
        for line in file:
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise ConfigError(f"--file: {file.name}: not UTF-8 text.", param="file") from None


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts that are asked together; their labels are written before the next are read."""
    while batch := list(islice(texts, MOST_INPUTS)):
        yield batch


def _show(text: str, found: Labelled, *, as_json: bool, alone: bool) -> None:
    if as_json:
        print_json({"text": text, "label": found.label, "probs": dict(found.probs)})
    elif alone:
        ranked = sorted(found.probs.items(), key=lambda pair: -pair[1])
        rows = [(label, f"{prob:.3f}") for label, prob in ranked]
        console().print(table({"LABEL": "fold", "PROBABILITY": "right"}, rows))
    else:
        prob = found.probs[found.label]
        typer.echo(f"{printable(found.label)}\t{prob:.3f}\t{printable(text)}")

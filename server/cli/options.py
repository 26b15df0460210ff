"""Options that several commands have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from reft_runtime.errors import ConfigError
from server.settings import Settings

Command = TypeVar("Command", bound=Callable[..., None])


def unescaped(template: str | None) -> str | None:
    """A template as it was meant: shells pass a backslash and an n where a new line is wanted."""
    return None if template is None else template.replace("\\n", "\n").replace("\\t", "\t")


def layers_of(text: str) -> tuple[int, ...] | None:
    """Layers by their numbers, such as `8,16,24`; None for `all`. Raises `ConfigError`."""
    if text == "all":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"layers: write all, or numbers such as 8,16,24, not {text!r}.", param="layers"
        ) from None


LOCAL_URL = "http://127.0.0.1:8000"
"""Where `reft serve` listens unless told otherwise."""

Url = Annotated[
    str, typer.Option(envvar="REFT_URL", metavar="URL", help="Address of the running server.")
]
MaybeUrl = Annotated[
    str | None,
    typer.Option(
        envvar="REFT_URL",
        metavar="URL",
        help=f"The running server to ask; by default {LOCAL_URL} where one answers, else a model in"
        " this process.",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="REFT_API_KEY", metavar="KEY", help="API key of the server.", show_default=False
    ),
]
Composed = Annotated[
    list[str] | None,
    typer.Option(
        "--intervention",
        "-i",
        metavar="NAME[=STRENGTH]",
        help="Intervention to apply, by default at strength 1, as trained; may be given several "
        "times. Without a server a file may be named, too.",
        show_default=False,
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Length of the longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Makes the answer repeatable when temperature is above 0.", show_default=False
    ),
]
Prompt = Annotated[str, typer.Argument(help="What to say to the model, as one user's turn.")]
System = Annotated[
    str | None, typer.Option(help="What the model is told first.", show_default=False)
]
Model = Annotated[str, typer.Option(help="Base model: demo, a folder or a Hugging Face id.")]
Description = Annotated[str, typer.Option(help="What the intervention does.")]
License = Annotated[str | None, typer.Option("--license", help="Licence of the file.")]
Template = Annotated[
    str | None,
    typer.Option(
        callback=unescaped,
        help="How a row becomes a prompt: 'chat' (its prompt as a user's message), or a text with "
        "fields in braces, 'Review: {text}\\nSentiment:'. By default texts, and prompts "
        "of classes, become 'chat' where the model has a chat template; others stay as they are.",
    ),
]
DATA = (
    "CSV, TSV, Parquet, a JSON array or JSON lines, or hf:NAME[/CONFIG][:SPLIT]; with text and "
    "label, prompt and completion, or messages."
)
Rows = Annotated[str, typer.Argument(help=DATA)]
Text = Annotated[
    str | None, typer.Option(help="Column of texts; by default one with a usual name.")
]
Label = Annotated[
    str | None, typer.Option(help="Column of classes; by default one with a usual name.")
]
Dtype = Annotated[
    str, typer.Option(help="Number format of the base's weights: auto, float32, bfloat16.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        envvar="REFT_THREADS",
        help="CPU threads; by default one a core that affinity and the container's quota leave.",
    ),
]
LOCAL_SETTINGS = (
    "model",
    "interventions",
    "state_dir",
    "shared_state",
    "device",
    "dtype",
    "max_model_len",
    "threads",
)
"""Settings of a model in a command's own process."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]


def with_settings(*names: str) -> Callable[[Command], Command]:
    """Give a command the options of these fields of `Settings`, or of all, as `**options`."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        ours = [_option(name) for name in names or Settings.model_fields]
        signature = signature.replace(parameters=[*own, *ours])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return command

    return decorate


def _option(name: str) -> inspect.Parameter:
    """The option of a settings field. Its default None means that the environment decides."""
    field = Settings.model_fields[name]
    kind: Any = field.annotation
    if get_origin(kind) is UnionType:
        kind = get_args(kind)[0]
    if get_origin(kind) is tuple:  # given several times
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
    notes = [f"env: REFT_{name.upper()}"]
    if field.default not in (None, PydanticUndefined):
        notes.append(f"default: {field.default}")
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        flag += f"/--no-{name.replace('_', '-')}"
    option = typer.Option(flag, help=f"{field.description} [{', '.join(notes)}]")
    kind = Annotated[str if kind is SecretStr else kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)

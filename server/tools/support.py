"""What this server's model can do with tools, and what one request asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_runtime.errors import ConfigError, InvalidRequest
from reft_runtime.grammar.source import schema_of
from reft_runtime.sampling import Grammar, SamplingParams
from server.schemas.tools import NamedTool, Tool, ToolFields
from server.settings import BUILT_IN_TEMPLATE, Settings
from server.tools.families import FORMATS, find_format
from server.tools.formats import Format, JsonFormat, SyntaxFormat
from server.tools.grammar import tool_grammar
from server.tools.json_reader import JsonReader
from server.tools.reader import ToolReader
from server.tools.syntax import Functions
from server.tools.syntax_reader import SyntaxReader

if TYPE_CHECKING:
    from reft_runtime.text import ChatOptions
    from server.engine import Tokenizer


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What one request asks: which tools there are, how calls are forced, and how they are read."""

    form: Format
    tools: Sequence[Tool]
    named: bool
    """Whether one function has to be called by its name."""

    many: bool
    alone: bool
    """Whether an answer has either calls or text."""

    grammar: Grammar | None

    def reader(self) -> ToolReader:
        """A reader for one choice."""
        return reader_of(
            self.form,
            {tool.function.name: tool.function.parameters for tool in self.tools},
            exact=self.grammar is not None,
            alone=self.alone,
            parallel=self.many,
            named=self.named,
        )

    def sampling(self, sampling: SamplingParams) -> SamplingParams:
        """The settings with which the choices are made."""
        return replace(sampling, grammar=self.grammar, kept_special_tokens=self.form.tokens)


class Tools:
    """How the served model is told of tools, and how it writes calls.

    Raises `ConfigError` if the template that the settings name cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Settings) -> None:
        self._tokenizer = tokenizer
        self._given = _template(tokenizer, settings.tool_template)
        self._source = self._given or tokenizer.tool_template
        form = FORMATS[settings.tool_parser] if settings.tool_parser else None
        found = find_format(self._source)
        self._form = found if found is not None and form in (None, FORMATS[found.name]) else form

    def plan(self, body: ToolFields, answer: Grammar | None = None) -> ToolPlan | None:
        """What `body` asks; None if the model is told of no tools.

        `answer` is the form of an answer that calls nothing; a call that is forced leaves no room
        for one. Takes milliseconds for large schemas. Raises `InvalidRequest` if the model cannot
        be asked.
        """
        tools, choice = body.usable, body.tool_choice
        if not tools:
            return None
        from reft_runtime.text.calls import takes_one_call  # loads torch: only when needed

        form = self._format()
        named = isinstance(choice, NamedTool)
        if isinstance(choice, NamedTool):
            callable_ = [tool for tool in tools if tool.function.name == choice.function.name]
        else:
            callable_ = list(tools)
        forced = named or choice == "required"
        answer = None if forced else answer
        many = body.parallel_tool_calls and not named
        alone = forced or answer is not None
        grammar = None
        strict = any(tool.function.strict for tool in tools)
        if alone or strict:
            source = tool_grammar(
                form,
                [(t.function.name, t.function.parameters, t.function.strict) for t in callable_],
                self._tokenizer.token_id,
                many=many and not takes_one_call(self._source),
                free=not alone,
                answer=None if answer is None else _json_schema(answer),
            )
            grammar = Grammar("lark", source, "tools" if answer is None else answer.param)
        if answer is not None:  # then a call has its tag always: the answer may begin as a call
            form = replace(form, bare="")
        return ToolPlan(form, tools, named, many, alone, grammar)

    def options(self, options: ChatOptions, tools: Sequence[Tool]) -> ChatOptions:
        """`options` with the tools that the model is told of."""
        told = tuple(tool.as_dict() for tool in tools)
        written = None if self._form is None else self._form.written
        return replace(options, tools=told, tool_template=self._given, written=written)

    def _format(self) -> Format:
        from reft_runtime.text.chat import check_reads_tools  # loads torch: only when needed

        check_reads_tools(self._source)
        if self._form is None:
            raise InvalidRequest(
                "tools: the chat template does not say how the model writes calls, in a way that "
                f"this server knows; start it with --tool-parser {'|'.join(FORMATS)}.",
                param="tools",
            )
        return self._form


def reader_of(form: Format, functions: Functions, **options: bool) -> ToolReader:
    """A reader of calls of `functions`; its options are those of `ToolReader`."""
    if isinstance(form, SyntaxFormat):
        return SyntaxReader(form, functions, **options)
    assert isinstance(form, JsonFormat)
    return JsonReader(form, functions, **options)


def _template(tokenizer: Tokenizer, given: str | None) -> str | None:
    """The text of the template that `--tool-template` names."""
    if given is None:
        return None
    if given == BUILT_IN_TEMPLATE:
        if tokenizer.token_id("<|im_start|>") is None:
            raise ConfigError(
                f"--tool-template {BUILT_IN_TEMPLATE}: its chats are ChatML, and this model's "
                "tokenizer has no <|im_start|>; give a file."
            )
        return resources.files("server.tools").joinpath("hermes.jinja").read_text("utf-8")
    from reft_runtime.text.chat import reads_tools  # loads torch: only when needed

    try:
        text = Path(given).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--tool-template: {given} cannot be read: {error}.") from None
    if not reads_tools(text):
        raise ConfigError(f"--tool-template: {given} is no Jinja template that reads `tools`.")
    return text


def _json_schema(answer: Grammar) -> dict[str, Any]:
    """The JSON Schema of an answer's form. Raises `InvalidRequest` if its form is another."""
    if answer.kind not in ("json_schema", "json_object"):
        raise InvalidRequest(
            f"{answer.param}: beside tools an answer's form is JSON by a schema; leave one of the "
            'two out, or say tool_choice: "none".',
            param=answer.param,
        )
    try:
        return schema_of(answer)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{answer.param}: it cannot be read: {error}.", param=answer.param
        ) from None

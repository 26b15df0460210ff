"""The manifest: what an intervention file says about itself, and the base model it was made for."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_serializer,
    model_validator,
)

from reft_runtime.errors import InvalidFile, WrongBaseModel
from reft_runtime.interventions.format.components import HIDDEN_SIZED, normalise
from reft_runtime.interventions.format.kinds import ACTS, KINDS
from reft_runtime.interventions.format.labels import problem_of
from reft_runtime.interventions.format.positions import MAX_SPAN, Positions
from reft_runtime.interventions.format.template import TEMPLATE_FIELD, is_text

MAX_EDITS = 1024
MAX_JSON_DEPTH = 8
MAX_INTEGER_BITS = 1023
"""Whole numbers of more bits have no nearest float, as which most readers of JSON take them."""

SystemTurn = Literal["prepend", "drop", "refuse"]

CompletionPrefix = Literal["", " "]

Texts = Literal["message"]

_Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class BaseShape(_Strict):
    """The base model a file was made for. `model` is its name, which only informs people."""

    model: _Name
    architecture: _Name
    hidden_size: _Size
    num_layers: _Size
    vocab_size: _Size


def _read_positions(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return Positions.parse(value)
    except InvalidFile as error:  # pydantic adds the place to a ValueError only
        raise ValueError(error.message.removeprefix("positions: ")) from None


class EditSpec(_Strict):
    """One edit: where it acts, and how to read its tensors, `edits.<index>.<tensor>`.

    `component` is one of the names in `components`, or a module path. `dtype` is the stored dtype
    of the edit's tensors; orthonormal ones may be stored in another. `act` is a name in
    transformers' `ACT2FN`, for the kinds that have one. `width` is that of the edited rows, the
    base's hidden size if None. The last `suffix_offset` prompt tokens do not count for `positions`.
    """

    layer: Annotated[int, Field(ge=0)]
    component: Annotated[str, StringConstraints(max_length=256)] = "block_output"
    kind: str
    positions: Annotated[
        Positions, BeforeValidator(_read_positions), PlainSerializer(str, return_type=str)
    ]
    dtype: Literal["float32", "float16", "bfloat16"]
    act: str | None = None
    width: _Size | None = None
    suffix_offset: Annotated[int, Field(ge=0, le=MAX_SPAN)] = 0

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind[:80]!r}; known: {', '.join(KINDS)}")
        return kind

    @field_validator("act")
    @classmethod
    def _known_act(cls, act: str | None) -> str | None:
        if act is not None and act not in ACTS:
            raise ValueError(f"unknown act {act[:80]!r}; known: {', '.join(sorted(ACTS))}")
        return act

    @model_validator(mode="after")
    def _consistent(self) -> EditSpec:
        if self.act is not None and not KINDS[self.kind].has_act:
            raise ValueError(f"act: a {self.kind} edit has none; leave it out")
        try:
            normal = normalise(self.layer, self.component)
        except InvalidFile as error:
            raise ValueError(error.message.removesuffix(".")) from None
        if normal != (self.layer, self.component):
            raise ValueError(
                f"component: {self.component[:80]!r} of layer {self.layer} is to be written as"
                f" {normal[1]!r} of layer {normal[0]}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Fields newer than the format's first files are written only where they say something, so
        # that content which the first files could express keeps its digest.
        known = _written_edits.get(self)
        if known is None:
            fields: dict[str, Any] = dump(self)
            known = {
                name: value
                for name, value in fields.items()
                if value or name not in ("act", "width", "suffix_offset")
            }
            if len(_written_edits) < MOST_KNOWN:
                _written_edits[self] = known
        return dict(known)


_known_edits: dict[tuple[object, ...], EditSpec] = {}
_written_edits: dict[EditSpec, dict[str, Any]] = {}
MOST_KNOWN = 4096
"""Most edits that are remembered, as they were read and as they are written."""


def _known_or(value: object, validate: ValidatorFunctionWrapHandler) -> EditSpec:
    """The same spec for edits that are written alike, as most are in thousands of files."""
    try:
        # Equal values may be of different types, such as 1 and true.
        key = tuple((k, type(v), v) for k, v in value.items()) if isinstance(value, dict) else ()
        found = _known_edits.get(key)
    except TypeError:  # what cannot be a key is no edit either
        key, found = (), None
    if found is None:
        found = validate(value)
        if key and len(_known_edits) < MOST_KNOWN:
            _known_edits[key] = found
    return found


class Manifest(_Strict):
    """What an intervention file says about itself.

    `edits` apply in the order listed; several may share a layer (untied weights: one edit at the
    first tokens, one at the last). `template` is how a chat becomes a prompt: None leaves the
    choice to the server, `chat` is the base model's own, and any other string holds the field
    `{prompt}` once, replaced by the text of a single user message. `system` says what such a text
    does with a system turn: put its text before the user's, leave it out, or refuse the request.
    `completion_prefix` is what training put before every completion because of the tokenizer. It
    belongs neither to prompts, which lose it at their end, nor to answers. None means that the file
    says nothing of it: its prompts and answers are taken as they are. `texts` says what a prompt
    that is a text stands for: `message` is what a user says in a chat, so that it goes through the
    template too; None takes it as it is. `labels` are the answers among which a classifier chooses,
    without blanks around them; a request that asks for a classification may name others.
    """

    schema_version: Literal[1] = 1
    base: BaseShape
    edits: Annotated[
        tuple[Annotated[EditSpec, WrapValidator(_known_or)], ...],
        Field(min_length=1, max_length=MAX_EDITS, strict=False),
    ]
    template: Annotated[str, StringConstraints(max_length=16_384)] | None = None
    system: SystemTurn | None = None
    completion_prefix: CompletionPrefix | None = None
    texts: Texts | None = None
    labels: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    description: Annotated[str, StringConstraints(max_length=4096)] = ""
    license: Annotated[str, StringConstraints(max_length=256)] | None = None
    metrics: dict[str, JsonValue] = {}
    training: dict[str, JsonValue] = {}

    @field_validator("template")
    @classmethod
    def _one_field(cls, template: str | None) -> str | None:
        if is_text(template) and template.count(TEMPLATE_FIELD) != 1:
            raise ValueError(
                f"write `chat`, or a text that holds {TEMPLATE_FIELD} exactly once (it holds it"
                f" {template.count(TEMPLATE_FIELD)} times)"
            )
        return template

    @model_validator(mode="after")
    def _system_needs_a_text(self) -> Manifest:
        if self.system is not None and not is_text(self.template):
            raise ValueError(
                "system: the base model's own chat template takes system turns; leave it out, or"
                " give a template that is a text"
            )
        return self

    @model_validator(mode="after")
    def _texts_need_a_template(self) -> Manifest:
        if self.texts is not None and self.template is None:
            raise ValueError("texts: only a template can write a text as a message; give one")
        return self

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is None:
            return None
        if (problem := problem_of(labels)) is not None:
            raise ValueError(problem)
        for label in labels:
            if label != label.strip():
                raise ValueError(f"write {label[:40]!r} without the blanks around it")
        return labels

    @property
    def system_turn(self) -> SystemTurn:
        """What a text template does with a system turn; "prepend" if the file does not say."""
        return self.system or "prepend"

    @model_serializer(mode="wrap")
    def _without_new_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # As for edits, content that the first files could express keeps its digest.
        fields: dict[str, Any] = dump(self)
        for name in ("system", "completion_prefix", "texts", "labels"):
            if fields.get(name) is None:
                fields.pop(name, None)
        return fields

    @field_validator("metrics", "training")
    @classmethod
    def _plain_json(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        _check_json(value, MAX_JSON_DEPTH)
        return value

    @model_validator(mode="after")
    def _edits_fit_the_base(self) -> Manifest:
        for index, edit in enumerate(self.edits):
            if edit.layer >= self.base.num_layers:
                raise ValueError(
                    f"edits.{index}.layer is {edit.layer}, but the base model has layers 0 to"
                    f" {self.base.num_layers - 1}"
                )
            width = self.width_of(index)
            if edit.component in HIDDEN_SIZED and width != self.base.hidden_size:
                raise ValueError(
                    f"edits.{index}.width is {width}, but {edit.component} has the base model's"
                    f" hidden size, {self.base.hidden_size}"
                )
        return self

    def width_of(self, index: int) -> int:
        """Width of the rows that the edit of this index acts on."""
        return self.edits[index].width or self.base.hidden_size


def check_base(manifest: Manifest, base: BaseShape, allow_base: str | None = None) -> None:
    """Raise `WrongBaseModel`, naming every difference, unless the file fits the loaded base.

    Architecture, hidden size, number of layers and vocabulary must be equal. The names may differ,
    because the same weights are found under many. If the name of the file's base matches the shell
    pattern `allow_base`, only what the edits touch counts: the hidden size, and that their layers
    exist.
    """
    made, loaded = manifest.base, base
    fields = ["architecture", "hidden_size", "num_layers", "vocab_size"]
    if allow_base is not None and fnmatchcase(made.model, allow_base):
        fields = ["hidden_size"]
        if max(edit.layer for edit in manifest.edits) >= loaded.num_layers:
            fields.append("num_layers")
    differences = [
        f"{field} {getattr(made, field)} (loaded: {getattr(loaded, field)})"
        for field in fields
        if getattr(made, field) != getattr(loaded, field)
    ]
    if differences:
        raise WrongBaseModel(
            f"The file was made for {made.model}, not for the loaded {loaded.model}:"
            f" {', '.join(differences)}."
        )


def _check_json(value: JsonValue, depth: int) -> None:
    # What passes here can be written as JSON again, by any writer.
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("holds NaN or an infinite number; leave it out")
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise ValueError("holds a whole number that is too large for most readers of JSON")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair, which is no text") from None
    if isinstance(value, dict | list):
        if depth == 0:
            raise ValueError(f"is nested deeper than {MAX_JSON_DEPTH} levels")
        for item in value.values() if isinstance(value, dict) else value:
            _check_json(item, depth - 1)

"""The configuration of a cluster: a YAML file, checked completely."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reft_runtime.errors import ConfigError, nearest
from server.settings import Settings

OWN = ("metrics_port",)
"""Settings of one server by itself, which mean nothing in a cluster."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Autoscaling(_Part):
    """Between how many replicas the cluster has, by how many requests each has under way."""

    min: int = Field(default=1, ge=1, description="Fewest replicas.")
    max: int = Field(ge=1, description="Most replicas.")
    target_ongoing: float = Field(
        default=16,
        gt=0,
        description="Requests under way per replica that are aimed at: with more of them replicas"
        " are added, with fewer removed.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max, {self.max}; lower it")
        return self


class Resources(_Part):
    """What one replica takes of its node; with `settings.tensor_parallel`, what each rank takes."""

    cpus: float = Field(default=1, ge=0, description="Cores; the engine has as many threads.")
    gpus: float = Field(default=0, ge=0, description="GPUs, with `settings.device: cuda`.")
    memory: int | None = Field(
        default=None, ge=1, description="Bytes of memory; by default it is not counted."
    )


class Routing(_Part):
    """How requests find a replica."""

    max_ongoing: int = Field(
        default=128,
        ge=1,
        description="Requests that one replica has under way; more of one intervention go to its"
        " next replica.",
    )
    fallback_replicas: int = Field(
        default=2,
        ge=0,
        description="Further replicas that take an intervention's requests when its own is full.",
    )
    max_queued: int = Field(
        default=1024,
        ge=1,
        description="Requests that wait in one front while all their replicas are full; one beyond"
        " that is answered 503.",
    )


class ClusterConfig(_Part):
    """What a cluster is made of.

    `settings` are those of every replica, `host` and `port` those of the address that clients use.
    """

    settings: Settings
    replicas: int | None = Field(
        default=None, ge=1, description="Number of replicas, by default 1."
    )
    autoscaling: Autoscaling | None = Field(
        default=None, description="A number of replicas that follows the load, instead."
    )
    fronts: int = Field(default=1, ge=1, description="Number of fronts.")
    resources: Resources = Resources()
    routing: Routing = Routing()
    ray: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Address of a Ray cluster, HOST:PORT or `auto`; by default `reft cluster up`"
        " starts one on this machine, which ends with it.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.replicas is not None and self.autoscaling is not None:
            raise ValueError("replicas and autoscaling: give one of them")
        return self

    @property
    def most_replicas(self) -> int:
        """The largest number of replicas that this cluster may have."""
        return self.autoscaling.max if self.autoscaling else self.replicas or 1


def check_room(config: ClusterConfig, has: Mapping[str, float]) -> None:
    """Raise `ConfigError` if a machine has too little for all replicas, which Ray would wait for.

    `has` is what Ray counts there, such as `{"CPU": 8.0, "GPU": 1.0}`.
    """
    scaling, taken = config.autoscaling, config.resources
    replicas = scaling.min if scaling else config.replicas or 1
    each = {"CPU": taken.cpus, "GPU": taken.gpus, "memory": taken.memory or 0}
    keys = {"CPU": "cpus", "GPU": "gpus", "memory": "memory"}
    for name, amount in each.items():
        need = round(replicas * config.settings.tensor_parallel * amount, 4)  # as Ray counts
        there = has.get(name, 0)
        if need > there:
            raise ConfigError(
                f"resources.{keys[name]}: the replicas need {need:g}, and this machine has"
                f" {there:g}. Lower it, or have fewer replicas."
            )


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Reads YAML, and refuses a key that is given twice, of which the last would count."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


def read_config(path: Path) -> ClusterConfig:
    """Read a configuration file. Raises `ConfigError` with one line per mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ConfigError(f"{path} cannot be read: {why}.") from None
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"{path} is no YAML: {where}.") from None
    try:
        return parse_config(data)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error.message}") from None


def parse_config(data: Any) -> ClusterConfig:
    """Make a configuration of parsed YAML. Raises `ConfigError` with one line per mistake.

    A setting that is not given may come from its `REFT_*` variable, as for `reft serve`. No line
    repeats a value, which may be a key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError("Write a mapping, with `settings:` and `replicas:` for a beginning.")
    problems: list[str] = []
    given = data.get("settings", {})
    settings = _settings(given, problems)
    rest = {name: value for name, value in data.items() if name != "settings"}
    try:
        config = ClusterConfig(settings=settings or Settings(), **rest)
    except ValidationError as error:
        problems += [_line(item["loc"], item["msg"], ClusterConfig) for item in error.errors()]
    except TypeError:
        problems.append("Keys must be text.")
    if problems:
        raise ConfigError("\n".join(problems))
    _check_together(config)
    return config


def _settings(given: Any, problems: list[str]) -> Settings | None:
    if not isinstance(given, Mapping):
        problems.append("settings: write the options of `reft serve` below it, such as `model:`.")
        return None
    try:
        settings = Settings(**{str(name): value for name, value in given.items()})
        # The folder may be on another machine than this: replicas share it in any case.
        shared = settings.state_dir is not None
        return settings.model_copy(update={"shared_state": shared})
    except ValidationError as error:
        for item in error.errors():
            problems.append(_line(("settings", *item["loc"]), item["msg"], Settings))
        return None


def _line(loc: tuple[int | str, ...], message: str, model: type[BaseModel]) -> str:
    """One mistake: where it is, and what to do."""
    where = ".".join(map(str, loc))
    message = message.removeprefix("Value error, ")
    if message == "Extra inputs are not permitted":
        known = model.model_fields
        for step in loc[:-1]:
            kind = known[str(step)].annotation if step in known else None
            known = getattr(kind, "model_fields", known)
        like = nearest(str(loc[-1]), list(known), 1)
        hint = f"did you mean {like[0]}?" if like else f"there are {', '.join(known)}."
        return f"{where}: there is no such key; {hint}"
    if message.startswith("Input should be a valid dictionary"):
        return f"{where}: write its keys below it, each with a value."
    text = f"{message[:1].lower()}{message[1:]}."
    return f"{where}: {text}" if where else text


def _check_together(config: ClusterConfig) -> None:
    """Raise `ConfigError` for settings that do not go together with replicas."""
    settings = config.settings
    for name in OWN:
        if getattr(settings, name) is not None:
            raise ConfigError(
                f"settings.{name}: a cluster has none; /metrics of its address has all replicas'."
            )
    if config.most_replicas > 1 and settings.state_dir is None:
        raise ConfigError(
            "settings.state_dir: several replicas need one, a folder that all of them have mounted"
            " or a URL; else an upload would reach one of them alone."
        )
    resources, ranks = config.resources, settings.tensor_parallel
    if settings.device.startswith("cuda") and not resources.gpus:
        raise ConfigError("resources.gpus: a replica computes on a GPU; give 1.")
    if ranks > 1:
        if resources.gpus not in (0, 1):
            raise ConfigError("resources.gpus: give 1; they are those of each rank.")
        if not resources.cpus:
            raise ConfigError("resources.cpus: give each rank some, such as 1.")

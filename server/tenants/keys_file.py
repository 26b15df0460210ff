"""The keys file: TOML that says which tenants there are, by which keys, and what each may do."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from reft_runtime.errors import ConfigError
from server.tenants.tenant import EVERYTHING, Limits, Role, Tenant

MAX_KEYS = 10_000
"""Most keys of a file: the key of every request is compared with all of them."""

HASH = "sha256:"
"""What the hash of a key begins with; 64 hexadecimal digits follow."""

TENANT_RULE = "1 to 32 of a-z, 0-9, hyphen and underscore, beginning with a letter or digit"

_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_FIELD = re.compile(r"[a-z_]{1,32}")
_PLACE = re.compile(r"\(at (line \d+, column \d+|end of document)\)")
_PATTERN = re.compile(r"[a-z0-9._*?\[\]!-]{1,128}")


def _checked_hash(value: str) -> str:
    if not re.fullmatch(HASH + "[0-9a-f]{64}", value):
        raise ValueError(f"write {HASH} and 64 hexadecimal digits, as `reft key new` prints them")
    return value


def _checked_pattern(value: str) -> str:
    if not _PATTERN.fullmatch(value):
        raise ValueError("write a shell pattern of names, such as team-a.* or sentiment")
    return value


Hash = Annotated[str, AfterValidator(_checked_hash)]
Pattern = Annotated[str, AfterValidator(_checked_pattern)]
Most = Annotated[int, Field(ge=1)]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class _LimitsTable(_Table):
    max_tokens: Most | None = None
    n: Most | None = None


class _TenantTable(_Table):
    keys: list[Hash] = Field(min_length=1)
    role: Role = "user"
    interventions: list[Pattern] | None = None
    upload: bool = False
    weight: float = Field(default=1.0, ge=0.01, le=1000)
    requests_per_minute: Most | None = None
    tokens_per_minute: Most | None = None
    concurrent_requests: Most | None = None
    limits: _LimitsTable = _LimitsTable()

    def tenant(self, name: str) -> Tenant:
        """The tenant that the table describes."""
        patterns = [EVERYTHING] if self.interventions is None else self.interventions
        return Tenant(
            name,
            self.role,
            tuple(patterns),
            self.upload,
            self.weight,
            self.requests_per_minute,
            self.tokens_per_minute,
            self.concurrent_requests,
            Limits(self.limits.max_tokens, self.limits.n),
        )


class _File(_Table):
    tenants: dict[str, _TenantTable] = Field(min_length=1)


def is_tenant_name(name: str) -> bool:
    """Whether a tenant may have this name."""
    return _TENANT.fullmatch(name) is not None


def read_keys_file(path: Path) -> dict[bytes, Tenant]:
    """The tenants of a keys file, by the SHA-256 of each of their keys.

    Raises `ConfigError` with one line for each problem, which names the tenant and the field. No
    line repeats what stands in the file but names of tenants and fields: the rest may be a key.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe is read only once, and may hold up
            raise ConfigError(f"{path}: is not a regular file; write the keys to one.")
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8; write it as TOML.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, too
        place = _PLACE.search(str(error))
        where = f", see {place[1]}" if place else ""
        raise ConfigError(f"{path}: is not valid TOML{where}.") from None
    tenants = tables.get("tenants")
    problems = _names_and_sight(tenants) if isinstance(tenants, dict) else []
    found: dict[bytes, Tenant] = {}
    try:
        file = _File.model_validate(tables)
    except ValidationError as invalid:
        problems += [
            f"{_field(error['loc'], tables)}: {_message(error['type'], error['msg'])}."
            for error in invalid.errors(include_url=False, include_input=False)
        ]
    else:
        found, shared = _by_hash(file)
        problems += shared
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return found


def _names_and_sight(tenants: dict[str, object]) -> list[str]:
    """What is wrong with names, and users of whom it is not said what they see.

    pydantic would say this only of a file whose fields are all well.
    """
    problems = [
        f"tenants: the name of tenant {number} is not allowed: give {TENANT_RULE}."
        for number, name in enumerate(tenants, 1)
        if not is_tenant_name(name)
    ]
    for name, table in tenants.items():
        if not isinstance(table, dict) or "interventions" in table:
            continue
        if table.get("role", "user") == "user":
            place = _field(("tenants", name), {"tenants": tenants})
            problems.append(
                f"{place}.interventions: say which the user sees, such as"
                ' ["team-a.*"], or ["*"] for all.'
            )
    return problems


def _by_hash(file: _File) -> tuple[dict[bytes, Tenant], list[str]]:
    """The tenants by the hashes of their keys, and what is wrong with the keys taken together."""
    found: dict[bytes, Tenant] = {}
    problems = []
    for name, table in file.tenants.items():
        tenant = table.tenant(name)
        for number, text in enumerate(table.keys):
            digest = bytes.fromhex(text.removeprefix(HASH))
            if digest in found:
                problems.append(
                    f"tenants.{name}.keys.{number}: is a key of `{found[digest].name}`, too; give"
                    " each tenant a key of its own, by `reft key new`."
                )
            found.setdefault(digest, tenant)
    if len(found) > MAX_KEYS:
        problems.append(f"tenants: there are {len(found)} keys, and may be {MAX_KEYS}.")
    return found, problems


def _message(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "is no setting; leave it out, or see docs/tenants.md for those that there are"
    if kind == "too_short":
        return "is empty; give at least one"
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _field(loc: tuple[int | str, ...], tables: dict[str, object]) -> str:
    """Dotted path of a problem; names that nobody chose for a tenant or a field are left out."""
    steps: list[str] = []
    for position, step in enumerate(loc):
        if position == 1 and loc[0] == "tenants":
            names = tables["tenants"]
            assert isinstance(names, dict)
            known = isinstance(step, str) and is_tenant_name(step)
            steps.append(str(step) if known else f"(tenant {list(names).index(step) + 1})")
        elif isinstance(step, int) or _FIELD.fullmatch(step):
            steps.append(str(step))
        else:
            steps.append("(a name that is none)")
    return ".".join(steps)

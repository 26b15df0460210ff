"""Reads what people have into records: files of rows, data sets of a hub, tables in memory."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reft_runtime.errors import ConfigError

Data = str | Path | Iterable[Mapping[str, Any]] | Any
"""A file's name, `hf:NAME[/CONFIG][:SPLIT]`, a list of dicts, or a pandas DataFrame."""

HUB = "hf:"
_SPLITS = ("train", "dev", "test", "validation")
"""File names that say nothing about the task, which is called by its folder instead."""


@dataclass(slots=True)
class Records:
    """What a source holds: each record with its place, and the places that hold none.

    `wrong` are messages with the line that they are about, in its order. `sha256` is that of a
    file's bytes, or of the rows as JSON lines.
    """

    name: str
    records: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    sha256: str = ""


def read_records(source: Data) -> Records:
    """Read a source whole; what is wrong with single lines is kept in `wrong`.

    The ending of a file's name says how: `.csv`, `.tsv`, `.parquet`, `.json` (an array, or JSON
    lines); JSON lines otherwise. Raises `ConfigError` where nothing of it can be read, and
    `TypeError` for an object that holds no rows.
    """
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        return _read_hub(text) if text.startswith(HUB) else _read_file(Path(text))
    return _read_memory(source)


def file_for(source: str) -> Path:
    """The file that a training on this source writes where none is named: named as the data."""
    if source.startswith(HUB):
        path = Path(source.removeprefix(HUB).partition(":")[0]).name
    else:
        path = _name(Path(source))
    stem = re.sub(r"[^a-z0-9._-]+", "-", path.lower()).strip("-._")[:64]
    return Path(f"{stem or 'trained'}.safetensors")


def _name(path: Path) -> str:
    # Not pathlib's `resolve`, which raises no OSError for links in a circle.
    return written(
        path.stem if path.stem not in _SPLITS else Path(os.path.realpath(path)).parent.name
    )


def written(path: str | os.PathLike[str]) -> str:
    """A path as text, which is all that a manifest holds; names of files may be other bytes."""
    return os.fspath(path).encode(errors="replace").decode()


def _read_file(path: Path) -> Records:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.", param="data") from None
    found = Records(_name(path), sha256=hashlib.sha256(data).hexdigest())
    ending = path.suffix.lower()
    if ending in (".parquet", ".pq"):
        items = _parquet_rows(path)
        found.records = [(f"{path.name}, row {n}", row) for n, row in enumerate(items, 1)]
        return found
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8.", param="data"
        ) from None
    if ending in (".csv", ".tsv", ".tab"):
        _read_table(found, path.name, text, "\t" if ending != ".csv" else None)
    elif ending == ".json" and text.lstrip().startswith("["):
        _read_array(found, path.name, text)
    else:
        _read_lines(found, path.name, text)
    return found


def _read_lines(found: Records, name: str, text: str) -> None:
    # Not splitlines: strings in JSON may hold U+2028 and other things that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(" \t\r"):
            continue
        where = f"{name}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            found.wrong.append(f"{where}: not JSON: {error}.")
            continue
        _add(found, where, fields)


def _read_array(found: Records, name: str, text: str) -> None:
    decoder, line, counted = json.JSONDecoder(), 1, 0
    place, between = text.index("[") + 1, False
    while True:
        place = _BLANKS.match(text, place).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, place), place
        where, char = f"{name}, line {line}", text[place : place + 1]
        if char == "]" and (between or not found.records):
            if text[place + 1 :].strip():
                found.wrong.append(f"{where}: there is something behind the array's end.")
            return
        if between:
            if char != ",":
                found.wrong.append(f"{where}: not JSON: a comma or the end, ], should be here.")
                return
            place, between = place + 1, False
            continue
        try:
            fields, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            # What follows a broken item of an array cannot be told apart from it.
            found.wrong.append(f"{where}: not JSON: {error}.")
            return
        _add(found, where, fields)
        between = True


_BLANKS = re.compile(r"[ \t\r\n]*")


def _add(found: Records, where: str, fields: object) -> None:
    if isinstance(fields, dict):
        found.records.append((where, fields))
    else:
        found.wrong.append(f"{where}: must be a JSON object.")


def _read_table(found: Records, name: str, text: str, delimiter: str | None) -> None:
    header: list[str] | None = None
    for line, cells in _table_rows(found, name, text, delimiter):
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if "" in header or len(set(header)) < len(header):
                raise ConfigError(
                    f"{name}, line {line}: the first line must name each column once; it has"
                    f" {', '.join(repr(cell) for cell in header)}.",
                    param="data",
                )
        elif len(cells) != len(header):
            found.wrong.append(
                f"{name}, line {line}: has {len(cells)} cells, the first line {len(header)}; put"
                " quotes around text that holds the separator or a line's end."
            )
        else:
            found.records.append((f"{name}, line {line}", dict(zip(header, cells, strict=True))))


def _table_rows(
    found: Records, name: str, text: str, delimiter: str | None
) -> Iterator[tuple[int, list[str]]]:
    """Rows of a table, each with the line it begins in; broken ones go to `wrong`."""
    named = _SEPARATOR_LINE.match(text)
    delimiter = delimiter or (named[1] if named else _separator(text))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    if named:
        next(reader)
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        while True:
            line = reader.line_num + 1
            try:
                yield line, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                found.wrong.append(f"{name}, line {line}: not a row of a table: {error}.")
    finally:
        csv.field_size_limit(limit)


_SEPARATOR_LINE = re.compile(r"sep=([,;\t])[\r\n]")
"""The line that Excel takes the separator from."""

_QUOTED = r'"[^"]*"'


def _separator(text: str) -> str:
    """The separator that stands most often in a table's first line; a comma where none does."""
    header = re.match(rf'(?:{_QUOTED}|[^"\r\n])*', text.lstrip())
    bare = re.sub(_QUOTED, "", header[0] if header else "")
    return max(",;\t", key=bare.count)


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{path}: Parquet needs pyarrow; run `pip install 'reft-server[parquet]'`, or save the"
            " rows as CSV or JSON lines.",
            param="data",
        ) from None
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not Parquet: {_first_line(error)}.", param="data") from None
    return rows


_HUB_NAME = re.compile(r"(?P<name>[^:]+?)(:(?P<split>[^:/]+))?")


def _read_hub(source: str) -> Records:
    """Read `hf:NAME[/CONFIG][:SPLIT]`: NAME is OWNER/SET or SET, and SPLIT by default train."""
    found = _HUB_NAME.fullmatch(source.removeprefix(HUB))
    if found is None:
        raise ConfigError(
            f"{source}: write hf:NAME, hf:NAME/CONFIG or hf:NAME/CONFIG:SPLIT, such as"
            " hf:nyu-mll/glue/sst2:validation.",
            param="data",
        )
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{source}: needs the datasets library; run `pip install 'reft-server[hf]'`.",
            param="data",
        ) from None
    split = found["split"] or "train"
    parts = found["name"].split("/")
    # Two parts are an owner and a set, or a set without an owner and its configuration.
    readings: list[tuple[str, str | None]] = [("/".join(parts[:2]), "/".join(parts[2:]) or None)]
    if len(parts) == 2:
        readings.append((parts[0], parts[1]))
    errors = []
    for name, config in readings:
        try:
            table = datasets.load_dataset(name, config, split=split)
            break
        except Exception as error:  # of many libraries: whatever it is, it is about this name
            errors.append(_first_line(error))
    else:
        raise ConfigError(
            f"{source}: cannot be read: {errors[0].rstrip('.')}. Check name, configuration and"
            " split; a private or gated set needs HF_TOKEN.",
            param="data",
        )
    return _named(parts[-1], _hub_rows(table), f"{source}, row")


def _hub_rows(table: Any) -> list[Mapping[str, Any]]:
    """Rows of a data set of the datasets library, classes by their names."""
    classes = {
        column: feature.names
        for column, feature in (getattr(table, "features", None) or {}).items()
        if hasattr(feature, "int2str")
    }
    return [
        {
            column: classes[column][value] if column in classes and _is_class(value) else value
            for column, value in row.items()
        }
        for row in table
    ]


def _is_class(value: object) -> bool:
    return isinstance(value, int) and value >= 0  # -1 stands for a row without one


def _read_memory(source: Any) -> Records:
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a pandas DataFrame
        source = source.to_dict("records")
    elif hasattr(source, "features") and hasattr(source, "column_names"):  # a datasets.Dataset
        source = _hub_rows(source)
    if isinstance(source, bytes | Mapping) or not isinstance(source, Iterable):
        extra = "; of a dict of columns pandas.DataFrame(data) makes rows"
        raise TypeError(
            "data: give a file's name, a list of rows, each a dict such as {'text': ..., 'label':"
            f" ...}}, or a pandas DataFrame, not {type(source).__name__}"
            f"{extra if isinstance(source, Mapping) else ''}."
        )
    rows = list(source)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise TypeError(
                f"data: row {number} must be a dict with text for keys, such as {{'text': ...,"
                f" 'label': ...}}, not {repr(row)[:80]}."
            )
    return _named("rows", rows, "row")


def _named(name: str, rows: Sequence[Mapping[str, Any]], place: str) -> Records:
    lines = (json.dumps(dict(row), sort_keys=True, default=str) for row in rows)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    records = [(f"{place} {number}", row) for number, row in enumerate(rows, 1)]
    return Records(name, records, sha256=digest)


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300].rstrip(".")

"""What a data file holds: text, JSON, or the rows of a table, each with the place that a message names.

A file that nobody has looked at may hold anything: whatever it is, the answer is its rows or one sentence.
"""

from __future__ import annotations

import csv
import io
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, cut, listed, printable, shown
from ..files.json_text import first_repeated, parse_json

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
"""The ends of the names of files that hold a row a sample."""

_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z", ".xlsx", ".xls", ".ods", ".arrow", ".feather", ".npz")


@dataclass(frozen=True)
class Table:
    """Rows, each with its place, and the names of the labels in columns that hold their numbers (a ClassLabel's)."""

    rows: Iterable[tuple[str, Any]]
    label_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


def named(path: str | Path) -> str:
    """A path as a message names it: one line, of bounded length, in characters that can be written."""
    return cut(printable(str(path).encode("utf-8", "backslashreplace").decode()).replace("\n", "\\n"))


def read_rows(path: str | Path) -> Table:
    """The rows of a .csv, .tsv, .parquet or .json file (a list of objects), or of one with a JSON object a line.

    All values of a .csv and .tsv file are text, as they are written in it.

    Raises:
        DataError: the file is not there, is no such file, or is damaged; names file and line or row.
    """
    if not isinstance(path, str | os.PathLike):
        raise DataError(
            f"A file of samples is given as {shown(path)}, not by its name; use Task.from_records for rows."
        )
    path = Path(path)
    if path.suffix.lower() in _PACKED:
        raise DataError(
            f"{named(path)} is compressed or of a program of its own; unpack it, or save it as one of "
            f"{', '.join(TABLE_SUFFIXES)}."
        )
    return _READERS.get(path.suffix.lower(), _read_lines)(path)


def read_json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for each line of a JSON-lines file; blank lines are skipped.

    Raises:
        DataError: the file is not there or not UTF-8, or a line is no JSON; names file and line.
    """
    return _json_lines(read_text(path), path)


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        DataError: the file is not there, or is no JSON; names file and line.
    """
    return parse_json(read_text(path), named(path))


def read_text(path: str | Path, newline: str | None = None) -> str:
    """A UTF-8 file's text (a byte-order mark is dropped), or a DataError that names the file.

    Args:
        newline: as of ``open``; '' keeps the ends of the lines as they are.
    """
    check_file(path)
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{named(path)} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{named(path)} cannot be read: {error.strerror or error}.") from error


def check_file(path: str | Path) -> None:
    """Refuse what is no file of data: a folder, a device or a pipe, which might never end.

    Raises:
        DataError: it is none, or it is not there.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise DataError(f"{named(path)} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{named(path)} cannot be read: no file has such a name ({error}).") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise DataError(f"{named(path)} cannot be read: it is {kind}, not a file.")


def label_names(features: Any) -> dict[str, list[str]]:
    """The names of the labels of each ClassLabel column of a data set's features."""
    found = dict(features) if isinstance(features, Mapping) else {}
    return {name: list(kind.names) for name, kind in found.items() if type(kind).__name__ == "ClassLabel"}


# ------------------------------------------------------------------ the formats


def _read_lines(path: Path) -> Table:
    return Table(read_json_lines(path))


def _json_lines(text: str, path: str | Path) -> Iterator[tuple[str, Any]]:
    place = named(path)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{place}, line {number}", parse_json(line, place, number)


def _read_json_file(path: Path) -> Table:
    """A list of objects, or, as such files often are, a JSON object a line."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return Table(_json_lines(text, path))
    rows = parse_json(text, named(path))
    return Table((f"{named(path)}, row {index}", row) for index, row in enumerate(rows))


def _read_csv(path: Path) -> Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    text = read_text(path, newline="")
    _check_delimiter(text, delimiter, path)
    records = _csv_records(text, delimiter, path)
    if not records:
        raise DataError(f"{named(path)} is empty; its first line must name the columns.")
    (_, header), *rows = records
    twice = first_repeated(name for name in header if name)
    if twice:
        raise DataError(f"{named(path)}: the header names the column {shown(twice, 60)} more than once; keep one.")
    return Table(_csv_rows(rows, header))


def _csv_rows(rows: list[tuple[str, list[str]]], header: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    for place, cells in rows:
        if len(cells) != len(header):
            raise DataError(
                f"{place} has {len(cells)} values for the {len(header)} columns {listed(header)}; put quotation marks "
                f"around a value with a separator in it."
            )
        if cells == header:
            raise DataError(f"{place} names the columns once more, as where two files were joined; remove it.")
        yield place, dict(zip(header, cells, strict=True))


def _check_delimiter(text: str, delimiter: str, path: Path) -> None:
    header = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]
    other = next((mark for mark in ",;\t|" if mark in header), "")
    if other and delimiter not in header:
        raise DataError(
            f"{named(path)}: its header {shown(header, 100)} has no {_MARKS[delimiter]} between the columns but a "
            f"{_MARKS[other]}; save it with commas as .csv, or with tabs as .tsv."
        )


_MARKS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}


def _csv_records(text: str, delimiter: str, path: Path) -> list[tuple[str, list[str]]]:
    """The place and the values of each record; a blank line is none."""
    records: list[tuple[str, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    with _long_values():
        try:
            for cells in reader:
                if cells:
                    records.append((f"{named(path)}, line {line}", cells))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{named(path)}, line {line} is not CSV ({cut(str(error), 80)}); a value with quotation marks in it is "
                f"put into quotation marks, and each of its own is written twice."
            ) from error
    return records


_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def _long_values() -> Iterator[None]:
    """No limit to the length of a value, which the csv module has for the whole process."""
    with _ONE_AT_A_TIME:
        before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _read_parquet(path: Path) -> Table:
    check_file(path)
    try:
        table, names = _parquet_table(path)
        rows = table.to_pylist()
    except Exception as error:
        # A reader of a binary format does not say what it raises for a damaged file: its own errors, ValueError, ...
        detail = cut(" ".join(str(error).split()), 120)
        raise DataError(f"{named(path)} cannot be read as Parquet ({detail}); write the file again.") from error
    twice = first_repeated(table.column_names)
    if twice is not None:
        raise DataError(f"{named(path)} has the column {shown(twice, 60)} more than once; keep one.")
    return Table(((f"{named(path)}, row {index}", row) for index, row in enumerate(rows)), names)


def _parquet_table(path: Path) -> tuple[Any, dict[str, list[str]]]:
    from datasets import Features
    from pyarrow import parquet

    # Of one file, without what a folder's name might say of its columns.
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read()
    return table, label_names(Features.from_arrow_schema(table.schema))


_READERS: dict[str, Callable[[Path], Table]] = {
    ".json": _read_json_file,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}

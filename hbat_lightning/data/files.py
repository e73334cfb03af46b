"""Single files: rows of JSON, JSON Lines, tables and Parquet, one after the other, with the place of every fault.

Text is read row by row, so that a file takes no more memory than its longest row; only a `.json` file is one piece.
Nothing here runs code that a file brings: pickles are refused by name.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from hbat_lightning.errors import DataError

_TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
SUFFIXES = (*_TEXT_SUFFIXES, *(suffix + ".gz" for suffix in _TEXT_SUFFIXES), ".parquet")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".joblib", ".dill")
LONGEST_ROW = 64 * 2**20  # bytes: what is longer is no row, but a file without line ends or with an open quotation mark
LARGEST_JSON = 2**30  # bytes, decompressed


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in the data, before its format is known.

    Attributes:
        source: The file, folder or hub id that the row came from.
        number: Counted from 1: the physical line on which the row starts in JSONL and CSV files, else the row's place.
        values: Column name to value.
    """

    source: str
    number: int
    values: dict[str, Any]


def suffix_of(place: Path) -> str | None:
    """The known data suffix a file name ends in, or None."""
    return max((s for s in SUFFIXES if place.name.lower().endswith(s)), key=len, default=None)


def read_file(place: Path) -> Iterator[RawRow]:
    """The rows of a file; one without any row gives none.

    Raises:
        DataError: The file is empty, damaged or of an unknown kind.
    """
    suffix, known = suffix_of(place), ", ".join(SUFFIXES)
    if suffix is None and place.suffix.lower() in _PICKLES:
        message = "it is of a kind that can hold a pickle, which runs code when it is read, so it is refused"
        raise DataError(message, str(place), remedy=f"Write the rows as one of {known}")
    if suffix is None:
        raise DataError("the kind of file is not known", str(place), remedy=f"Rename or convert it to one of {known}")
    if not place.is_file():
        raise DataError("it is no regular file", str(place), remedy="Copy what it gives into a file")
    if suffix == ".parquet":
        return _read_parquet(place)
    compressed, kind = suffix.endswith(".gz"), suffix.removesuffix(".gz")
    if kind == ".json":
        return _read_json(place, compressed)
    if kind in (".jsonl", ".ndjson"):
        return _read_json_lines(place, compressed)
    if kind == ".txt":
        return _read_lines(place, compressed)
    return _read_table(place, compressed, delimiter="\t" if kind == ".tsv" else ",")


def numbered(source: str, rows: Any) -> Iterator[RawRow]:
    """Count rows from 1 and refuse those that are not objects."""
    return (_row(source, number, values) for number, values in enumerate(rows, 1))


def _row(source: str, number: int, values: Any) -> RawRow:
    if not isinstance(values, dict):
        remedy = 'Write every row as an object such as {"instruction": …, "output": …}'
        if isinstance(values, list) and ".json" in source:
            remedy += "; a file that is one JSON array must be named .json"
        raise DataError(f"the row is a {type(values).__name__}, not an object", source, number, remedy)
    return RawRow(source, number, values)


# --- text ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(place: Path, compressed: bool) -> Iterator[BinaryIO]:
    try:
        with cast(BinaryIO, gzip.open(place, "rb") if compressed else place.open("rb")) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        remedy = "Fetch or compress it again; if it is not compressed, drop .gz from its name"
        raise DataError(f"the gzip data is damaged ({error})", str(place), remedy=remedy) from error
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror})", str(place), remedy="Check its permissions") from error


def _lines(place: Path, compressed: bool) -> Iterator[str]:
    """Lines with their ends. Only line feeds end one: JSON allows U+2028 and its like inside strings."""
    number = offset = 0
    with _opened(place, compressed) as file:
        while line := file.readline(LONGEST_ROW + 1):
            number += 1
            if len(line) > LONGEST_ROW:
                raise _too_long(place, number)
            yield _decoded(place, line, number, offset)
            offset += len(line)


def _too_long(place: Path, number: int) -> DataError:
    message = f"the row is longer than {LONGEST_ROW // 2**20} MiB"
    return DataError(message, str(place), number, "Check that the file has line ends, and closes its quotation marks")


def _decoded(place: Path, data: bytes, line: int, offset: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start},"
            f" line {line + data[: error.start].count(10)}",
            str(place),
            remedy="Save the file as UTF-8, for example with `iconv -f <its encoding> -t utf-8`",
        ) from error
    # the byte order mark that Windows tools write is not part of the first column
    return text.removeprefix("\ufeff") if offset == 0 else text


def _empty(source: str) -> DataError:
    return DataError("the file is empty", source, remedy="Check that it was written or downloaded completely")


def _read_lines(place: Path, compressed: bool) -> Iterator[RawRow]:
    """Every line is a text."""
    source, empty = str(place), True
    for number, line in enumerate(_lines(place, compressed), 1):
        if line.strip():
            empty = False
            yield RawRow(source, number, {"text": line.removesuffix("\n").removesuffix("\r")})
    if empty:
        raise _empty(source)


# --- JSON ---------------------------------------------------------------------------------------------------------


class _RepeatedKeyError(ValueError):
    """A key that an object holds twice: a dictionary would keep the last value and lose the other."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(
            f"the key {next(key for key in keys if keys.count(key) > 1)[:60]!r} stands twice in one object"
        )
    return values


_JSON = json.JSONDecoder(object_pairs_hook=_object)
_BROKEN = (ValueError, RecursionError)


def _read_json(place: Path, compressed: bool) -> Iterator[RawRow]:
    source = str(place)
    with _opened(place, compressed) as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        message = f"a .json file is read as one piece, and this one is larger than {LARGEST_JSON // 2**20} MiB"
        raise DataError(message, source, remedy="Write it as JSON Lines (.jsonl), which are read row by row")
    text = _decoded(place, data, 1, 0)
    del data
    if not text.strip():
        raise _empty(source)
    try:
        content = _JSON.decode(text)
    except _BROKEN as error:
        raise _broken_json(source, text, error) from error
    del text
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(
                f"the file is one object with {len(lists)} lists in it, so its rows cannot be told",
                source,
                remedy="Make it a list of objects, or name a file with one object per line .jsonl",
            )
        content = lists[0]
    if not isinstance(content, list):
        raise DataError(
            f"the file is a single {type(content).__name__}, not a list of objects",
            source,
            remedy="Write it as [{…}, {…}]",
        )
    yield from numbered(source, content)


def _broken_json(source: str, text: str, error: ValueError | RecursionError) -> DataError:
    """Say in which line and in which element of the array the text stops being JSON."""
    if isinstance(error, RecursionError):
        return DataError("the JSON is nested too deeply", source, remedy="Check that it is the right file")
    element = _broken_element(text)
    if not isinstance(error, json.JSONDecodeError):  # a key twice, a number of thousands of digits
        return DataError(f"broken JSON: {first_line(error)}", source, element, "Repair or remove the row")
    if error.msg == "Extra data" and text.lstrip().startswith("{"):
        return DataError(
            f"line {error.lineno} goes on behind the first object, as in JSON Lines",
            source,
            remedy="Name a file with one object per line .jsonl",
        )
    where = "" if element is None else f" (in element {element} of the array)"
    message = f"broken JSON at line {error.lineno}, column {error.colno}{where}: {error.msg}"
    return DataError(message, source, element, "Repair that place; if the file ends there, fetch or write it again")


def _broken_element(text: str) -> int | None:
    """The number, from 1, of the array element that does not parse; None where the text is no array."""
    blank = re.compile(r"[\s,]*")
    opening = re.match(r"\s*\[", text)
    if opening is None:
        return None
    position, element = opening.end(), 0
    while True:
        element += 1
        start = blank.match(text, position)
        try:
            _, position = _JSON.raw_decode(text, start.end() if start else position)
        except _BROKEN:
            return element


def _read_json_lines(place: Path, compressed: bool) -> Iterator[RawRow]:
    source, empty = str(place), True
    for number, line in enumerate(_lines(place, compressed), 1):
        if not line.strip():
            continue
        empty = False
        try:
            values = _JSON.decode(line)
        except _BROKEN as error:
            remedy = "Repair or remove the line; every line must be one whole object"
            raise DataError(f"broken JSON: {first_line(error)}", source, number, remedy) from error
        yield _row(source, number, values)
    if empty:
        raise _empty(source)


# --- tables -------------------------------------------------------------------------------------------------------


class _RowLines:
    """The lines of a table, of which no row may take too many: a quoted field may hold line ends."""

    def __init__(self, place: Path, compressed: bool) -> None:
        self._place, self._lines = place, self._ended(_lines(place, compressed))
        self.begun = self._taken = 0

    def begin(self, line: int) -> None:
        """A row begins on that line."""
        self.begun, self._taken = line, 0

    def __iter__(self) -> _RowLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._taken += len(line)
        if self._taken > LONGEST_ROW:
            raise _too_long(self._place, self.begun)
        return line

    @staticmethod
    def _ended(lines: Iterator[str]) -> Iterator[str]:
        """Lines may also end in a lone carriage return."""
        for line in lines:
            yield from re.split(r"(?<=\r)(?=[^\n])", line)


def _read_table(place: Path, compressed: bool, delimiter: str) -> Iterator[RawRow]:
    source, lines = str(place), _RowLines(place, compressed)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        start = reader.line_num + 1  # where the row starts is known only before it
        lines.begin(start)
        try:
            cells = _cells(reader)
        except csv.Error as error:
            remedy = "Check the quotation marks; one inside a field is written twice"
            raise DataError(f"the row cannot be parsed ({error})", source, start, remedy) from error
        if cells is None:
            break
        if not cells:
            continue
        if not header:
            header = cells
            if len(set(header)) < len(header):
                raise DataError("the header names a column twice", source, start, "Rename one of the two columns")
        elif len(cells) != len(header):
            message = f"the row has {len(cells)} fields, the header has {len(header)}"
            raise DataError(message, source, start, "Put fields that hold a delimiter or line end in quotation marks")
        else:
            yield _row(source, start, dict(zip(header, cells, strict=True)))
    if not any(name.strip() for name in header):
        raise _empty(source)


def _cells(reader: Any) -> list[str] | None:
    """The next row; the limit of a field, 128 KiB by default, is the whole process's, and put back."""
    before = csv.field_size_limit(LONGEST_ROW)
    try:
        return cast("list[str] | None", next(reader, None))
    finally:
        csv.field_size_limit(before)


# --- Parquet ------------------------------------------------------------------------------------------------------


def _read_parquet(place: Path) -> Iterator[RawRow]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    source = str(place)
    try:
        file = pq.ParquetFile(place)
        names = file.schema_arrow.names
    except Exception as error:
        raise _damaged(source, error) from error
    with file:
        if len(set(names)) < len(names):
            raise DataError("two columns have one name", source, remedy="Rename one of the two columns")
        yield from numbered(source, _parquet_values(source, file))


def _parquet_values(source: str, file: Any) -> Iterator[Any]:
    try:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except Exception as error:
        raise _damaged(source, error) from error


def _damaged(source: str, error: Exception) -> DataError:
    """Damage ends in any of a dozen error types of Arrow, of Unicode, of dates and of the file system."""
    return DataError(f"not a readable Parquet file ({first_line(error)})", source, remedy="Fetch or write it again")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, not too much of it."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

"""Reading rows: files, folders and hub ids become plain dictionaries that remember where they came from."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hbat_lightning import hub
from hbat_lightning.errors import DataError, UserError

_TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
_SUFFIXES = (*_TEXT_SUFFIXES, *(suffix + ".gz" for suffix in _TEXT_SUFFIXES), ".parquet")
_EMBEDDED = "embedded://"
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
# What `datasets` writes beside the rows; in a folder of data files these are not rows.
_BOOKKEEPING = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})


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


@dataclass(frozen=True)
class HubSelection:
    """What of a data set on the hub is read.

    Attributes:
        subset: One of its configurations, `name` in `datasets.load_dataset`.
        revision: A branch, a tag or a commit.
        data_files: A pattern of files in the repository, or one per split, where its layout does not say which are rows.
    """

    subset: str | None = None
    revision: str | None = None
    data_files: str | Mapping[str, str] | None = None

    def options(self) -> dict[str, Any]:
        """Those that were given, as `datasets.load_dataset` calls them."""
        named = {"name": self.subset, "revision": self.revision, "data_files": self.data_files}
        return {name: value for name, value in named.items() if value is not None}


WHOLE = HubSelection()


def read_rows(
    path: str, split: str | None = None, limit: int | None = None, selection: HubSelection = WHOLE
) -> list[RawRow]:
    """Read the rows of a file, a folder or a data set on the hub.

    Args:
        path: A `.json`, `.jsonl`, `.ndjson`, `.csv`, `.tsv` or `.txt` file (also with `.gz`; of the last every line is a
            row with the column `text`), a `.parquet` file, a folder written by `datasets.save_to_disk`, a folder of such
            files (text files count only where there are no others), an `embedded://` address, or a hub id
            (`owner/name`). The network is used only for a hub id, when nothing of that name is on disk.
        split: The split of a folder or hub data set; `None` means the only one there is, or `train` on the hub. Of a
            hub data set also a slice, such as `validation[:500]`.
        limit: Read at most so many rows; what lies behind them is not looked at.
        selection: What of a hub data set is read.

    Returns:
        At least one row, in the order of the data.

    Raises:
        DataError: The data is missing, empty, damaged or of an unknown kind; one line naming place and remedy.
        UserError: `limit` is smaller than 1, or something is to be chosen within a file or folder that holds no choice.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: ask for at least one row, or leave it out to read all of them")
    rows = list(islice(_open_source(path, split, selection), limit))
    if not rows:
        raise DataError("it holds no rows", path, remedy="Check that the right file was written completely")
    return rows


def is_on_hub(path: str) -> bool:
    """Whether rows are asked of the hub: nothing of that name is on disk, and it is not named like a data file."""
    place = Path(path).expanduser()
    return hub.is_id(path) and not place.exists() and _suffix(place) is None


def _open_source(path: str, split: str | None, selection: HubSelection) -> Iterator[RawRow]:
    within_hub = {"subset": selection.subset, "revision": selection.revision, "data_files": selection.data_files}
    if path.startswith(_EMBEDDED):
        from hbat_lightning.data import embedded  # late: most runs read files and need none of it

        _refuse_choice(path, split=split, **within_hub)
        return _numbered(path, embedded.rows(path))
    place = Path(path).expanduser()
    if place.is_dir():
        _refuse_choice(path, **within_hub)
        return _read_folder(place, split)
    if place.exists():
        _refuse_choice(path, split=split, **within_hub)
        return _read_file(place)
    if is_on_hub(path):
        return _read_hub(path, split or "train", selection)
    raise DataError("there is no such file or folder", path, remedy=_nearest_name(place))


def _refuse_choice(path: str, **choice: Any) -> None:
    """A choice is never passed over: without it, held-out rows on the hub would be training rows in a file."""
    given = ", ".join(f"{name} {value!r}" for name, value in choice.items() if value is not None)
    if given:
        where = "a hub data set or a folder" if choice.get("split") else "a hub data set"
        raise UserError(
            f"{path}: there is no {given} to choose in it, only in {where}; set to null those of split, val_split,"
            " test_split, subset, revision and data_files that were meant for another path"
        )


def _numbered(source: str, rows: Any) -> Iterator[RawRow]:
    """Count rows from 1 and refuse those that are not objects."""
    return (_row(source, number, values) for number, values in enumerate(rows, 1))


def _row(source: str, number: int, values: Any) -> RawRow:
    if not isinstance(values, dict):
        remedy = 'Write every row as an object such as {"instruction": …, "output": …}'
        if isinstance(values, list) and ".json" in source:
            remedy += "; a file that is one JSON array must be named .json"
        raise DataError(f"the row is a {type(values).__name__}, not an object", source, number, remedy)
    return RawRow(source, number, values)


def _suffix(place: Path) -> str | None:
    """The known data suffix a file name ends in, or None."""
    return max((s for s in _SUFFIXES if place.name.lower().endswith(s)), key=len, default=None)


def _nearest_name(place: Path) -> str:
    folder = place.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1)
    if near:
        return f"Did you mean {folder / near[0]}?"
    return f"Check the path; relative paths start at {Path.cwd()}"


# --- single files -----------------------------------------------------------------------------------------------


def _read_file(place: Path) -> Iterator[RawRow]:
    suffix = _suffix(place)
    if suffix is None:
        known = ", ".join(_SUFFIXES)
        raise DataError("the kind of file is not known", str(place), remedy=f"Rename or convert it to one of {known}")
    if suffix == ".parquet":
        return _read_parquet(place)
    text = _read_text(place, compressed=suffix.endswith(".gz"))
    if not text.strip():
        raise DataError("the file is empty", str(place), remedy="Check that it was written or downloaded completely")
    kind = suffix.removesuffix(".gz")
    if kind == ".json":
        return _read_json(str(place), text)
    if kind in (".jsonl", ".ndjson"):
        return _read_json_lines(str(place), text)
    if kind == ".txt":
        return _read_lines(str(place), text)
    return _read_table(str(place), text, delimiter="\t" if kind == ".tsv" else ",")


def _read_text(place: Path, compressed: bool) -> str:
    try:
        data = place.read_bytes()
        if compressed:
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        remedy = "Fetch or compress it again; if it is not compressed, drop .gz from its name"
        raise DataError(f"the gzip data is damaged ({error})", str(place), remedy=remedy) from error
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror})", str(place), remedy="Check its permissions") from error
    try:
        return data.decode("utf-8-sig")  # the byte order mark that Windows tools write is not part of the first column
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"not UTF-8: byte {data[error.start]:#04x} at offset {error.start}, line {line}",
            str(place),
            remedy="Save the file as UTF-8, for example with `iconv -f <its encoding> -t utf-8`",
        ) from error


def _read_json(source: str, text: str) -> Iterator[RawRow]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _broken_json(source, text, error) from error
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
    return _numbered(source, content)


def _broken_json(source: str, text: str, error: json.JSONDecodeError | RecursionError) -> DataError:
    """Say in which line and in which element of the array the text stops being JSON."""
    if isinstance(error, RecursionError):
        return DataError("the JSON is nested too deeply", source, remedy="Check that it is the right file")
    if error.msg == "Extra data" and text.lstrip().startswith("{"):
        return DataError(
            f"line {error.lineno} goes on behind the first object, as in JSON Lines",
            source,
            remedy="Name a file with one object per line .jsonl",
        )
    element = _broken_element(text)
    where = "" if element is None else f" (in element {element} of the array)"
    message = f"broken JSON at line {error.lineno}, column {error.colno}{where}: {error.msg}"
    return DataError(message, source, element, "Repair that place; if the file ends there, fetch or write it again")


def _broken_element(text: str) -> int | None:
    """The number, from 1, of the array element that does not parse; None where the text is no array."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    opening = re.match(r"\s*\[", text)
    if opening is None:
        return None
    position, element = opening.end(), 0
    while True:
        element += 1
        start = blank.match(text, position)
        try:
            _, position = decoder.raw_decode(text, start.end() if start else position)
        except ValueError:
            return element


def _read_json_lines(source: str, text: str) -> Iterator[RawRow]:
    # str.splitlines would also cut at U+2028 and its like, which JSON allows inside strings
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            remedy = "Repair or remove the line; every line must be one whole object"
            raise DataError(f"broken JSON: {_first_line(error)}", source, number, remedy) from error
        yield _row(source, number, values)


def _read_lines(source: str, text: str) -> Iterator[RawRow]:
    lines = ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1))
    return (RawRow(source, number, {"text": line}) for number, line in lines if line.strip())


def _read_table(source: str, text: str, delimiter: str) -> Iterator[RawRow]:
    previous_limit = csv.field_size_limit(max(len(text), 1))  # the default refuses fields beyond 128 KiB
    try:
        yield from _table_rows(source, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    finally:
        csv.field_size_limit(previous_limit)


def _table_rows(source: str, reader: Any) -> Iterator[RawRow]:
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1  # a quoted field may hold line ends: where the row starts is known only before it
        try:
            cells = next(reader, None)
        except csv.Error as error:
            remedy = "Check the quotation marks; one inside a field is written twice"
            raise DataError(f"the row cannot be parsed ({error})", source, start, remedy) from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                raise DataError("the header names a column twice", source, start, "Rename one of the two columns")
        elif len(cells) != len(header):
            message = f"the row has {len(cells)} fields, the header has {len(header)}"
            raise DataError(message, source, start, "Put fields that hold a delimiter or line end in quotation marks")
        else:
            yield _row(source, start, dict(zip(header, cells, strict=True)))


def _read_parquet(place: Path) -> Iterator[RawRow]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(place) as file:
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (pa.ArrowException, OSError) as error:
        remedy = "Fetch or write it again"
        raise DataError(f"not a readable Parquet file ({_first_line(error)})", str(place), remedy=remedy) from error
    return _numbered(str(place), rows)


# --- folders and the hub ----------------------------------------------------------------------------------------


def _read_folder(folder: Path, split: str | None) -> Iterator[RawRow]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _read_saved_dataset(folder, split)
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and _suffix(file) is not None
        and file.name not in _BOOKKEEPING
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if any(not _is_lines(file) for file in files):
        files = [file for file in files if not _is_lines(file)]  # a licence or a note beside the rows
    if not files:
        known = ", ".join(_SUFFIXES)
        raise DataError("the folder holds no data files", str(folder), remedy=f"Put files in it that end in {known}")
    return chain.from_iterable(_read_file(file) for file in _files_of_split(folder, files, split))


def _is_lines(file: Path) -> bool:
    return file.name.lower().removesuffix(".gz").endswith(".txt")


def _files_of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Keep the files of one split; several splits in one folder are never mixed unasked."""
    if split is not None:
        chosen = [file for file in files if _file_split(file, (split,)) == split]
        if not chosen:
            names = ", ".join(file.name for file in files[:8])
            message = f"no file of the split {split!r} among {names}"
            raise DataError(message, str(folder), remedy="Name the split as the files begin, or give one file as path")
        return chosen
    found = {_file_split(file, _SPLITS) for file in files} - {None}
    if len(found) > 1:
        names = ", ".join(sorted(str(name) for name in found))
        raise DataError(f"the folder holds several splits ({names})", str(folder), remedy="Choose one with `split`")
    return files


def _file_split(file: Path, splits: tuple[str, ...]) -> str | None:
    first = re.split(r"[-_.]", file.name, maxsplit=1)[0]
    return next((name for name in splits if name in (first, file.parent.name)), None)


def _read_saved_dataset(folder: Path, split: str | None) -> Iterator[RawRow]:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder ends in any of a dozen error types of Arrow, JSON and the file system
        remedy = "Write it again with save_to_disk"
        message = f"the saved data set cannot be read ({_first_line(error)})"
        raise DataError(message, str(folder), remedy=remedy) from error
    if isinstance(data, dict):
        name = split or ("train" if "train" in data else next(iter(data)) if len(data) == 1 else "train")
        if name not in data:
            remedy = f"Choose one of {', '.join(data)} with `split`"
            raise DataError(f"the data set has no split {name!r}", str(folder), remedy=remedy)
        data = data[name]
    return _numbered(str(folder), iter(data))


def _read_hub(name: str, split: str, selection: HubSelection) -> Iterator[RawRow]:
    import datasets

    host = hub.unreachable()
    if host is not None and not Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___")).exists():
        message = f"no file or folder of this name, and the hub ({host}) cannot be reached"
        raise DataError(message, name, remedy=f"Check the path, or the network; relative paths start at {Path.cwd()}")
    options = selection.options()
    try:
        data = datasets.load_dataset(name, split=split, **options)
    except Exception as error:  # offline, unknown name, gated, unknown split, needs code: one answer for all of them
        chosen = "".join(f", {option} {value!r}" for option, value in options.items())
        raise DataError(
            f"no file or folder of this name, and the split {split!r}{chosen} could not be loaded from the hub"
            f" ({type(error).__name__}: {_first_line(error)})",
            name,
            remedy="Check the path or the id, the split, the network and your access rights; data sets that need their"
            f" own code are not run: read the hub's conversion, revision {hub.CONVERTED}, with data_files",
        ) from error
    return _numbered(name, iter(data))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

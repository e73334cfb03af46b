"""Reading rows: files, folders and hub ids become plain dictionaries that remember where they came from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hbat_lightning import hub
from hbat_lightning.data.files import SUFFIXES, RawRow, first_line, numbered, read_file, suffix_of
from hbat_lightning.errors import DataError, UserError

__all__ = ["WHOLE", "HubSelection", "RawRow", "RawRows", "is_on_hub", "open_rows", "read_rows"]

_EMBEDDED = "embedded://"
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
# What `datasets` writes beside the rows; in a folder of data files these are not rows.
_BOOKKEEPING = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})


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


@dataclass(frozen=True)
class RawRows:
    """The rows of a place. Each pass reads them anew, and holds no more than a few at a time.

    Attributes:
        path: The place.
        limit: How many are read at most.
        begin: Begins to read.
    """

    path: str
    limit: int | None
    begin: Callable[[], Iterator[RawRow]]

    def __iter__(self) -> Iterator[RawRow]:
        """At least one row, in the order of the data.

        Raises:
            DataError: The data is empty or damaged.
        """
        row = None
        for row in islice(self.begin(), self.limit):
            yield row
        if row is None:
            raise DataError("it holds no rows", self.path, remedy="Check that the right file was written completely")


def open_rows(
    path: str, split: str | None = None, limit: int | None = None, selection: HubSelection = WHOLE
) -> RawRows:
    """Find the rows of a file, a folder or a data set on the hub.

    Args:
        path: A `.json`, `.jsonl`, `.ndjson`, `.csv`, `.tsv` or `.txt` file (also with `.gz`; of the last every line is a
            row with the column `text`), a `.parquet` file, a folder written by `datasets.save_to_disk`, a folder of such
            files (text files count only where there are no others), an `embedded://` address, or a hub id
            (`owner/name`). The network is used only for a hub id, when nothing of that name is on disk.
        split: The split of a folder or hub data set; `None` means the only one there is, or `train` on the hub. Of a
            hub data set also a slice, such as `validation[:500]`.
        limit: Read at most so many rows; what lies behind them is not looked at.
        selection: What of a hub data set is read.

    Raises:
        DataError: The data is missing or of an unknown kind; one line naming place and remedy.
        UserError: `limit` is smaller than 1, or something is to be chosen within a file or folder that holds no choice.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: ask for at least one row, or leave it out to read all of them")
    return RawRows(path, limit, _open_source(path, split, selection))


def read_rows(
    path: str, split: str | None = None, limit: int | None = None, selection: HubSelection = WHOLE
) -> list[RawRow]:
    """All rows of a place at once; see `open_rows`."""
    return list(open_rows(path, split, limit, selection))


def is_on_hub(path: str) -> bool:
    """Whether rows are asked of the hub: nothing of that name is on disk, and it is not named like a data file."""
    return hub.is_id(path) and not Path(path).exists() and suffix_of(Path(path)) is None


def _open_source(path: str, split: str | None, selection: HubSelection) -> Callable[[], Iterator[RawRow]]:
    within_hub = {"subset": selection.subset, "revision": selection.revision, "data_files": selection.data_files}
    if path.startswith(_EMBEDDED):
        from hbat_lightning.data import embedded  # late: most runs read files and need none of it

        _refuse_choice(path, split=split, **within_hub)
        rows = embedded.rows(path)
        return lambda: numbered(path, rows)
    try:
        place = Path(path).expanduser()
        is_folder, is_there = place.is_dir(), place.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, or somebody's home who is unknown
        raise DataError(f"no file can have this name ({first_line(error)})", path, remedy="Check the path") from error
    if is_folder:
        _refuse_choice(path, **within_hub)
        return _read_folder(place, split)
    if is_there:
        _refuse_choice(path, split=split, **within_hub)
        return lambda: read_file(place)
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


def _nearest_name(place: Path) -> str:
    folder = place.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1)
    if near:
        return f"Did you mean {folder / near[0]}?"
    return f"Check the path; relative paths start at {Path.cwd()}"


# --- folders and the hub ----------------------------------------------------------------------------------------


def _read_folder(folder: Path, split: str | None) -> Callable[[], Iterator[RawRow]]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _read_saved_dataset(folder, split)
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and suffix_of(file) is not None
        and file.name not in _BOOKKEEPING
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if any(not _is_lines(file) for file in files):
        files = [file for file in files if not _is_lines(file)]  # a licence or a note beside the rows
    if not files:
        known = ", ".join(SUFFIXES)
        raise DataError("the folder holds no data files", str(folder), remedy=f"Put files in it that end in {known}")
    chosen = _files_of_split(folder, files, split)
    return lambda: chain.from_iterable(read_file(file) for file in chosen)


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


def _read_saved_dataset(folder: Path, split: str | None) -> Callable[[], Iterator[RawRow]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder ends in any of a dozen error types of Arrow, JSON and the file system
        remedy = "Write it again with save_to_disk"
        message = f"the saved data set cannot be read ({first_line(error)})"
        raise DataError(message, str(folder), remedy=remedy) from error
    if isinstance(data, dict):
        name = split or ("train" if "train" in data else next(iter(data)) if len(data) == 1 else "train")
        if name not in data:
            remedy = f"Choose one of {', '.join(data)} with `split`"
            raise DataError(f"the data set has no split {name!r}", str(folder), remedy=remedy)
        data = data[name]
    return lambda: numbered(str(folder), data)


def _read_hub(name: str, split: str, selection: HubSelection) -> Callable[[], Iterator[RawRow]]:
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
            f" ({type(error).__name__}: {first_line(error)})",
            name,
            remedy="Check the path or the id, the split, the network and your access rights; data sets that need their"
            f" own code are not run: read the hub's conversion, revision {hub.CONVERTED}, with data_files",
        ) from error
    return lambda: numbered(name, data)

"""Rows in canonical form that are read anew at each pass, so that no pass holds more than a few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from hbat_lightning.data.fields import Row
from hbat_lightning.data.layouts import Format
from hbat_lightning.data.readers import RawRow, RawRows
from hbat_lightning.errors import DataError


class Rows(Protocol):
    """Canonical rows: a list, or what reads them when they are wanted."""

    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[Row]:
        """Go through them in order."""


@dataclass(frozen=True)
class UsableRows:
    """The usable rows of a place.

    Attributes:
        raw: The place.
        format: The format of its rows.
        count: How many of them are usable.
    """

    raw: RawRows
    format: Format[Any]
    count: int

    def __len__(self) -> int:
        """How many there are."""
        return self.count

    def __iter__(self) -> Iterator[Row]:
        """Read and parse them.

        Raises:
            DataError: They are no longer those that were counted.
        """
        found = 0
        for row in self.raw:
            try:
                parsed = self.format.parse(row)
            except DataError:  # counted and reported when the place was opened
                continue
            found += 1
            yield parsed
        if found != self.count:
            message = f"it had {self.count} usable rows a moment ago and has {found} now"
            raise DataError(message, self.raw.path, remedy="Let nothing write to it during a run")


@dataclass(frozen=True)
class PartOfRows:
    """Some of the rows.

    Attributes:
        rows: All of them.
        numbers: Places of the rows that are in the part, or of those that are not.
        inside: Which of the two.
    """

    rows: Rows
    numbers: frozenset[int]
    inside: bool

    def __len__(self) -> int:
        """How many there are."""
        return len(self.numbers) if self.inside else len(self.rows) - len(self.numbers)

    def __iter__(self) -> Iterator[Row]:
        """Go through them in order."""
        if not len(self):
            return iter(())
        return (row for number, row in enumerate(self.rows) if (number in self.numbers) == self.inside)


@dataclass(frozen=True)
class ParsedFile:
    """What the rows of a file came to.

    Attributes:
        path: The file, folder or hub id.
        format: The format it was read as.
        rows: Usable rows, in canonical form.
        faults: One error for every other row.
    """

    path: str
    format: str
    rows: Rows
    faults: list[DataError]


def parse_file(raw: RawRows, recognise: Callable[[RawRow], Format[Any]]) -> ParsedFile:
    """Go through a place once: recognise its format, count usable rows, and collect the faults of the others.

    Raises:
        DataError: The place as a whole cannot be used.
    """
    form: Format[Any] | None = None
    count, faults = 0, []
    for row in raw:
        form = form or recognise(row)
        try:
            form.parse(row)
        except DataError as fault:
            faults.append(fault.with_traceback(None))  # a traceback would keep the row, and whatever read it
        else:
            count += 1
    if form is None:
        raise RuntimeError("a place without rows raises")
    return ParsedFile(raw.path, form.name, UsableRows(raw, form, count), faults)

"""Errors that a user can mend: each is one line that says what is wrong, where, and what to do about it."""

from __future__ import annotations

_LONGEST = 800  # letters of a message: what stands in the data may be of any length


def printable(text: str) -> str:
    """One line that every terminal shows as it is: what would steer it, and what is no letter, is spelt out."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


class UserError(Exception):
    """A mistake in the command, the configuration or the data; the command line prints it without a traceback."""


class SharedError(UserError):
    """A mistake that all processes of a run know of; the first one says it for all."""


class DataError(UserError):
    """A fault in a data file.

    Args:
        message: What is wrong.
        source: The file, folder or hub id that holds the fault.
        row: The row, counted from 1 (in line-based files: the line), or ``None`` when it concerns the whole file.
        remedy: What the user can do.
    """

    def __init__(self, message: str, source: str, row: int | None = None, remedy: str = "") -> None:
        if len(message) > _LONGEST:
            message = message[:_LONGEST] + "…"
        self.message, self.source, self.row, self.remedy = message, source, row, remedy
        where = source if row is None else f"{source}, row {row}"
        super().__init__(printable(f"{where}: {message}{'. ' + remedy if remedy else ''}"))


class LengthError(DataError):
    """A row that does not fit into ``max_length``; what becomes of it is for the truncation policy alone to say."""

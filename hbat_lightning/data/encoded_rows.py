"""Rows as a model takes them, encoded one after the other, and what is said of those that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from tqdm.auto import tqdm

from hbat_lightning.data.kinds import RowKind
from hbat_lightning.data.provenance import RowPlaces
from hbat_lightning.data.rows import Rows
from hbat_lightning.data.tokenization import Encoder
from hbat_lightning.errors import DataError, LengthError


class EncodedRows:
    """Encodes rows as they are asked for, once.

    Args:
        rows: The rows.
        kind: What an objective makes of them.
        encoder: How.
        what: What a progress bar calls them.
        is_fatal: Whether a fault in a single row ends the run.

    Attributes:
        count: How many have been encoded, and not dropped.
        places: Where each row of the set comes from.
        faults: What was wrong with others, where that does not end the run.
    """

    def __init__(
        self, rows: Rows, kind: RowKind, encoder: Encoder, what: str, is_fatal: Callable[[DataError], bool]
    ) -> None:
        self._rows, self._kind, self._encoder, self._what, self._is_fatal = rows, kind, encoder, what, is_fatal
        self.count, self.places = 0, RowPlaces()
        self.faults: list[DataError] = []

    def __iter__(self) -> Iterator[Any]:
        """Encode one after the other.

        Raises:
            DataError: At a fault that ends the run.
        """
        for row in with_bar(self._rows, f"tokenising {self._what}"):
            try:
                encoded = self._kind.encode(self._encoder, row)
            except DataError as fault:
                if self._is_fatal(fault):
                    raise with_hint([fault]) from fault
                self.faults.append(fault.with_traceback(None))
            else:
                if encoded is not None:
                    self.count += 1
                    for _ in range(self._kind.size(encoded)):
                        self.places.append(row)
                    yield encoded


def with_bar(rows: Rows, what: str) -> Iterator[Any]:
    """The rows, behind a progress bar where there are many."""
    hidden = len(rows) < 5000 or rank_zero_only.rank > 0  # type: ignore[attr-defined]
    return iter(tqdm(rows, desc=what, unit="row", leave=False, disable=hidden))


def with_hint(faults: list[DataError]) -> DataError:
    """The first fault, with how many more there are and what can be done."""
    first = faults[0]
    if isinstance(first, LengthError):
        return first
    more = f" ({len(faults) - 1} more rows have faults)" if len(faults) > 1 else ""
    hint = f"{first.remedy}, or set --data.init_args.invalid_rows drop".lstrip(", ")
    return DataError(first.message + more, first.source, first.row, hint)

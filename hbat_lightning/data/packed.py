"""Encoded rows side by side in flat arrays: a million of them take what their tokens take, and little more."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from hbat_lightning.data.encoded import Encoded

Row = TypeVar("Row")


class PackedRows(Generic[Row]):
    """Rows of one or more encoded texts, each with a number beside them: five bytes per token, 12 per text, 8 per row.

    Args:
        rows: The rows, gone through once.
        apart: A row -> its texts, as many for every row, and its number.
        together: The same backwards.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        apart: Callable[[Row], tuple[Sequence[Encoded], float]],
        together: Callable[[list[Encoded], float], Row],
    ) -> None:
        self._together = together
        self._ids, self._supervised = array("i"), bytearray()
        self._starts, self._prompts, self._numbers = array("q", [0]), array("i"), array("d")
        for row in rows:
            texts, number = apart(row)
            self._numbers.append(number)
            for text in texts:
                self._ids.frombytes(text.input_ids.astype(np.int32, copy=False).tobytes())
                self._supervised += text.supervised.tobytes()
                self._starts.append(len(self._ids))
                self._prompts.append(text.prompt_length)
        self._width = len(self._prompts) // max(1, len(self._numbers))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._numbers)

    def __getitem__(self, row: int) -> Row:
        """A row; its arrays are views."""
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        first = row % len(self) * self._width
        texts = [self._text(place) for place in range(first, first + self._width)]
        return self._together(texts, self._numbers[row])

    def __iter__(self) -> Iterator[Row]:
        """Go through them in order."""
        return (self[row] for row in range(len(self)))

    def numbers(self) -> Sequence[float]:
        """The number of every row."""
        return self._numbers

    def lengths(self) -> Iterator[int]:
        """Tokens of every text."""
        return (end - begin for begin, end in zip(self._starts, self._starts[1:], strict=False))

    def _text(self, place: int) -> Encoded:
        begin, end = self._starts[place], self._starts[place + 1]
        ids = np.frombuffer(self._ids, np.int32, end - begin, begin * 4)
        return Encoded(ids, np.frombuffer(self._supervised, bool, end - begin, begin), self._prompts[place])


def pack_texts(rows: Iterable[Encoded]) -> PackedRows[Encoded]:
    """Pack single texts."""
    return PackedRows(rows, lambda row: ((row,), 0.0), lambda texts, _: texts[0])


def pack_prompts(rows: Iterable[list[int]]) -> PackedRows[list[int]]:
    """Pack prompts, of which nothing is supervised."""

    def apart(row: list[int]) -> tuple[Sequence[Encoded], float]:
        return (Encoded(np.array(row, np.int32), np.zeros(len(row), bool), len(row)),), 0.0

    return PackedRows(rows, apart, lambda texts, _: texts[0].input_ids.tolist())

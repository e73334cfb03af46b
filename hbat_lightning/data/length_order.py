"""Prompts in the order of their length, and what comes of them in the order in which they came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, TypeVar

T = TypeVar("T")


class LengthOrder:
    """Of the prompts of a cycle, so that those which are sampled together are about as long and pad each other little.

    Micro-batches keep their sizes. Prompts of one length keep their order.

    Args:
        prompts: Micro-batches of prompts.
    """

    def __init__(self, prompts: Sequence[Sequence[Sequence[Any]]]) -> None:
        self._sizes = [len(part) for part in prompts]
        lengths = [len(prompt) for part in prompts for prompt in part]
        self._order = sorted(range(len(lengths)), key=lengths.__getitem__)

    def apply(self, parts: Sequence[Sequence[T]]) -> list[list[T]]:
        """What belongs to the prompts, micro-batch by micro-batch, brought into the order."""
        given = list(chain.from_iterable(parts))
        return self._cut(given[place] for place in self._order)

    def undo(self, parts: Sequence[Sequence[T]]) -> list[list[T]]:
        """What :meth:`apply` has brought into the order, back where it was."""
        back = dict(zip(self._order, chain.from_iterable(parts), strict=True))
        return self._cut(back[place] for place in range(len(self._order)))

    def _cut(self, given: Iterable[T]) -> list[list[T]]:
        rest = iter(given)
        return [[next(rest) for _ in range(size)] for size in self._sizes]

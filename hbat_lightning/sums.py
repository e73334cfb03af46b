"""Means over windows and data sets, as sums and counts: a mean of means is wrong wherever parts differ in size."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor

from hbat_lightning.ranks import Ranks

Sums = dict[str, tuple[Tensor, Tensor]]
"""Per quantity a sum and what to divide it by: scalar tensors, or ``(rows,)`` where rows are to be told apart."""

Parts = dict[str, list[tuple[float, float]]]
"""Per quantity the sums of single rows, or of single micro-batches, and what to divide each by; off the device."""


def of_all(values: Mapping[str, Tensor]) -> Sums:
    """Sums of quantities that are ``(rows,)`` each."""
    return {name: (value.sum(), torch.tensor(len(value), device=value.device)) for name, value in values.items()}


def of_each(values: Mapping[str, Tensor]) -> Sums:
    """Quantities that are ``(rows,)`` each, with the rows kept apart."""
    return {name: (value, torch.ones_like(value)) for name, value in values.items()}


class Totals:
    """Running sums."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, sums: Sums) -> None:
        """Add one micro-batch, in fp64: thousands of fp32 sums would lose digits."""
        for name, (total, count) in sums.items():
            new = (total.detach().double().sum(), count.detach().double().sum())
            old = self._parts.get(name)
            self._parts[name] = new if old is None else (old[0] + new[0], old[1] + new[1])

    def means(self) -> dict[str, float]:
        """Sum over count of every quantity; those that nothing was counted for are left out."""
        return {name: float(total / count) for name, (total, count) in self._parts.items() if float(count) > 0}


class WindowTotals:
    """What the micro-batches of a window add up to, by objective."""

    def __init__(self) -> None:
        self._totals: dict[str, Totals] = {}
        self._loss = Totals()

    @property
    def objectives(self) -> Collection[str]:
        """Those that have trained in it so far."""
        return self._totals.keys()

    def add(self, objective: str, sums: Sums, loss: Tensor) -> None:
        """Add one micro-batch, and what was back-propagated of it."""
        self._totals.setdefault(objective, Totals()).add(sums)
        self._loss.add({"loss": (loss, torch.ones(()))})

    def means(self, ranks: Ranks, device: torch.device) -> tuple[dict[str, dict[str, float]], float]:
        """Over the window of all ranks, in one exchange: each objective's means, and the window's loss."""
        pool([*self._totals.values(), self._loss], ranks, device)
        return {objective: totals.means() for objective, totals in self._totals.items()}, self._loss.means()["loss"]


def pool(parts: Iterable[Totals], ranks: Ranks, device: torch.device) -> None:
    """Add the other ranks' sums to each of some totals, in one exchange; every rank has the same quantities in them."""
    places = [(totals._parts, name) for totals in parts for name in totals._parts]
    if ranks.world == 1 or not places:
        return
    flat = torch.stack([value.to(device) for own, name in places for value in own[name]])
    for (own, name), (total, count) in zip(places, ranks.add(flat).view(-1, 2), strict=True):
        own[name] = (total, count)


def apart(sums: Sums) -> Parts:
    """A micro-batch's sums, row by row where they are."""
    return {
        name: list(zip(total.double().reshape(-1).tolist(), count.double().reshape(-1).tolist(), strict=True))
        for name, (total, count) in sums.items()
    }


def in_turn(shares: Sequence[Mapping[str, Sequence[Parts]]]) -> dict[str, Parts]:
    """What ranks have evaluated that took turns in micro-batches, in the order of a single process.

    Args:
        shares: Of every rank, by objective, the parts of its micro-batches; a rank may have had none.

    Returns:
        By objective all parts of every quantity.
    """
    found: dict[str, Parts] = {}
    for objective in dict.fromkeys(chain.from_iterable(shares)):
        own = found.setdefault(objective, {})
        turns = zip_longest(*(share.get(objective, ()) for share in shares))
        for parts in filter(None, chain.from_iterable(turns)):
            for name, values in parts.items():
                own.setdefault(name, []).extend(values)
    return found


def means_of(parts: Parts) -> dict[str, float]:
    """Sum over count of every quantity; those that nothing was counted for are left out."""
    sums = {name: tuple(map(math.fsum, zip(*values, strict=True))) for name, values in parts.items() if values}
    return {name: total / count for name, (total, count) in sums.items() if count > 0}

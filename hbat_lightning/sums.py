"""Means over windows and data sets, as sums and counts: a mean of means is wrong wherever parts differ in size."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hbat_lightning.ranks import Ranks

Sums = dict[str, tuple[Tensor, Tensor]]
"""Per quantity a sum and what to divide it by, each a scalar tensor."""


class Totals:
    """Running sums."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, sums: Sums) -> None:
        """Add one micro-batch, in fp64: thousands of fp32 sums would lose digits."""
        for name, (total, count) in sums.items():
            new = (total.detach().double(), count.detach().double())
            old = self._parts.get(name)
            self._parts[name] = new if old is None else (old[0] + new[0], old[1] + new[1])

    def means(self) -> dict[str, float]:
        """Sum over count of every quantity; those that nothing was counted for are left out."""
        return {name: float(total / count) for name, (total, count) in self._parts.items() if float(count) > 0}

    def plain(self) -> dict[str, tuple[float, float]]:
        """Sum and count of every quantity, off the device."""
        return {name: (float(total), float(count)) for name, (total, count) in self._parts.items()}


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


def pooled_means(parts: Sequence[Mapping[str, Mapping[str, tuple[float, float]]]]) -> dict[str, dict[str, float]]:
    """Means of what all ranks have added up, where some may have had nothing to add.

    Args:
        parts: Of every rank its :meth:`Totals.plain` by objective.

    Returns:
        By objective the mean of every quantity.
    """
    pooled: dict[str, dict[str, tuple[float, float]]] = {}
    for part in parts:
        for objective, sums in part.items():
            own = pooled.setdefault(objective, {})
            for name, (total, count) in sums.items():
                before = own.get(name, (0.0, 0.0))
                own[name] = (before[0] + total, before[1] + count)
    return {
        objective: {name: total / count for name, (total, count) in own.items() if count > 0}
        for objective, own in pooled.items()
    }

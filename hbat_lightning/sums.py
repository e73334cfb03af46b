"""Means over windows and data sets, as sums and counts: a mean of means is wrong wherever parts differ in size."""

from __future__ import annotations

from torch import Tensor

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

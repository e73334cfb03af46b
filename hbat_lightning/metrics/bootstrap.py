"""How sure a mean is, or the difference of two systems on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MIN_ROWS = 10  # of fewer a percentile bootstrap is much too narrow, and no interval is shown


class Interval(NamedTuple):
    """An estimate and where it lies with some confidence.

    Attributes:
        value: The mean, or the mean difference.
        low: Lower end.
        high: Upper end.
        rows: How many rows it is from.
    """

    value: float
    low: float
    high: float
    rows: int

    @property
    def decided(self) -> bool:
        """Whether 0 is outside of it."""
        return self.low > 0 or self.high < 0


def bootstrap(
    values: Sequence[float],
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    counts: Sequence[float] | None = None,
) -> Interval:
    """Percentile bootstrap of a mean (Efron 1979): rows are drawn anew, with replacement.

    It knows the spread of these rows, not that of other seeds or other data.

    Args:
        values: A value per row, at least one.
        confidence: Share of the draws inside the interval.
        draws: How often rows are drawn.
        seed: Seed of the draws: the same values have the same interval.
        counts: Where a row's value is a sum, as of its tokens' losses, how many it is of: the mean is then over these,
            and a row is drawn with all of its own.

    Raises:
        ValueError: There is no row, or none that counts, or a confidence that is none.
    """
    if not len(values) or not 0 < confidence < 1:
        raise ValueError(f"bootstrap needs rows and a confidence between 0 and 1, got {len(values)} and {confidence}")
    rows, random = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    units = np.ones_like(rows) if counts is None else np.asarray(counts, dtype=np.float64)
    if units.shape != rows.shape or not units.sum() > 0:
        raise ValueError(f"a count for each of {len(rows)} rows is needed, not all of them 0, got {counts}")
    size = max(1, 2_000_000 // len(rows))  # draws at a time: an index for every row of each
    parts = []
    for begin in range(0, draws, size):
        drawn = random.integers(0, len(rows), (min(size, draws - begin), len(rows)))
        sums, whole = rows[drawn].sum(axis=1), units[drawn].sum(axis=1)
        parts.append(sums[whole > 0] / whole[whole > 0])
    low, high = np.quantile(np.concatenate(parts), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(rows.sum() / units.sum()), float(low), float(high), int((units > 0).sum()))


def paired_bootstrap(
    one: Sequence[float],
    other: Sequence[float],
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    counts: Sequence[float] | None = None,
) -> Interval:
    """How much more one system has than another on the same rows (Koehn 2004): a row's two values are drawn together.

    Args:
        one: A value per row.
        other: The other system's, in the same order.
        confidence: See :func:`bootstrap`.
        draws: See :func:`bootstrap`.
        seed: See :func:`bootstrap`.
        counts: See :func:`bootstrap`; the same for both.

    Raises:
        ValueError: The systems have not as many rows.
    """
    if len(one) != len(other):
        raise ValueError(f"rows in pairs are needed, got {len(one)} and {len(other)}")
    return bootstrap([a - b for a, b in zip(one, other, strict=True)], confidence, draws, seed, counts)

"""Learning-rate schedules as pure functions of a step and a length, per phase or over the whole run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod


class LRSchedule(ABC):
    """Scales the learning rate over a stretch of optimizer steps.

    Args:
        warmup: Linear warm-up: a number of steps, or below 1 a share of the stretch. Never longer than the stretch,
            so that a short phase still reaches its peak.
        per_phase: Start anew in every phase (as the official code does), or run once over the whole training.
    """

    def __init__(self, warmup: float = 0.0, per_phase: bool = True) -> None:
        if warmup < 0:
            raise ValueError(f"warmup must not be negative, got {warmup}")
        self.warmup, self.per_phase = warmup, per_phase

    def factor(self, step: int, length: int) -> float:
        """Factor on the peak learning rate.

        Args:
            step: Optimizer step in the stretch, from 0.
            length: Steps of the stretch.

        Returns:
            A factor in ``[0, 1]``.
        """
        warm = min(math.ceil(self.warmup * length) if self.warmup < 1 else int(self.warmup), length - 1)
        if step < warm:
            return (step + 1) / (warm + 1)
        return self.decay((step - warm) / max(1, length - warm))

    @abstractmethod
    def decay(self, progress: float) -> float:
        """Factor after the warm-up, for ``progress`` from 0 to 1."""


class Constant(LRSchedule):
    """Stays at the peak."""

    def decay(self, progress: float) -> float:
        """Always 1."""
        return 1.0


class Linear(LRSchedule):
    """Falls to 0 along a line."""

    def decay(self, progress: float) -> float:
        """``1 - progress``."""
        return max(0.0, 1.0 - progress)


class Cosine(LRSchedule):
    """Falls to 0 along half a cosine: the official schedule."""

    def decay(self, progress: float) -> float:
        """``(1 + cos(π·progress)) / 2``."""
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

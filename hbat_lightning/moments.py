"""Mean and variance of values that come in batches."""

from __future__ import annotations

from torch import Tensor


class RunningMoments:
    """Mean and variance of everything seen so far, by the parallel update of Chan et al. (1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        """See some more values, ``(n,)``."""
        values = values.double()
        count, mean = len(values), float(values.mean())
        shift, total = mean - self.mean, self.count + count
        self.squares += float((values - mean).square().sum()) + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    def whiten(self, values: Tensor) -> Tensor:
        """Values against the mean so far, in units of the deviation so far; the deviation is left out until there is one."""
        deviation = (self.squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0
        return (values - self.mean) / (deviation if deviation > 0 else 1.0)

    def state(self) -> dict[str, float]:
        """In plain types."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state(self, state: dict[str, float]) -> None:
        """Take over a state."""
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]

"""Choosing at run time which objective trains next: the one that is further from its best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hbat_lightning.errors import UserError
from hbat_lightning.phases import BOTH, Part, Phase, Plan, Progress


@dataclass(frozen=True)
class ChosenPhase(Phase):
    """Every window is of one objective, chosen when it is its turn.

    Attributes:
        chosen: What the windows of the whole phase hold, as far as they are chosen; it grows as training goes.
    """

    chosen: Sequence[Part] = field(compare=False)

    @property
    def mixed(self) -> bool:
        """See :attr:`Phase.mixed`."""
        return True

    def parts(self, step: int) -> Sequence[Part]:
        """See :meth:`Phase.parts`."""
        return [self.chosen[self.offset + step]]


class GapPlan(Plan):
    r"""One phase, each of whose windows goes to the objective with the larger weighted gap.

    .. math:: s_i = w_i (f_i - f_i^*)

    with f the objective's loss when it was last seen, and the other way round, best less mean, where it is a reward. Every few
    steps both are measured, on the window that either would train on next; in between only that of the objective that trains
    is renewed, by what its window shows in training.

    An objective whose measurement is no finite number has the largest gap: so the window that was measured trains next, and
    whoever watches over training, as NonFiniteGuard does, finds it there.

    Args:
        rounds: Trainer epochs.
        steps: Optimizer steps of each.
        weights: Per objective its weight w; the first one trains where gaps are equal.
        best: Per objective the loss or reward f* that it would reach alone; ``None`` is 0 for a loss, and none for a reward.
        refresh: Optimizer steps between measurements.
    """

    measures = True

    def __init__(
        self, rounds: int, steps: int, weights: Mapping[str, float], best: Mapping[str, float | None], refresh: int
    ) -> None:
        self.weights, self.best, self.refresh = dict(weights), dict(best), refresh
        self._progress: dict[str, Progress] = {}
        self._chosen: list[Part] = []
        self._seen = dict.fromkeys(weights, 0)
        super().__init__(
            [
                [ChosenPhase(0, n, BOTH, 0, 1, n * steps, steps, n * steps, rounds * steps, self._chosen)]
                for n in range(rounds)
            ]
        )

    def choose(self, step: int, measure: Callable[[Part], Progress]) -> None:
        """See :meth:`Plan.choose`."""
        if step < len(self._chosen):  # a run that goes on inside a window
            return
        if step % self.refresh == 0:
            self._progress = {objective: measure(self._next(objective)) for objective in self.weights}
        gaps = self._gaps()
        self._take(max(gaps, key=gaps.__getitem__))

    def report(self, objective: str, progress: Progress) -> None:
        """See :meth:`Plan.report`."""
        self._progress[objective] = progress

    @property
    def figures(self) -> dict[str, float]:
        """Both gaps as they are known now."""
        return {f"gap/{objective}": gap for objective, gap in self._gaps().items()}

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Plan.state_dict`."""
        return {
            "progress": {name: tuple(one) for name, one in self._progress.items()},
            "chosen": [part.objective for part in self._chosen],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Plan.load_state_dict`."""
        self._progress = {name: Progress(*one) for name, one in state["progress"].items()}
        self._chosen.clear()
        self._seen = dict.fromkeys(self.weights, 0)
        for objective in state["chosen"]:
            self._take(objective)

    def _gaps(self) -> dict[str, float]:
        return {name: self._gap(name) for name in self.weights}

    def _gap(self, objective: str) -> float:
        progress, best = self._progress[objective], self.best[objective]
        if best is None and progress.rising:
            raise UserError(
                f"the {objective} objective learns from a reward, and what it lacks to its best is not known: set "
                f"model.init_args.schedule.init_args.{objective}_best to the reward that training on it alone reaches"
            )
        gap = progress.gap(best or 0.0)
        if not math.isfinite(gap):
            return math.inf if self.weights[objective] else 0.0
        return self.weights[objective] * gap

    def _next(self, objective: str) -> Part:
        """The window that an objective trains on when it is chosen next."""
        return Part(objective, 0, self._seen[objective])

    def _take(self, objective: str) -> None:
        self._chosen.append(self._next(objective))
        self._seen[objective] += 1

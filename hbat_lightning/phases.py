"""A run as a sequence of phases, and what each of its windows holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

from hbat_lightning.errors import UserError

INSTRUCTION = "instruction"
PREFERENCE = "preference"
BOTH = "both"
"""What a phase trains whose windows are of either objective, or of both at once."""


class Part(NamedTuple):
    """One objective's share of a window.

    Attributes:
        objective: Name of the objective.
        shard: Which shard of its data.
        window: Number of the window in the endless sequence of passes over the shard.
        weight: Weight of the objective's mean loss in the window's loss.
    """

    objective: str
    shard: int
    window: int
    weight: float = 1.0


class Progress(NamedTuple):
    """How far an objective has come: its loss, or a reward.

    Attributes:
        value: The figure.
        rising: Whether more of it is better.
    """

    value: float
    rising: bool = False

    def gap(self, best: float) -> float:
        """How far it is from its best."""
        return best - self.value if self.rising else self.value - best


@dataclass(frozen=True)
class Phase:
    """The part of a phase that lies in one round.

    Attributes:
        index: Number of the phase in the run, from 0. Two entries share it when a phase goes on in the next round.
        round: The Trainer epoch, from 0.
        objective: Name of the objective that trains; :data:`BOTH` where no single one does.
        shard: Which shard of the objective's data.
        shards: How many shards the data is cut into.
        first_window: Where in the endless sequence of passes over the shard this part begins, in windows.
        windows: Optimizer steps in this part.
        offset: Optimizer steps of the same phase in earlier rounds.
        length: Optimizer steps of the whole phase.
    """

    index: int
    round: int
    objective: str
    shard: int
    shards: int
    first_window: int
    windows: int
    offset: int
    length: int

    @property
    def mixed(self) -> bool:
        """Whether both objectives train in this phase: a change between them is no switch then."""
        return False

    @property
    def order(self) -> tuple[object, ...]:
        """What decides which data its windows hold, in plain types."""
        return (self.objective, self.shard, self.windows)

    def parts(self, step: int) -> Sequence[Part]:
        """What a window holds.

        Args:
            step: The window in this part of the phase, from 0.
        """
        return [Part(self.objective, self.shard, self.first_window + step)]


@dataclass(frozen=True)
class DrawnPhase(Phase):
    """Every window is of one objective, drawn beforehand.

    Attributes:
        draws: Per window what it holds.
    """

    draws: tuple[Part, ...]

    @property
    def mixed(self) -> bool:
        """See :attr:`Phase.mixed`."""
        return True

    @property
    def order(self) -> tuple[object, ...]:
        """See :attr:`Phase.order`."""
        return (*super().order, *(part.objective for part in self.draws))

    def parts(self, step: int) -> Sequence[Part]:
        """See :meth:`Phase.parts`."""
        return [self.draws[step]]


@dataclass(frozen=True)
class JointPhase(Phase):
    """Every window holds both objectives; each goes through its data on its own.

    Attributes:
        weights: Per objective the weight of its mean loss, in the order in which their micro-batches take turns.
    """

    weights: tuple[tuple[str, float], ...]

    @property
    def mixed(self) -> bool:
        """See :attr:`Phase.mixed`."""
        return True

    def parts(self, step: int) -> Sequence[Part]:
        """See :meth:`Phase.parts`."""
        number = self.first_window + step
        return [Part(objective, self.shard, number, weight) for objective, weight in self.weights]


class Extent(NamedTuple):
    """Where a part of a phase lies, and how long it is: what of a plan a changed run keeps of its past.

    Attributes:
        first_window: See :class:`Phase`.
        windows: See :class:`Phase`.
    """

    first_window: int
    windows: int


class Plan:
    """All phases of a run, by round.

    Args:
        rounds: The phases of every round, in order.
    """

    measures = False
    """Whether objectives' progress decides what comes next; then it must be known before a window trains."""

    def __init__(self, rounds: Sequence[Sequence[Phase]]) -> None:
        self._lay_out(rounds)

    def _lay_out(self, rounds: Sequence[Sequence[Phase]]) -> None:
        self.rounds = [list(phases) for phases in rounds]
        self.phases = [phase for phases in self.rounds for phase in phases]
        self._ends = list(accumulate(phase.windows for phase in self.phases))
        self._objectives = {phase.index: phase.objective for phase in self.phases}

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._ends[-1] if self._ends else 0

    @property
    def phase_count(self) -> int:
        """Number of different phases of the run."""
        return len({phase.index for phase in self.phases})

    @property
    def mixed(self) -> bool:
        """Whether some phase trains both objectives."""
        return any(phase.mixed for phase in self.phases)

    def objective_of(self, index: int) -> str:
        """What the phase of this number trains."""
        return self._objectives[index]

    def at(self, step: int) -> tuple[Phase, int]:
        """The phase of an optimizer step and the step's number inside the phase.

        Args:
            step: Optimizer step of the run, from 0; steps past the end belong to the last phase.

        Returns:
            The phase and the number of its steps that came before this one.
        """
        position = min(bisect_right(self._ends, step), len(self.phases) - 1)
        phase = self.phases[position]
        begin = self._ends[position] - phase.windows
        return phase, step - begin + phase.offset

    def round_ends_at(self, step: int) -> bool:
        """Whether a round is complete after so many optimizer steps of the run."""
        return step in accumulate(sum(phase.windows for phase in phases) for phases in self.rounds)

    def ended_at(self, step: int) -> Phase | None:
        """The last part of the phase that is complete after so many optimizer steps of the run, if one just is."""
        if step not in self._ends:
            return None
        position = self._ends.index(step)
        phase = self.phases[position]
        return phase if phase.offset + phase.windows == phase.length else None

    # ---- going on under another plan ----------------------------------------------------------------------------------

    @property
    def extents(self) -> list[list[Extent]]:
        """The extents of all phases, by round."""
        return [[Extent(phase.first_window, phase.windows) for phase in phases] for phases in self.rounds]

    def keep(self, past: Sequence[Sequence[Extent]]) -> None:
        """Take the extents of the first rounds from another plan, under which they were begun; later ones stay.

        So optimizer steps that have been made keep their place in the run, whatever the rest of it looks like.

        Args:
            past: The extents of these rounds, each with as many phases as here.

        Raises:
            UserError: When what a phase holds was drawn for as many windows as it has.
        """
        if any(isinstance(phase, DrawnPhase) for phase in self.phases):
            raise UserError("the steps of a round that are drawn beforehand cannot change in number: start a new run")
        rounds = [
            [replace(phase, **extent._asdict()) for phase, extent in zip(phases, kept, strict=True)]
            for phases, kept in zip(self.rounds, past, strict=False)
        ] + self.rounds[len(past) :]
        lengths: dict[int, int] = {}
        for phases in rounds:
            for place, phase in enumerate(phases):
                offset = lengths.get(phase.index, 0)
                phases[place] = replace(phase, offset=offset)
                lengths[phase.index] = offset + phase.windows
        self._lay_out([[replace(phase, length=lengths[phase.index]) for phase in phases] for phases in rounds])

    # ---- what only plans have that are made as training goes ----------------------------------------------------------

    def choose(self, step: int, measure: Callable[[Part], Progress]) -> None:
        """Decide what a window holds, before it is asked for.

        Args:
            step: Optimizer step of the run; all steps before it are decided.
            measure: Progress as a window shows it, at the current parameters and without dropout.
        """

    def report(self, objective: str, progress: Progress) -> None:
        """Hear what a window showed in training."""

    @property
    def figures(self) -> dict[str, float]:
        """What is to be logged."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What has been decided, in plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what had been decided."""

"""Which objective trains at which optimizer step, on which shard of its data.

A *phase* is one objective's stretch of optimizer steps. A *round* is one Trainer epoch. A schedule knows nothing of
models or rows: it gets the number of windows (optimizer steps) in one pass over every shard and lays out the phases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

INSTRUCTION = "instruction"
PREFERENCE = "preference"


@dataclass(frozen=True)
class Phase:
    """The part of a phase that lies in one round.

    Attributes:
        index: Number of the phase in the run, from 0. Two entries share it when a phase goes on in the next round.
        round: The Trainer epoch, from 0.
        objective: Name of the objective that trains, ``"instruction"`` or ``"preference"``.
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


class Plan:
    """All phases of a run, by round.

    Args:
        rounds: The phases of every round, in order.
    """

    def __init__(self, rounds: Sequence[Sequence[Phase]]) -> None:
        self.rounds = [list(phases) for phases in rounds]
        self.phases = [phase for phases in self.rounds for phase in phases]
        self._ends = list(accumulate(phase.windows for phase in self.phases))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._ends[-1] if self._ends else 0

    @property
    def phase_count(self) -> int:
        """Number of different phases of the run."""
        return len({phase.index for phase in self.phases})

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


class Schedule(ABC):
    """Lays out the phases of a run."""

    rounds: int
    shards: int

    @abstractmethod
    def plan(self, windows: Mapping[str, Sequence[int]]) -> Plan:
        """Lay out the phases.

        Args:
            windows: Per objective, the number of windows in one pass over each of its ``shards`` shards.

        Returns:
            The phases of all ``rounds`` rounds.
        """

    def describe(self) -> str:
        """A sentence for the model card."""
        return f"{type(self).__name__}, {self.rounds} rounds"


class Rounds(Schedule):
    """Hbat's schedule (arXiv 2406.15178): SFT on shard r, then preference training on shard r, for r = 1..N.

    Two-stage training is ``rounds=1``.

    Args:
        rounds: Number of rounds and of disjoint shards of both data sets.
        instruction_epochs: Passes over the instruction shard in a round.
        preference_epochs: Passes over the preference shard in a round.
    """

    def __init__(self, rounds: int = 10, instruction_epochs: int = 3, preference_epochs: int = 1) -> None:
        _require_positive(rounds=rounds, instruction_epochs=instruction_epochs, preference_epochs=preference_epochs)
        self.rounds = self.shards = rounds
        self.epochs = {INSTRUCTION: instruction_epochs, PREFERENCE: preference_epochs}

    def describe(self) -> str:
        """See :meth:`Schedule.describe`."""
        passes = ", then ".join(f"{epochs} × the {name} shard" for name, epochs in self.epochs.items())
        return f"Rounds: {self.rounds}, each on shards of its own: {passes}"

    def plan(self, windows: Mapping[str, Sequence[int]]) -> Plan:
        """See :meth:`Schedule.plan`."""
        rounds = []
        for number in range(self.rounds):
            phases = []
            for position, (objective, epochs) in enumerate(self.epochs.items()):
                steps = epochs * windows[objective][number]
                index = number * len(self.epochs) + position
                phases.append(Phase(index, number, objective, number, self.shards, 0, steps, 0, steps))
            rounds.append(phases)
        return Plan(rounds)


class Interval(Schedule):
    """Alternates after a fixed number of optimizer steps; both data sets are cycled through whole.

    Args:
        rounds: How often the pair of phases is repeated.
        instruction_steps: Optimizer steps of each instruction phase.
        preference_steps: Optimizer steps of each preference phase.
    """

    def __init__(self, rounds: int = 10, instruction_steps: int = 50, preference_steps: int = 50) -> None:
        _require_positive(rounds=rounds, instruction_steps=instruction_steps, preference_steps=preference_steps)
        self.rounds, self.shards = rounds, 1
        self.steps = {INSTRUCTION: instruction_steps, PREFERENCE: preference_steps}

    def describe(self) -> str:
        """See :meth:`Schedule.describe`."""
        steps = ", then ".join(f"{count} on {name} data" for name, count in self.steps.items())
        return f"Interval: {self.rounds} rounds; optimizer steps in each: {steps}; data are cycled through whole"

    def plan(self, windows: Mapping[str, Sequence[int]]) -> Plan:
        """See :meth:`Schedule.plan`."""
        rounds = []
        for number in range(self.rounds):
            phases = []
            for position, (objective, steps) in enumerate(self.steps.items()):
                index = number * len(self.steps) + position
                phases.append(Phase(index, number, objective, 0, 1, number * steps, steps, 0, steps))
            rounds.append(phases)
        return Plan(rounds)


class Single(Schedule):
    """One objective alone: a single phase over all its data, one Trainer epoch per pass.

    Args:
        objective: The objective's name.
        epochs: Passes over the data.
    """

    def __init__(self, objective: str, epochs: int = 1) -> None:
        _require_positive(epochs=epochs)
        self.objective, self.rounds, self.shards = objective, epochs, 1

    def describe(self) -> str:
        """See :meth:`Schedule.describe`."""
        return f"One objective alone: {self.rounds} × the {self.objective} data"

    def plan(self, windows: Mapping[str, Sequence[int]]) -> Plan:
        """See :meth:`Schedule.plan`."""
        steps = windows[self.objective][0]
        length = steps * self.rounds
        return Plan(
            [[Phase(0, n, self.objective, 0, 1, n * steps, steps, n * steps, length)] for n in range(self.rounds)]
        )


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

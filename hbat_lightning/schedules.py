"""Which objective trains at which optimizer step, on which shard of its data.

A *phase* is one objective's stretch of optimizer steps; some schedules mix both objectives in a single phase. A *round* is
one Trainer epoch. A schedule knows nothing of models or rows: it gets the number of windows (optimizer steps) in one pass
over every shard and lays out the phases.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from hbat_lightning.errors import UserError
from hbat_lightning.gaps import GapPlan
from hbat_lightning.phases import BOTH, INSTRUCTION, PREFERENCE, DrawnPhase, JointPhase, Part, Phase, Plan

__all__ = [
    "INSTRUCTION",
    "PREFERENCE",
    "Interval",
    "Joint",
    "MaxGap",
    "Phase",
    "Plan",
    "RandomMix",
    "Rounds",
    "Schedule",
    "Single",
]


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

    def slots(self, accumulate: int) -> Mapping[str, int]:
        """How many of a window's micro-batches each objective gets in a window that it trains in.

        Args:
            accumulate: Micro-batches in a window.
        """
        return {INSTRUCTION: accumulate, PREFERENCE: accumulate}

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


class RandomMix(Schedule):
    """Draws the objective of every optimizer step anew: ALRIGHT (arXiv 2410.15483, algorithm 1).

    A step trains on preferences with probability λ and on instructions otherwise, with the objective's plain gradient: on
    average a step along that of ``(1 - λ) f_instruction + λ f_preference``. One phase holds all steps, so there is no
    switch: moments, learning rate and the phase-start reference run through, and validation falls at the end of every
    round. Both data sets are cycled through whole.

    Args:
        rounds: How often the figures are to be seen: Trainer epochs of ``steps`` optimizer steps.
        steps: Optimizer steps of a round.
        preference_probability: λ.
        seed: Seed of the draws.
    """

    def __init__(self, rounds: int = 10, steps: int = 100, preference_probability: float = 0.5, seed: int = 0) -> None:
        _require_positive(rounds=rounds, steps=steps)
        if not 0 <= preference_probability <= 1:
            raise ValueError(f"preference_probability must be in [0, 1], got {preference_probability}")
        self.rounds, self.shards, self.steps, self.seed = rounds, 1, steps, seed
        self.preference_probability = preference_probability

    def describe(self) -> str:
        """See :meth:`Schedule.describe`."""
        return (
            f"RandomMix (ALRIGHT): {self.rounds} × {self.steps} optimizer steps, each on preference data with probability "
            f"{self.preference_probability:g}, else on instruction data; data are cycled through whole"
        )

    def draw(self) -> list[str]:
        """The objective of every step of the run, from a generator of its own."""
        generator = random.Random(self.seed)
        return [
            PREFERENCE if generator.random() < self.preference_probability else INSTRUCTION
            for _ in range(self.rounds * self.steps)
        ]

    def plan(self, windows: Mapping[str, Sequence[int]]) -> Plan:
        """See :meth:`Schedule.plan`."""
        seen = {INSTRUCTION: 0, PREFERENCE: 0}
        draws = []
        for objective in self.draw():
            draws.append(Part(objective, 0, seen[objective]))
            seen[objective] += 1
        rounds = []
        for number in range(self.rounds):
            begin = number * self.steps
            own = tuple(draws[begin : begin + self.steps])
            rounds.append([DrawnPhase(0, number, BOTH, 0, 1, begin, self.steps, begin, len(draws), own)])
        return Plan(rounds)


class MaxGap(Schedule):
    """Trains the objective that is further from its best: MAXRIGHT (arXiv 2410.15483, algorithm 2).

    The gap of an objective is its loss above the best that it would reach alone, times its weight: λ for preferences, 1 - λ
    for instructions. That of an objective on rollouts is what the mean reward of its samples lacks to the best: its loss says
    nothing of how far it has come. Rewards and losses have different units, which λ has to weigh. See
    :class:`~hbat_lightning.gaps.GapPlan`. As with :class:`RandomMix`, one phase holds all steps, and both data sets are cycled
    through whole. Logs ``gap/instruction`` and ``gap/preference``.

    Args:
        rounds: How often the figures are to be seen: Trainer epochs of ``steps`` optimizer steps.
        steps: Optimizer steps of a round.
        preference_weight: λ.
        instruction_best: Loss that the instruction objective reaches alone; a property of model and data.
        preference_best: Loss that the preference objective reaches alone, 0 when not given; on rollouts the
            reward, which must be given.
        refresh: Optimizer steps after which both are measured anew. On rollouts that means to sample a cycle, unless one is
            being trained on, whose rewards then serve.
    """

    def __init__(
        self,
        rounds: int = 10,
        steps: int = 100,
        preference_weight: float = 0.5,
        instruction_best: float = 0.0,
        preference_best: float | None = None,
        refresh: int = 10,
    ) -> None:
        _require_positive(rounds=rounds, steps=steps, refresh=refresh)
        if not 0 <= preference_weight <= 1:
            raise ValueError(f"preference_weight must be in [0, 1], got {preference_weight}")
        self.rounds, self.shards, self.steps, self.refresh = rounds, 1, steps, refresh
        self.weights = {INSTRUCTION: 1 - preference_weight, PREFERENCE: preference_weight}
        self.best: dict[str, float | None] = {INSTRUCTION: instruction_best, PREFERENCE: preference_best}

    def describe(self) -> str:
        """See :meth:`Schedule.describe`."""
        gaps = ", ".join(
            f"{weight:g} × the way of {name} to {self.best[name] or 0.0:g}" for name, weight in self.weights.items()
        )
        return (
            f"MaxGap (MAXRIGHT): {self.rounds} × {self.steps} optimizer steps, each on the objective with the larger of "
            f"{gaps}; both measured every {self.refresh} steps; data are cycled through whole"
        )

    def plan(self, windows: Mapping[str, Sequence[int]]) -> Plan:
        """See :meth:`Schedule.plan`."""
        return GapPlan(self.rounds, self.steps, self.weights, self.best, self.refresh)


class Joint(Schedule):
    r"""Trains both objectives in every optimizer step, on one loss.

    .. math:: L = w_\mathrm{instruction} L_\mathrm{instruction} + w_\mathrm{preference} L_\mathrm{preference}

    each a mean over its own units in the window (tokens, pairs). With PPO this is SFT+ppo of the Hbat paper; with texts in
    the place of answers it is RLHF+pt, InstructGPT's PPO-ptx (Ouyang et al. 2022, eq. 2); with DPO it is Mix of
    arXiv 2410.15483. One phase holds all steps, so there is no switch.

    The micro-batches of a window take turns, instructions first: of an odd number they get one more. A round is a pass
    over the preference data, and instruction data are cycled through beside it.

    Args:
        instruction_weight: Weight of the instruction loss.
        preference_weight: Weight of the preference loss.
        epochs: Passes over the preference data.
    """

    def __init__(self, instruction_weight: float = 1.0, preference_weight: float = 1.0, epochs: int = 1) -> None:
        _require_positive(epochs=epochs)
        if instruction_weight <= 0 or preference_weight <= 0:
            raise ValueError(
                f"weights must be above 0, got {instruction_weight} and {preference_weight}: to train one objective alone use "
                "its own module"
            )
        self.weights = {INSTRUCTION: instruction_weight, PREFERENCE: preference_weight}
        self.rounds, self.shards = epochs, 1

    def slots(self, accumulate: int) -> Mapping[str, int]:
        """See :meth:`Schedule.slots`.

        Raises:
            UserError: When a window has no room for both.
        """
        if accumulate < len(self.weights):
            raise UserError(
                "a window of the schedule Joint holds micro-batches of both objectives: set trainer.accumulate_grad_batches to "
                f"at least {len(self.weights)}, and halve data.init_args.batch_size in exchange"
            )
        return {name: len(range(turn, accumulate, len(self.weights))) for turn, name in enumerate(self.weights)}

    def describe(self) -> str:
        """See :meth:`Schedule.describe`."""
        loss = " + ".join(f"{weight:g} × {name} loss" for name, weight in self.weights.items())
        return (
            f"Joint: every optimizer step on {loss}; {self.rounds} × the preference data, instruction data are cycled"
        )

    def plan(self, windows: Mapping[str, Sequence[int]]) -> Plan:
        """See :meth:`Schedule.plan`."""
        steps, weights = windows[PREFERENCE][0], tuple(self.weights.items())
        return Plan(
            [
                [JointPhase(0, number, BOTH, 0, 1, number * steps, steps, number * steps, self.rounds * steps, weights)]
                for number in range(self.rounds)
            ]
        )


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

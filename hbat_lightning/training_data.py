"""What the stream is made from and what it gives: sets of rows, sets of prompts that must be answered first, micro-batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from hbat_lightning.switches import PhaseKey


class MicroBatch(NamedTuple):
    """What the module gets in one ``training_step`` or ``validation_step``.

    Attributes:
        inputs: Tensors of the objective's collation.
        objective: Name of the objective.
        scale: Factor for a *sum* of losses over this micro-batch, such that Lightning's mean over the window's
            micro-batches, and over processes, is the mean over all units (supervised tokens, pairs) of the window; where a
            window holds two objectives, the weighted sum of their means.
        phase: Index of the phase in the run.
        round: The round.
        step: Optimizer step inside the phase.
        last: Whether this micro-batch completes the window.
        seed: Seed for whatever is random in this micro-batch.
    """

    inputs: dict[str, Tensor]
    objective: str
    scale: float = 1.0
    phase: int = 0
    round: int = 0
    step: int = 0
    last: bool = True
    seed: int = 0


class TrainingSet(Protocol):
    """Rows of one objective, ready to be collated."""

    source: str
    digest: str

    def __len__(self) -> int:
        """Number of rows."""

    def units(self, row: int) -> int:
        """How much a row counts in the mean of the loss: its supervised tokens, or 1 for a pair."""

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of some rows."""

    def blank(self) -> dict[str, Tensor]:
        """Tensors of one row with nothing supervised: a forward pass with gradient zero."""


@dataclass(frozen=True)
class Cycle:
    """How rows become training data where completions must be sampled first.

    Attributes:
        windows: Windows' worth of rows that completions are sampled for at once.
        passes: How often they are trained on before the next are sampled.
    """

    windows: int = 1
    passes: int = 1


class SampledSet(ABC):
    """A :class:`TrainingSet` whose rows are prompts: what is trained on is sampled from the policy as training goes.

    The stream asks for the samples before it collates them, outside of any training step.
    """

    source: str
    digest: str
    cycle: Cycle

    @abstractmethod
    def __len__(self) -> int:
        """Number of prompts."""

    @abstractmethod
    def sample(self, phase: PhaseKey, key: str, micro_batches: Sequence[Sequence[int]], seed: int) -> None:
        """Sample completions, unless those of this key are at hand.

        Args:
            phase: The phase that they are for; it may be about to begin.
            key: Names the cycle.
            micro_batches: Row numbers, grouped as the first pass will collate them.
            seed: For whatever is random in it.
        """

    @abstractmethod
    def forget(self) -> None:
        """Let go of the samples at hand."""

    @abstractmethod
    def units(self, row: int) -> int:
        """How much a sampled row counts in the mean of the loss."""

    @abstractmethod
    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of some sampled rows."""

    @abstractmethod
    def blank(self) -> dict[str, Tensor]:
        """Tensors of one row with nothing supervised."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The samples at hand, in plain types and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved samples."""

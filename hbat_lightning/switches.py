"""How callbacks learn that one phase has ended and another begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from hbat_lightning.alignment import AlignmentModule


class PhaseKey(NamedTuple):
    """A phase of the run.

    Attributes:
        number: Its index in the run, from 0.
        objective: The objective that trains in it.
    """

    number: int
    objective: str


class PhaseCallback(Callback):
    """A callback that is told of every switch."""

    def describe(self) -> str:
        """A sentence on what it does to training, for the model card; empty where it only watches."""
        return ""

    def report(self) -> dict[str, Any]:
        """What it adds to the row of ``switches.jsonl`` of a phase that has just ended, in plain types; nothing."""
        return {}

    def on_switch(self, trainer: Trainer, module: AlignmentModule, ended: PhaseKey | None, begun: PhaseKey) -> None:
        """Called once per phase, before its first step, while the phase-start snapshot still is that of the ended one.

        Args:
            trainer: The trainer.
            module: The module that alternates.
            ended: The phase before; ``None`` at the start of the run.
            begun: The phase that begins.
        """

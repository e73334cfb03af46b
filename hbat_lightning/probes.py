"""Gradients of an objective from rows that are set aside for it, at the parameters as they are, in two halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hbat_lightning.data.rollouts import RolloutSet
from hbat_lightning.data.sets import deal
from hbat_lightning.sums import Sums
from hbat_lightning.training_data import MicroBatch, TrainingSet

if TYPE_CHECKING:
    from hbat_lightning.alignment import AlignmentModule
    from hbat_lightning.policy import Policy

Loss = Callable[["Policy", dict[str, Tensor]], Sums]


class Halves(NamedTuple):
    """Two estimates of one gradient, from disjoint rows.

    Attributes:
        first: By parameter name the gradient of the mean loss over the units of one half of the rows.
        second: The same over the other half.
        rows: How many rows both are from.
    """

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    rows: int


class _Part(NamedTuple):
    half: int
    rows: list[int]


class Probe:
    """The rows that an objective's gradient is taken from, and the loss.

    Held-out rows, the first of the set, with the loss that ``val/…/loss`` tells: of pairs against the initial policy, so that
    the figures of a run stay on one scale. Held-out prompts have no loss, so objectives on rollouts take the training loss of
    the rollouts at hand: those of the objective's last cycle, perhaps of an older policy. Of several processes each takes the
    rows that it evaluates.

    Args:
        module: The module in training.
        name: Name of the objective.
        rows: How many rows at most, or prompts with rollouts.
    """

    def __init__(self, module: AlignmentModule, name: str, rows: int) -> None:
        self.name, self._module, self._wanted = name, module, rows

    def halves(self) -> Halves | None:
        """The gradient's two estimates, the same on all processes; ``.grad`` is left alone.

        Returns:
            ``None`` where a half has no row: there are no rollouts yet.
        """
        data, loss, parts = self._rows()
        estimates = [self._mean(data, loss, [part.rows for part in parts if part.half == half]) for half in (0, 1)]
        if estimates[0] is None or estimates[1] is None:
            return None
        rows = torch.tensor(sum(len(part.rows) for part in parts), device=self._module.device)
        return Halves(estimates[0], estimates[1], int(self._module.ranks.add(rows)))

    @property
    def held_out_halves(self) -> int:
        """How many halves the held-out rows make, 0 to 2: where these serve, there must be two."""
        if self._rollouts is not None:
            return 2
        rows, size = len(self._module.data.val_sets[self.name]), self._module.data.val_batch_size
        return min(2, -(-rows // size) if self._together else rows)

    @property
    def _rollouts(self) -> RolloutSet | None:
        rows = self._module.data.train_sets[self.name]
        return rows if isinstance(rows, RolloutSet) else None

    @property
    def _together(self) -> bool:
        return self._module.data.kinds[self.name].together

    def _rows(self) -> tuple[TrainingSet, Loss, list[_Part]]:
        """What the rows are in, their loss, and this process's share of them in micro-batches."""
        data, ranks, objective = self._module.data, self._module.ranks, self._module.objectives[self.name]
        if self._rollouts is not None:
            rows = sorted(self._rollouts.at_hand)[: self._wanted]
            parts = _cut(list(enumerate(rows)), data.batch_size)[ranks.rank :: ranks.world]
            return self._rollouts, objective.loss, parts
        held_out = data.val_sets[self.name]
        shares = [part for part in deal(len(held_out), data.val_batch_size, ranks) if len(part)]
        if self._together:  # what a row is scored on depends on its whole micro-batch
            size = data.val_batch_size
            parts = [_Part(part[0] // size % 2, list(part)) for part in shares if part[0] < max(self._wanted, 2 * size)]
        else:
            own = [row for part in shares for row in part if row < self._wanted]
            parts = _cut([(row, row) for row in own], data.batch_size)
        return held_out, objective.evaluate, parts

    def _mean(self, data: TrainingSet, loss: Loss, parts: Sequence[list[int]]) -> dict[str, Tensor] | None:
        module, trained = self._module, self._module.policy.trained_parameters()
        sums = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        units = torch.zeros((), dtype=torch.float64, device=module.device)
        with module.ranks.together():
            for rows in parts:
                inputs = module.transfer_batch_to_device(
                    MicroBatch(data.collate(rows), self.name), module.device, 0
                ).inputs
                with torch.enable_grad(), module.trainer.precision_plugin.forward_context():
                    total, count = loss(module.policy, inputs)["loss"]
                gradients = torch.autograd.grad(total.sum(), list(trained.values()), allow_unused=True)
                for own, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        own.add_(gradient)
                units += count.sum().to(module.device)
        module.ranks.add(units)
        if not units:
            return None
        return {name: module.ranks.add(own).div_(units.to(own.dtype)) for name, own in sums.items()}


def _cut(rows: Sequence[tuple[int, int]], size: int) -> list[_Part]:
    """Rows, each behind the number whose parity says which half it is in, as micro-batches of one half each."""
    halves = [[row for number, row in rows if number % 2 == half] for half in (0, 1)]
    return [
        _Part(half, own[begin : begin + size]) for half, own in enumerate(halves) for begin in range(0, len(own), size)
    ]

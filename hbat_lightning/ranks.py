"""The processes of a run, and what they tell each other. A run of one process tells nobody anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from lightning.pytorch import Trainer
from torch import Tensor

from hbat_lightning.errors import SharedError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and how many there are.

    Everything but the two numbers is an exchange: all ranks must come to it, and in the same order. What an exchange
    returns has the same bits on every rank.

    Attributes:
        rank: Number of this process, from 0.
        world: How many there are, one per device.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, trainer: Trainer) -> Ranks:
        """Those of a trainer. A process group may outlive the trainer that made it, so that is not asked."""
        return cls(trainer.global_rank, trainer.world_size)

    def gather(self, value: Item) -> list[Item]:
        """Everyone's value, by rank. What is on a device should be moved off it before."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def add(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place; of the same shape everywhere, and on the rank's device."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's tensors, whatever the others have under the same names; of one type, on the rank's device."""
        if self.world == 1 or not tensors:
            return dict(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
        torch.distributed.broadcast(flat, src=0)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
        return {name: part.view(tensors[name].shape).clone() for name, part in zip(tensors, parts, strict=True)}

    def map(self, job: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """What a job makes of every item, in order: each item is one rank's, and all ranks get all results.

        Raises:
            SharedError: The job has failed on another rank.
        """
        mine = {}
        with self.together():
            for number in range(self.rank, len(items), self.world):
                mine[number] = job(items[number])
        results = {number: result for part in self.gather(mine) for number, result in part.items()}
        return [results[number] for number in range(len(items))]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """End on every rank where one fails: the others would wait for it in the next exchange.

        Raises:
            SharedError: The user's mistake that a rank has met, or the fact that another rank has failed.
        """
        if self.world == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        mistake = own is None or isinstance(own, UserError)
        said = own and (str(own) if mistake else f"failed with {type(own).__name__}: {own}")
        failures = [(rank, text) for rank, text in enumerate(self.gather(said)) if text is not None]
        if own is not None and not mistake:
            raise own
        if failures:
            rank, text = failures[0]
            raise SharedError(str(text) if len(failures) == self.world else f"process {rank}: {text}") from own

    def require_equal(self, what: str, value: object) -> None:
        """Refuse to go on with something that must be the same everywhere and is not.

        Args:
            what: What it is, for the message.
            value: Rank's own, in plain types.

        Raises:
            SharedError: Says whose differs.
        """
        first, *others = self.gather(value)
        other = next((rank for rank, theirs in enumerate(others, 1) if theirs != first), None)
        if other is not None:
            raise SharedError(
                f"{what} must be the same in every process: {first!r} in process 0, {others[other - 1]!r} in process {other}. "
                "See to it that all nodes read the same files, with the same command"
            )


ALONE = Ranks()

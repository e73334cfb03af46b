"""Turns a plan and the objectives' data into whole accumulation windows.

Lightning steps the optimizer after every ``accumulate_grad_batches`` micro-batches, counted from the start of the epoch.
So each window here is exactly that many micro-batches, of two objectives only where the schedule says so; a short last
window of a pass is split over all of its slots, and a slot that stays empty carries one row without labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import torch

from hbat_lightning.errors import DataError, UserError
from hbat_lightning.phases import Extent, Part, Phase, Plan, Progress
from hbat_lightning.ranks import ALONE, Ranks
from hbat_lightning.schedules import Schedule
from hbat_lightning.switches import PhaseKey
from hbat_lightning.training_data import Cycle, MicroBatch, SampledSet, TrainingSet

Measure = Callable[[PhaseKey, Sequence[MicroBatch]], Progress]
"""Phase, a window's micro-batches -> the objective's progress as they show it, at the current parameters, without dropout."""


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that depends on nothing but the parts, in any process and on any machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@lru_cache(maxsize=4)  # every window of a pass asks for the same order
def permutation(size: int, *parts: object) -> tuple[int, ...]:
    """A random order of ``range(size)`` from a generator of its own, seeded by the parts."""
    generator = torch.Generator().manual_seed(stable_seed(*parts))
    return tuple(torch.randperm(size, generator=generator).tolist())


def make_shards(data: TrainingSet | SampledSet, objective: str, shards: int, seed: int) -> list[tuple[int, ...]]:
    """Cut a data set into disjoint shards of nearly equal size, at random.

    Args:
        data: The rows.
        objective: Name of the objective.
        shards: How many shards.
        seed: Seed of the run.

    Returns:
        The row numbers of every shard.

    Raises:
        DataError: When there are fewer rows than shards.
    """
    if len(data) < shards:
        raise DataError(
            f"{len(data)} usable {objective} rows are fewer than the schedule's {shards} rounds",
            data.source,
            remedy="Add rows, or lower model.init_args.schedule.init_args.rounds",
        )
    order = permutation(len(data), seed, objective, "shards")
    cuts = [len(data) * number // shards for number in range(shards + 1)]
    return [order[begin:end] for begin, end in pairwise(cuts)]


class WindowStream:
    """The training data of a run, one Trainer epoch per round, with a position that can be saved.

    ``__len__`` and the ``sampler`` property are what Lightning asks for: with a length it does not prefetch, so the
    saved position is that of the batch in hand; and it announces a new epoch through ``sampler``.

    Args:
        schedule: Lays out the phases.
        data: Per objective its rows; those the schedule names must be there.
        batch_size: Rows (pairs) in a micro-batch.
        accumulate: Micro-batches in a window, in each process.
        seed: Seed of the run: the order of rows and the seeds of micro-batches follow from it.
        ranks: The processes that share every window; a single one when not given.
    """

    def __init__(
        self,
        schedule: Schedule,
        data: Mapping[str, TrainingSet | SampledSet],
        batch_size: int,
        accumulate: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.data, self.batch_size, self.accumulate, self.seed = dict(data), batch_size, accumulate, seed
        self.ranks = ranks
        self.slots = {name: count * ranks.world for name, count in schedule.slots(accumulate).items()}
        self.shards = {name: make_shards(rows, name, schedule.shards, seed) for name, rows in self.data.items()}
        self.plan: Plan = schedule.plan(
            {
                name: [self._windows_per_pass(name, len(shard)) for shard in shards]
                for name, shards in self.shards.items()
            }
        )
        # Of the schedule's own plan: what a run keeps of its past after a change is no setting.
        self._fingerprint = self._own_fingerprint()
        self._accepts = False
        self._measure: Measure | None = None
        self.round = 0
        self.position = 0

    def measure_with(self, measure: Measure) -> None:
        """Say who measures progress, where the plan goes by it."""
        self._measure = measure

    @property
    def sampler(self) -> WindowStream:
        """Itself: Lightning calls ``sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of a round, unless it is the round the stream is already in."""
        if epoch != self.round:
            self.round, self.position = epoch, 0

    def __len__(self) -> int:
        """Micro-batches in the current round."""
        if self.round >= len(self.plan.rounds):
            return 0
        return sum(phase.windows for phase in self.plan.rounds[self.round]) * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        """Micro-batches from the saved position to the end of the round."""
        number = 0
        for phase in self.plan.rounds[self.round]:
            for step in range(phase.windows):
                if number + self.accumulate <= self.position:  # skip a finished window without collating it
                    number += self.accumulate
                    continue
                window = self._window(phase, step)
                for batch in window[max(0, self.position - number) :]:
                    self.position += 1  # before the yield: the saved position names the next micro-batch
                    yield batch
                number += self.accumulate

    def state_dict(self) -> dict[str, Any]:
        """Position and fingerprint, in plain types."""
        sampled = {name: rows.state_dict() for name, rows in self.data.items() if isinstance(rows, SampledSet)}
        return {
            "round": self.round,
            "position": self.position,
            "fingerprint": self.fingerprint(),
            "plan": self.plan.state_dict(),
            "extents": [[tuple(extent) for extent in phases] for phases in self.plan.extents],
            "sampled": sampled,
        }

    def follow(self, state: dict[str, Any], accepted: bool) -> None:
        """Lay out the run around a position that will be gone on from, which may be of another schedule or other data.

        Steps stay where they are: rounds that have begun keep their number of steps, and what is left of the one in hand
        takes its rows from the data as they are now. Rounds that have not begun follow the schedule as it is now.

        Args:
            state: The :meth:`state_dict` that :meth:`load_state_dict` will get.
            accepted: Whether it may have been saved under other settings. Samples at hand are then dropped where it was,
                since their rows may be others.

        Raises:
            UserError: When there is no place for the position.
        """
        self._accepts = accepted
        past = [[Extent(*extent) for extent in phases] for phases in state["extents"][: state["round"] + 1]]
        if len(past) > len(self.plan.rounds):
            raise UserError(
                f"the schedule's {len(self.plan.rounds)} rounds are over, the checkpoint is in round {len(past)}: give the "
                "schedule more rounds, or start a new run"
            )
        if past != self.plan.extents[: len(past)]:
            self.plan.keep(past)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            UserError: When the position was saved under other settings, where it would mean other rows.
        """
        mine, theirs = self.fingerprint(), state["fingerprint"]
        changed = [
            f"{key} was {theirs.get(key)!r}, is {mine.get(key)!r}" for key in mine if mine[key] != theirs.get(key)
        ]
        if changed and not self._accepts:
            raise UserError(
                "cannot go on from this checkpoint, the training data would be in another order: "
                + "; ".join(changed)
                + ". Restore these settings, or start a new run in another folder"
            )
        self.round, self.position = state["round"], state["position"]
        self.plan.load_state_dict(state["plan"])
        for name, rows in self.data.items():
            if isinstance(rows, SampledSet) and not changed:
                rows.load_state_dict(state["sampled"][name])

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides which rows a position means."""
        return self._fingerprint

    def _own_fingerprint(self) -> dict[str, Any]:
        rows = {f"{name} rows": f"{len(data)} ({data.digest})" for name, data in self.data.items()}
        rounds = [[phase.order for phase in phases] for phases in self.plan.rounds]
        plan = hashlib.blake2b(repr(rounds).encode(), digest_size=8).hexdigest()
        return {
            "batch_size × devices": self.batch_size * self.ranks.world,
            "accumulate_grad_batches": self.accumulate,
            "seed": self.seed,
            "schedule": f"{len(rounds)} rounds, {self.plan.total_steps} steps ({plan})",
            **rows,
        }

    def _cycle(self, objective: str) -> Cycle:
        rows = self.data[objective]
        return rows.cycle if isinstance(rows, SampledSet) else Cycle()

    def _window_size(self, objective: str) -> int:
        """Rows of an objective in a window."""
        return self.batch_size * self.slots[objective]

    def _windows_per_pass(self, objective: str, rows: int) -> int:
        """Windows in one pass over a shard; sampled rows are trained on several times in it."""
        return -(-rows // self._window_size(objective)) * self._cycle(objective).passes

    def _place(self, part: Part) -> _Place:
        """Where a window stands: which cycle of which pass over its shard, and which rows are its own."""
        shard, cycle = self.shards[part.objective][part.shard], self._cycle(part.objective)
        size = self._window_size(part.objective)
        epoch, number = divmod(part.window, self._windows_per_pass(part.objective, len(shard)))
        turn, inside = divmod(number, cycle.windows * cycle.passes)
        # Named by shard and pass, not by round or phase: an objective meets its rows in one order, alone or in a hybrid.
        name = (self.seed, part.objective, part.shard, epoch)
        order = permutation(len(shard), *name)[turn * cycle.windows * size : (turn + 1) * cycle.windows * size]
        rows = [shard[place] for place in order]
        repeat, window = divmod(inside, -(-len(rows) // size))
        again = permutation(len(rows), *name, turn, repeat) if repeat else range(len(rows))
        own = [rows[place] for place in again[window * size : (window + 1) * size]]
        return _Place("/".join(map(str, (*name[1:], turn))), rows, own, first=inside == 0)

    def _split(self, objective: str, rows: Sequence[int]) -> list[Sequence[int]]:
        """A window's rows of an objective, split over its micro-batches on all ranks."""
        slots = self.slots[objective]
        cuts = [len(rows) * slot // slots for slot in range(slots + 1)]
        return [rows[begin:end] for begin, end in pairwise(cuts)]

    def _sample(self, data: SampledSet, phase: Phase, objective: str, place: _Place) -> None:
        """Have the samples of a cycle at hand, grouped as its first pass groups them."""
        size = self._window_size(objective)
        windows = [place.cycle[begin : begin + size] for begin in range(0, len(place.cycle), size)]
        groups = [part for window in windows for part in self._split(objective, window) if part]
        key = PhaseKey(phase.index, phase.objective)
        # A cycle that a phase has cut off is sampled anew in the next: the policy has been trained on other things since.
        data.sample(key, f"{phase.index}/{place.key}", groups, stable_seed(self.seed, place.key, "samples"))

    def _window(self, phase: Phase, step: int) -> list[MicroBatch]:
        """A window's micro-batches; those of two objectives take turns."""
        measured: list[Part] = []
        self.plan.choose(phase.offset + step, lambda part: self._progress_of(phase, step, part, measured))
        for part in set(measured) - set(phase.parts(step)):
            self._drop_untouched(part)
        shares = [self._share(phase, step, part) for part in phase.parts(step)]
        window = [batch for turn in zip_longest(*shares) for batch in turn if batch is not None]
        return [*window[:-1], window[-1]._replace(last=True)]

    def _progress_of(self, phase: Phase, step: int, part: Part, measured: list[Part]) -> Progress:
        if self._measure is None:
            raise RuntimeError("nobody measures progress: call measure_with() first")
        measured.append(part)
        return self._measure(PhaseKey(phase.index, phase.objective), self._share(phase, step, part))

    def _drop_untouched(self, part: Part) -> None:
        """Let go of samples that were only measured: by the time their turn comes, the policy will be another one."""
        data, place = self.data[part.objective], self._place(part)
        if isinstance(data, SampledSet) and place.first:
            data.forget()

    def _share(self, phase: Phase, step: int, part: Part) -> list[MicroBatch]:
        """This rank's micro-batches of one objective in a window."""
        data, place = self.data[part.objective], self._place(part)
        if isinstance(data, SampledSet):
            self._sample(data, phase, part.objective, place)
        # Lightning divides by all micro-batches of the window, whoever's they are, and DDP by the processes.
        slots = self.accumulate * self.ranks.world
        scale = part.weight * slots / max(1, sum(data.units(row) for row in place.rows))
        dealt = list(enumerate(self._split(part.objective, place.rows)))
        return [
            MicroBatch(
                inputs=data.collate(rows) if rows else data.blank(),
                objective=part.objective,
                scale=scale,
                phase=phase.index,
                round=phase.round,
                step=phase.offset + step,
                last=False,
                seed=stable_seed(self.seed, part.objective, part.shard, part.window, slot),
            )
            for slot, rows in dealt[self.ranks.rank :: self.ranks.world]
        ]


class _Place(NamedTuple):
    """A window's place in a pass.

    Attributes:
        key: Names the cycle.
        cycle: Rows of the whole cycle, in the order of its first pass.
        rows: The window's own rows.
        first: Whether the cycle begins with it.
    """

    key: str
    cycle: list[int]
    rows: list[int]
    first: bool

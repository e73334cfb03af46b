"""The stream of windows, with rows that say who they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hbat_lightning.errors import DataError, UserError
from hbat_lightning.ranks import ALONE, Ranks
from hbat_lightning.schedules import INSTRUCTION, PREFERENCE, Interval, Joint, RandomMix, Rounds, Schedule, Single
from hbat_lightning.stream import WindowStream, make_shards, permutation, stable_seed
from hbat_lightning.training_data import MicroBatch


class Rows:
    """Rows that are their own numbers; row n counts n + 1 units."""

    source = "rows.json"

    def __init__(self, count: int, digest: str = "d") -> None:
        self.count, self.digest = count, digest
        self.collated: list[list[int]] = []

    def __len__(self) -> int:
        return self.count

    def units(self, row: int) -> int:
        return row + 1

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        self.collated.append(list(rows))
        return {"rows": torch.tensor(rows)}

    def blank(self) -> dict[str, Tensor]:
        return {"rows": torch.tensor([-1])}


def stream(
    schedule: Schedule | None = None,
    counts: tuple[int, int] = (17, 11),
    batch_size: int = 2,
    accumulate: int = 3,
    seed: int = 0,
    ranks: Ranks = ALONE,
    **digests: str,
) -> WindowStream:
    data = {
        name: Rows(count, digests.get(name, "d")) for name, count in zip((INSTRUCTION, PREFERENCE), counts, strict=True)
    }
    return WindowStream(schedule or Rounds(2, 2, 1), data, batch_size, accumulate, seed, ranks)


def rounds(source: WindowStream) -> Iterator[list[MicroBatch]]:
    """As Lightning goes through it: asks for the length, announces the epoch, iterates."""
    for number in range(len(source.plan.rounds)):
        source.set_epoch(number)
        length = len(source)
        batches = list(source)
        assert len(batches) == length
        yield batches


def windows(source: WindowStream) -> list[list[MicroBatch]]:
    k = source.accumulate
    return [batches[n : n + k] for batches in rounds(source) for n in range(0, len(batches), k)]


def rows_in(window: list[MicroBatch]) -> list[int]:
    return [row for batch in window for row in batch.inputs["rows"].tolist() if row >= 0]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 3), (1, 1), (4, 1), (1, 5), (3, 4), (20, 2)])
def test_every_pass_holds_every_row_of_the_shard_once(batch_size: int, accumulate: int) -> None:
    source = stream(batch_size=batch_size, accumulate=accumulate)
    passes: dict[tuple[int, str], list[int]] = {}
    for window in windows(source):
        assert len({(batch.phase, batch.objective, batch.round, batch.scale) for batch in window}) == 1
        assert [batch.last for batch in window] == [False] * (accumulate - 1) + [True]
        assert all(1 <= len(batch.inputs["rows"]) <= batch_size for batch in window)
        passes.setdefault((window[0].phase, window[0].objective), []).extend(rows_in(window))
    for (phase, objective), rows in passes.items():
        shard = sorted(source.shards[objective][phase // 2])
        epochs = 2 if objective == INSTRUCTION else 1
        assert sorted(rows) == sorted(shard * epochs)
        for epoch in range(epochs):
            assert sorted(rows[epoch * len(shard) : (epoch + 1) * len(shard)]) == shard
        assert epochs == 1 or rows[: len(shard)] != rows[len(shard) :]  # another order in every pass
    assert len(passes) == 4


def test_scale_makes_lightnings_mean_over_micro_batches_a_mean_over_units() -> None:
    ragged = 0
    for window in windows(stream()):
        units = sum(row + 1 for row in rows_in(window))
        sums = [sum(row + 1.0 for row in batch.inputs["rows"].tolist() if row >= 0) for batch in window]
        mean = sum(batch.scale * value for batch, value in zip(window, sums, strict=True)) / len(window)
        assert mean == pytest.approx(1.0)
        assert window[0].scale == pytest.approx(len(window) / units)
        ragged += len(rows_in(window)) < 6
    assert ragged


def test_a_short_window_is_split_over_its_slots_and_empty_ones_are_blank() -> None:
    source = stream(Single(INSTRUCTION), counts=(13, 0 + 1), batch_size=2, accumulate=4)
    last = windows(source)[-1]  # 13 = 8 + 5 rows, over four slots
    assert sorted(len(batch.inputs["rows"]) for batch in last) == [1, 1, 1, 2]
    source = stream(Single(INSTRUCTION), counts=(10, 1), batch_size=2, accumulate=4)
    last = windows(source)[-1]  # 2 rows over four slots
    assert sorted(batch.inputs["rows"].tolist() for batch in last)[:2] == [[-1], [-1]]
    assert len(rows_in(last)) == 2


def test_shards_are_disjoint_complete_and_nearly_equal() -> None:
    shards = make_shards(Rows(23), INSTRUCTION, 4, seed=3)
    assert sorted(row for shard in shards for row in shard) == list(range(23))
    assert sorted(map(len, shards)) == [5, 6, 6, 6]
    assert shards == make_shards(Rows(23), INSTRUCTION, 4, seed=3)
    assert shards != make_shards(Rows(23), INSTRUCTION, 4, seed=4)
    assert shards != make_shards(Rows(23), PREFERENCE, 4, seed=3)
    assert [row for shard in shards for row in shard] != list(range(23))  # at random, not in file order


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DataError, match=r"rows.json: 3 usable preference rows are fewer than the schedule's 4 rounds"):
        make_shards(Rows(3), PREFERENCE, 4, seed=0)


def test_an_objective_meets_its_rows_in_one_order_alone_and_in_a_hybrid() -> None:
    def order(source: WindowStream) -> list[tuple[list[int], int]]:
        found = [batch for batches in rounds(source) for batch in batches if batch.objective == PREFERENCE]
        return [(batch.inputs["rows"].tolist(), batch.seed) for batch in found]

    assert order(stream(Rounds(1, 3, 2))) == order(stream(Single(PREFERENCE, 2)))
    assert order(stream(Rounds(1, 1, 2))) == order(stream(Rounds(1, 3, 2)))


def test_interval_goes_on_in_the_data_where_its_last_phase_stopped() -> None:
    # 17 rows are three windows of up to six: passes begin at steps 0, 3 and 6 of the objective, across phases.
    found = [window for window in windows(stream(Interval(4, 2, 1))) if window[0].objective == INSTRUCTION]
    rows = [rows_in(window) for window in found]
    assert [len(part) for part in rows] == [6, 6, 5, 6, 6, 5, 6, 6]
    for begin in (0, 3):
        assert sorted(row for part in rows[begin : begin + 3] for row in part) == list(range(17))
    assert [batch.step for window in found for batch in window[:1]] == [0, 1] * 4


def test_seeds_differ_between_all_micro_batches_of_a_run() -> None:
    seeds = [batch.seed for batches in rounds(stream(Rounds(3, 2, 2))) for batch in batches]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [batch.seed for batches in rounds(stream(Rounds(3, 2, 2))) for batch in batches]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert not set(seeds) & {batch.seed for batches in rounds(stream(Rounds(3, 2, 2), seed=1)) for batch in batches}


@pytest.mark.parametrize("schedule", [Rounds(2, 2, 1), Interval(2, 3, 2), Single(INSTRUCTION, 2)])
def test_going_on_from_any_position_yields_the_rest(schedule: Schedule) -> None:
    whole = list(rounds(stream(schedule)))
    for number, batches in enumerate(whole):
        for position in range(len(batches) + 1):
            first = stream(schedule)
            first.set_epoch(number)
            taken = iter(first)
            for _ in range(position):
                next(taken)
            state = first.state_dict()
            assert (state["round"], state["position"]) == (number, position)
            again = stream(schedule)
            again.load_state_dict(state)
            again.set_epoch(number)  # Lightning announces the round again: it must not go back to its start
            rest = list(again)
            assert [same(batch) for batch in rest] == [same(batch) for batch in batches[position:]]


def same(batch: MicroBatch) -> Any:
    return (batch.inputs["rows"].tolist(), *batch[1:])


def test_finished_windows_are_not_collated_again() -> None:
    source = stream(Single(INSTRUCTION), counts=(17, 1))
    state = source.state_dict() | {"position": 6}
    source.load_state_dict(state)
    list(source)
    assert sum(map(len, source.data[INSTRUCTION].collated)) == 17 - 12  # type: ignore[attr-defined]


def test_a_new_round_begins_at_its_start_and_after_the_last_there_is_nothing() -> None:
    source = stream()
    list(source)
    source.set_epoch(1)
    assert source.position == 0
    source.set_epoch(2)
    assert len(source) == 0


def test_lightning_finds_the_sampler_that_it_announces_epochs_to() -> None:
    from lightning.fabric.utilities.data import _set_sampler_epoch

    source = stream()
    _set_sampler_epoch(source, 1)
    assert source.round == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (stream(batch_size=3), "batch_size × devices was 2, is 3"),
        (stream(accumulate=2), "accumulate_grad_batches was 3, is 2"),
        (stream(seed=1), "seed was 0, is 1"),
        (stream(counts=(18, 11)), r"instruction rows was '17 \(d\)', is '18 \(d\)'"),
        (stream(preference="e"), r"preference rows was '11 \(d\)', is '11 \(e\)'"),
        (stream(Rounds(2, 2, 2)), "schedule was '2 rounds"),
        (stream(Interval(2, 4, 1)), "schedule was '2 rounds"),
    ],
)
def test_positions_of_other_runs_are_refused_by_name(other: WindowStream, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        other.load_state_dict(stream().state_dict())
    assert "in another order" in str(caught.value)


def test_state_survives_a_file_read_with_weights_only(tmp_path: Any) -> None:
    torch.save(stream().state_dict(), tmp_path / "state")
    stream().load_state_dict(torch.load(tmp_path / "state", weights_only=True))


@pytest.mark.parametrize(
    "schedule", [Rounds(2, 2, 1), Interval(2, 3, 2), RandomMix(2, 6), Joint()], ids=lambda one: type(one).__name__
)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_take_turns_in_the_slots_of_one_window(schedule: Schedule, world: int) -> None:
    """Together they have the micro-batches, seeds and scales of a single process that accumulates as many."""
    counts = (19, 13)
    one = windows(stream(schedule, counts, accumulate=2 * world))
    shares = [windows(stream(schedule, counts, accumulate=2, ranks=Ranks(rank, world))) for rank in range(world)]
    assert len(one) == len(shares[0])
    blank = 0
    for window, *parts in zip(one, *shares, strict=True):
        for micro, turn in enumerate(zip(*parts, strict=True)):
            assert len({batch.objective for batch in turn}) == 1  # the same objective everywhere, at every step
            assert all(batch.last == (micro == 1) for batch in turn)
        mine = sorted((same(batch._replace(last=False)) for part in parts for batch in part), key=repr)
        assert mine == sorted((same(batch._replace(last=False)) for batch in window), key=repr)
        blank += sum(batch.inputs["rows"].tolist() == [-1] for part in parts for batch in part)
    assert blank or world == 3  # short windows leave slots empty, of some ranks


def test_going_on_needs_the_same_global_batch_and_not_the_same_ranks() -> None:
    state = stream(batch_size=2, ranks=Ranks(0, 2)).state_dict() | {"position": 6}
    alone = stream(batch_size=4)
    alone.load_state_dict(state)
    assert alone.position == 6
    with pytest.raises(UserError, match="batch_size × devices was 4, is 2"):
        stream(batch_size=2).load_state_dict(state)
    with pytest.raises(UserError, match="accumulate_grad_batches was 3, is 6"):
        stream(batch_size=2, accumulate=6).load_state_dict(state)


def test_orders_and_seeds_are_those_of_every_machine() -> None:
    """Golden values: a change of these numbers changes every run that goes on from an old checkpoint."""
    assert stable_seed(0, "instruction", 1) == 1859450936906707652
    assert permutation(8, 0, "instruction") == (3, 6, 2, 0, 1, 5, 4, 7)
    before = torch.random.get_rng_state()
    permutation(9, "fresh")
    assert torch.equal(before, torch.random.get_rng_state())  # a generator of its own

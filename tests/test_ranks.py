"""Exchanges between processes, with what the others say written down; real processes are in ``test_several_processes.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hbat_lightning.data.rollouts import SharedWork
from hbat_lightning.errors import SharedError, UserError
from hbat_lightning.ranks import ALONE, Ranks
from hbat_lightning.sums import Totals, apart, in_turn, means_of, pool


@dataclass(frozen=True)
class Scripted(Ranks):
    """Rank ``rank`` of several, whose others say what is written down, in the order of the exchanges."""

    others: list[dict[int, Any]] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        said = self.others.pop(0)
        return [value if rank == self.rank else said[rank] for rank in range(self.world)]

    def add(self, values: Tensor) -> Tensor:
        return values + self.others.pop(0)[0]


def test_alone_nothing_is_exchanged() -> None:
    values = torch.tensor([1.0, 2.0])
    assert ALONE.gather("own") == ["own"]
    assert torch.equal(ALONE.add(values), values)
    assert ALONE.first({"a": values}) == {"a": values}
    assert ALONE.map(lambda item: item * 2, [1, 2, 3]) == [2, 4, 6]
    ALONE.require_equal("a number", 1)
    with pytest.raises(ZeroDivisionError), ALONE.together():
        _ = 1 / 0


def test_jobs_are_shared_and_their_results_come_back_in_order() -> None:
    done = []

    def job(item: str) -> str:
        done.append(item)
        return item.upper()

    ranks = Scripted(1, 3, [{0: None, 2: None}, {0: {0: "A", 3: "D"}, 2: {2: "C"}}])
    assert ranks.map(job, ["a", "b", "c", "d", "e"][:4]) == ["A", "B", "C", "D"]
    assert done == ["b"]


def test_a_mistake_of_another_rank_ends_this_one() -> None:
    with (
        pytest.raises(SharedError, match=r"^process 1: no such file$"),
        Scripted(0, 2, [{1: "no such file"}]).together(),
    ):
        pass
    with (
        pytest.raises(SharedError, match=r"^no such file$") as caught,  # met by all: said without a number
        Scripted(0, 2, [{1: "no such file"}]).together(),
    ):
        raise UserError("no such file")
    assert isinstance(caught.value.__cause__, UserError)


def test_a_fault_keeps_its_traceback_where_it_is_and_is_named_elsewhere() -> None:
    with pytest.raises(KeyError), Scripted(0, 2, [{1: None}]).together():
        raise KeyError("x")
    other = Scripted(0, 2, [{1: "failed with KeyError: 'x'"}])
    with pytest.raises(SharedError, match="process 1: failed with KeyError: 'x'"), other.together():
        pass


def test_what_differs_between_ranks_is_named() -> None:
    with pytest.raises(
        SharedError, match=r"the data must be the same in every process: 'a' in process 0, 'b' in process 2"
    ):
        Scripted(0, 3, [{1: "a", 2: "b"}]).require_equal("the data", "a")
    Scripted(0, 3, [{1: "a", 2: "a"}]).require_equal("the data", "a")


def totals(**sums: tuple[float, float]) -> Totals:
    own = Totals()
    own.add({name: (torch.tensor(total), torch.tensor(count)) for name, (total, count) in sums.items()})
    return own


def test_windows_are_pooled_in_one_exchange_by_sums_and_counts() -> None:
    first, second = totals(loss=(6.0, 2.0), accuracy=(1.0, 2.0)), totals(loss=(1.0, 1.0))
    ranks = Scripted(0, 2, [{0: torch.tensor([3.0, 4.0, 2.0, 4.0, 2.0, 0.0])}])
    pool([first, second], ranks, torch.device("cpu"))
    assert first.means() == {"loss": 9 / 6, "accuracy": 3 / 6}  # not the mean of 3 and 0.75
    assert second.means() == {"loss": 3.0}
    assert not ranks.others


def test_held_out_rows_of_ranks_are_in_the_order_of_one_process() -> None:
    def micro_batch(*rows: float, kl: tuple[float, float] = (0.0, 0.0)) -> dict[str, list[tuple[float, float]]]:
        sums = (torch.tensor(rows), torch.tensor([number + 1 for number in range(len(rows))]))
        return apart({"loss": sums, "kl": (torch.tensor(kl[0]), torch.tensor(kl[1]))})

    first = {"instruction": [micro_batch(1.0, 2.0), micro_batch(5.0)], "preference": [micro_batch(8.0)]}
    second = {"instruction": [micro_batch(3.0, 4.0)]}
    found = in_turn([first, second, {}])
    assert found["instruction"]["loss"] == [(1.0, 1.0), (2.0, 2.0), (3.0, 1.0), (4.0, 2.0), (5.0, 1.0)]
    assert list(found) == ["instruction", "preference"]
    assert means_of(found["instruction"]) == {"loss": 15 / 7}  # over what rows count; nothing was counted for kl
    assert means_of(found["preference"]) == {"loss": 8.0}


def test_it_does_not_matter_whose_work_it_is_and_a_second_round_draws_anew() -> None:
    alone = SharedWork(ALONE, 5)
    first, second = (alone(lambda item: (item, float(torch.rand(()))), ["a", "b", "c"]) for _ in range(2))
    assert len({number for _, number in first + second}) == 6
    other = SharedWork(Scripted(1, 2, [{0: None}, {0: {0: first[0], 2: first[2]}}]), 5)
    assert other(lambda item: (item, float(torch.rand(()))), ["a", "b", "c"]) == first

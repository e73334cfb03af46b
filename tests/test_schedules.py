"""Plans: phases, shards and steps, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from hbat_lightning.schedules import INSTRUCTION, PREFERENCE, Interval, Phase, Plan, Rounds, Single

WINDOWS = {INSTRUCTION: [2, 1, 3], PREFERENCE: [1, 2, 1]}


def walk(plan: Plan) -> list[tuple[int, str, int]]:
    """Phase, objective and step inside the phase of every optimizer step, by walking through the rounds."""
    return [
        (phase.index, phase.objective, phase.offset + step)
        for phases in plan.rounds
        for phase in phases
        for step in range(phase.windows)
    ]


def test_rounds_train_shard_r_of_both() -> None:
    plan = Rounds(3, instruction_epochs=2, preference_epochs=1).plan(WINDOWS)
    found = [(p.index, p.round, p.objective, p.shard, p.windows, p.length, p.first_window) for p in plan.phases]
    assert found == [
        (0, 0, INSTRUCTION, 0, 4, 4, 0),
        (1, 0, PREFERENCE, 0, 1, 1, 0),
        (2, 1, INSTRUCTION, 1, 2, 2, 0),
        (3, 1, PREFERENCE, 1, 2, 2, 0),
        (4, 2, INSTRUCTION, 2, 6, 6, 0),
        (5, 2, PREFERENCE, 2, 1, 1, 0),
    ]
    assert (plan.total_steps, plan.phase_count, len(plan.rounds)) == (16, 6, 3)


def test_interval_cycles_through_the_whole_data() -> None:
    plan = Interval(3, instruction_steps=4, preference_steps=2).plan({INSTRUCTION: [3], PREFERENCE: [5]})
    found = [(p.index, p.objective, p.shard, p.first_window, p.windows) for p in plan.phases]
    assert found == [
        (0, INSTRUCTION, 0, 0, 4),
        (1, PREFERENCE, 0, 0, 2),
        (2, INSTRUCTION, 0, 4, 4),
        (3, PREFERENCE, 0, 2, 2),
        (4, INSTRUCTION, 0, 8, 4),
        (5, PREFERENCE, 0, 4, 2),
    ]


def test_single_is_one_phase_over_several_epochs() -> None:
    plan = Single(PREFERENCE, 3).plan({PREFERENCE: [4]})
    assert [(p.index, p.round, p.first_window, p.offset, p.length) for p in plan.phases] == [
        (0, 0, 0, 0, 12),
        (0, 1, 4, 4, 12),
        (0, 2, 8, 8, 12),
    ]
    assert plan.phase_count == 1
    assert [step for step in range(14) if plan.ended_at(step)] == [12]  # not at the end of every epoch
    assert [step for step in range(14) if plan.round_ends_at(step)] == [4, 8, 12]


@pytest.mark.parametrize(
    ("schedule", "windows"),
    [
        (Rounds(3, 2, 1), WINDOWS),
        (Interval(2, 3, 1), {INSTRUCTION: [2], PREFERENCE: [2]}),
        (Single(INSTRUCTION, 3), {INSTRUCTION: [2]}),
    ],
)
def test_at_and_ended_at_agree_with_a_walk(schedule: Any, windows: Any) -> None:
    plan = schedule.plan(windows)
    steps = walk(plan)
    assert len(steps) == plan.total_steps
    for step, (index, objective, inside) in enumerate(steps):
        phase, number = plan.at(step)
        assert (phase.index, phase.objective, number) == (index, objective, inside)
        ends = step + 1 == len(steps) or steps[step + 1][0] != index
        ended = plan.ended_at(step + 1)
        assert (ended is not None) == ends
        assert ended is None or ended.index == index
    phase, number = plan.at(plan.total_steps)  # Lightning asks once more after the last step
    assert phase == plan.phases[-1]
    assert number == phase.length
    assert plan.ended_at(0) is None


def test_an_empty_plan_has_no_steps() -> None:
    assert Plan([]).total_steps == 0
    phase = Phase(0, 0, INSTRUCTION, 0, 1, 0, 2, 0, 2)
    assert Plan([[phase], []]).total_steps == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rounds(0), "rounds must be at least 1, got 0"),
        (lambda: Rounds(1, 0), "instruction_epochs must be at least 1, got 0"),
        (lambda: Rounds(1, 1, -1), "preference_epochs must be at least 1, got -1"),
        (lambda: Interval(1, 0), "instruction_steps must be at least 1, got 0"),
        (lambda: Interval(1, 1, 0), "preference_steps must be at least 1, got 0"),
        (lambda: Single(INSTRUCTION, 0), "epochs must be at least 1, got 0"),
    ],
)
def test_nothing_to_do_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

"""Learning-rate shapes by hand."""

from __future__ import annotations

import math

import pytest

from hbat_lightning.lr import Constant, Cosine, Linear, LRSchedule


def factors(schedule: LRSchedule, length: int) -> list[float]:
    return [schedule.factor(step, length) for step in range(length)]


def test_shapes_without_warmup() -> None:
    assert factors(Constant(), 3) == [1.0, 1.0, 1.0]
    assert factors(Linear(), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert factors(Cosine(), 4) == pytest.approx([(1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)])


@pytest.mark.parametrize(
    ("warmup", "length", "rise"),
    [
        (2, 6, [1 / 3, 2 / 3]),
        (0.5, 6, [1 / 4, 2 / 4, 3 / 4]),
        (0.05, 6, [1 / 2]),  # a share is rounded up: one step of six
        (100, 4, [1 / 4, 2 / 4, 3 / 4]),  # a short phase still reaches its peak
        (100, 1, []),
    ],
)
def test_warmup_is_linear_and_shorter_than_the_stretch(warmup: float, length: int, rise: list[float]) -> None:
    got = factors(Linear(warmup), length)
    rest = length - len(rise)
    assert got == pytest.approx([*rise, *((rest - n) / rest for n in range(rest))])
    assert max(got) == 1.0


def test_a_step_past_the_end_stays_at_the_end() -> None:
    assert Cosine().factor(9, 5) == Linear().factor(9, 5) == 0.0


def test_negative_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup must not be negative, got -1"):
        Cosine(-1)

"""Importance weights against plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from hbat_lightning.functional import (
    effective_number,
    literal_weights,
    proportional_weights,
    squared_displacement,
)

IMPORTANCE = [1e-6, 4e-6, 0.0, 2.5e-7]


def test_displacement_is_squared_in_fp32_or_better() -> None:
    before, after = torch.tensor([1.0, -2.0]), torch.tensor([1.5, 1.0])
    assert squared_displacement(before, after).tolist() == [0.25, 9.0]
    small = torch.tensor([1e-3], dtype=torch.bfloat16)
    assert squared_displacement(torch.zeros_like(small), small).dtype == torch.float32
    assert squared_displacement(before.double(), after.double()).dtype == torch.float64


@pytest.mark.parametrize("kappa", [0.0, 1e3, 1e10])
def test_literal_is_a_softmax_of_squared_kappa_times_importance(kappa: float) -> None:
    top = max(IMPORTANCE) * kappa**2
    powers = [math.exp(kappa**2 * value - top) for value in IMPORTANCE]
    truth = [power / sum(powers) for power in powers]
    got = literal_weights(torch.tensor(IMPORTANCE, dtype=torch.float64), kappa)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(truth, rel=1e-9, abs=1e-300)


def test_literal_is_one_hot_at_the_official_kappa() -> None:
    """A drift of 1e-8, and one tensor that moved a millionth more than the others."""
    importance = torch.full((291,), 1e-16, dtype=torch.float64)
    importance[17] *= 1.02
    weights = literal_weights(importance)
    assert weights.argmax() == 17
    assert effective_number(weights) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_proportional_has_mean_1_and_zero_stays_zero(tau: float) -> None:
    powers = [value ** (1 / tau) for value in IMPORTANCE]
    truth = [len(powers) * power / sum(powers) for power in powers]
    got = proportional_weights(torch.tensor(IMPORTANCE), tau)
    assert got.tolist() == pytest.approx(truth, rel=1e-6)
    assert got.mean().item() == pytest.approx(1.0)
    shaped = proportional_weights(torch.tensor(IMPORTANCE).reshape(2, 2), tau)
    assert shaped.shape == (2, 2)
    assert shaped.flatten().tolist() == got.tolist()


def test_proportional_limits_and_scale() -> None:
    values = torch.tensor(IMPORTANCE, dtype=torch.float64)
    assert proportional_weights(values, 1e9).tolist() == pytest.approx([4 / 3, 4 / 3, 0.0, 4 / 3], rel=1e-6)
    assert proportional_weights(values, 0.01).tolist() == pytest.approx([0.0, 4.0, 0.0, 0.0], abs=1e-6)
    assert torch.allclose(proportional_weights(values * 1e-30), proportional_weights(values))
    assert proportional_weights(torch.zeros(3)).tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="tau must be > 0, got 0"):
        proportional_weights(values, 0.0)


@pytest.mark.parametrize(
    ("weights", "number"),
    [([1.0, 0.0, 0.0], 1.0), ([2.0] * 5, 5.0), ([0.0] * 4, 0.0), ([0.5, 0.25, 0.25], 2**1.5)],
)
def test_effective_number_is_the_exponential_of_the_entropy(weights: list[float], number: float) -> None:
    assert effective_number(torch.tensor(weights)) == pytest.approx(number)

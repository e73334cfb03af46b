"""Bootstrap intervals against the normal theory, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hbat_lightning.metrics import bootstrap, paired_bootstrap


def test_of_many_rows_it_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).exponential(size=4000)
    found = bootstrap(values, 0.9)
    half = 1.6449 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half * 0.06)
    assert found.rows == 4000


def test_the_truth_is_in_as_many_as_it_says() -> None:
    random = np.random.default_rng(2)
    inside = [bootstrap(random.normal(3, 1, 60), 0.9, draws=600, seed=n) for n in range(400)]
    assert np.mean([one.low <= 3 <= one.high for one in inside]) == pytest.approx(0.9, abs=0.045)


def test_pairs_are_drawn_together() -> None:
    """Rows of very different difficulty, on which one system is always ahead by a little: only pairs show it."""
    random = np.random.default_rng(3)
    hard = random.normal(0, 10, 100)
    found = paired_bootstrap(hard + random.normal(0.1, 0.1, 100), hard)
    assert found.decided
    assert found.high - found.low < 0.1
    assert bootstrap(hard).high - bootstrap(hard).low > 2
    assert paired_bootstrap([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0, 2)
    assert not paired_bootstrap([1.0, 2.0], [1.0, 2.0]).decided


def test_a_mean_over_tokens_draws_rows_with_all_their_tokens() -> None:
    """Against the delta method for a ratio of means: rows differ in length, and long ones have other losses."""
    random = np.random.default_rng(5)
    tokens = random.integers(1, 60, 3000).astype(float)
    losses = tokens * (1 + tokens / 60 + random.normal(0, 0.3, 3000))
    ratio = losses.sum() / tokens.sum()
    half = 1.96 * np.std(losses - ratio * tokens) / tokens.mean() / math.sqrt(3000)
    found = bootstrap(losses, counts=tokens)
    assert found.value == pytest.approx(ratio)
    assert (found.low, found.high) == pytest.approx((ratio - half, ratio + half), abs=half * 0.06)
    assert bootstrap(losses, counts=np.ones(3000)) == bootstrap(losses)
    other = losses - 0.1 * tokens
    assert paired_bootstrap(losses, other, counts=tokens)[:3] == pytest.approx((0.1, 0.1, 0.1))
    some = bootstrap([1.0, 0.0, 3.0], counts=[1.0, 0.0, 1.0])
    assert (some.value, some.rows) == (2.0, 2)
    with pytest.raises(ValueError, match="not all of them 0"):
        bootstrap([1.0], counts=[0.0])


def test_the_same_rows_have_the_same_interval_however_many_draws_fit_in_memory() -> None:
    values = np.random.default_rng(4).normal(size=300)
    assert bootstrap(values) == bootstrap(values)
    with pytest.raises(ValueError, match="pairs"):
        paired_bootstrap([1.0], [])
    with pytest.raises(ValueError, match="needs rows"):
        bootstrap([])
